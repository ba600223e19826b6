"""Which tiles the attention kernel works in: the user's own table, one shipped, and a rule.

Nothing is tried out in a call. `candidates` says what is worth timing on a device, `save_tiles`
keeps what won, in a file of the user's cache folder that later processes read.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

from accel.files import write_atomically
from accel.kernels.arguments import RESTS
from accel.kernels.cache_folder import cache_folder, cache_path

__all__ = [
    "Tiles",
    "TilesKey",
    "candidates",
    "choose_tiles",
    "save_tiles",
    "shared_bytes",
    "shipped_tiles",
    "tiles_key",
    "trying",
    "user_table_path",
]

log = logging.getLogger("accel")

ACCESS = ("plain", "unaligned", "ordered")
ARITHMETIC = ("full", "int8", "fp8")
# what one program may have of shared memory
SHARED_BYTES = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
# (architecture, kind, head dim): queries, keys, warps, stages, and the bound of registers if there
# is one, for plain rows, and for others. Those of sm_90 in bf16 are the fastest of an H200 by
# Triton 3.6; the rest is the largest that compilers make without spills.
SHIPPED = {
    (80, "full", 64): ((128, 64, 8, 3), (128, 64, 8, 3)),
    (80, "full", 128): ((128, 64, 8, 3), (64, 64, 8, 3)),
    (80, "full", 256): ((64, 64, 8, 2), (64, 32, 8, 2)),
    (80, "int8", 64): ((128, 64, 8, 2), (128, 64, 8, 2)),
    (80, "int8", 128): ((64, 64, 8, 2), (64, 64, 8, 2)),
    (80, "int8", 256): ((64, 32, 8, 2), (64, 32, 8, 2)),
    (80, "fp32", 64): ((64, 32, 8, 2), (64, 32, 8, 2)),
    (80, "fp32", 128): ((64, 32, 8, 2), (64, 32, 8, 2)),
    (80, "fp32", 256): ((32, 16, 8, 1), (32, 16, 8, 1)),
    (89, "full", 64): ((128, 64, 8, 3), (128, 64, 8, 3)),
    (89, "full", 128): ((128, 64, 8, 3), (64, 64, 8, 3)),
    (89, "full", 256): ((64, 32, 8, 2), (64, 32, 8, 2)),
    (89, "int8", 64): ((128, 64, 8, 3), (128, 64, 8, 3)),
    (89, "int8", 128): ((64, 64, 8, 2), (64, 64, 8, 2)),
    (89, "int8", 256): ((64, 32, 8, 2), (64, 32, 8, 2)),
    (89, "fp8", 64): ((128, 64, 8, 3), (128, 64, 8, 3)),
    (89, "fp8", 128): ((64, 64, 8, 2), (64, 64, 8, 2)),
    (89, "fp8", 256): ((64, 32, 8, 2), (64, 32, 8, 2)),
    (89, "fp32", 64): ((64, 32, 8, 2), (64, 32, 8, 2)),
    (89, "fp32", 128): ((64, 32, 8, 2), (64, 32, 8, 2)),
    (89, "fp32", 256): ((32, 16, 8, 1), (32, 16, 8, 1)),
    (90, "full", 64): ((128, 64, 8, 4), (64, 64, 8, 3)),
    (90, "full", 128): ((128, 64, 8, 2, 128), (128, 64, 8, 3)),
    (90, "full", 256): ((64, 64, 8, 2), (64, 64, 8, 2)),
    (90, "int8", 64): ((128, 64, 8, 3), (128, 64, 8, 3)),
    (90, "int8", 128): ((128, 64, 8, 3), (128, 64, 8, 2)),
    (90, "int8", 256): ((64, 64, 8, 2), (64, 64, 8, 2)),
    (90, "fp8", 64): ((128, 64, 8, 3), (128, 64, 8, 3)),
    (90, "fp8", 128): ((128, 64, 8, 2), (128, 64, 8, 2)),
    (90, "fp8", 256): ((64, 32, 8, 2), (64, 32, 8, 2)),
    (90, "fp32", 64): ((64, 32, 8, 2), (64, 32, 8, 2)),
    (90, "fp32", 128): ((64, 32, 8, 2), (64, 32, 8, 2)),
    (90, "fp32", 256): ((32, 16, 8, 1), (32, 16, 8, 1)),
}
MAX_FILE_BYTES = 1 << 20
# of 64 k registers 128 each leave room for two programs of 8 warps
REGISTERS = (0, 128)
# what `trying` puts before the tables, for whoever opened it alone
_tried: ContextVar["tuple[TilesKey, Tiles] | None"] = ContextVar("tried", default=None)


class Tiles(NamedTuple):
    """What one program works on and how: a tile of queries against tiles of keys.

    tma: keys and values come by the tensor memory accelerator; persistent: as many programs as
    multiprocessors, each taking many tiles; specialized: producer and consumer warps (with tma, 4
    warps and 128 queries only); registers: the most that a thread gets, which decides how many
    programs a multiprocessor holds; 0 is what the compiler takes.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    tma: bool = False
    persistent: bool = False
    specialized: bool = False
    registers: int = 0


class TilesKey(NamedTuple):
    """What the best tiles depend on.

    arch: 80 for sm_80, ...; q_block, kv_block, dim: filled up to a power of two; access: "plain",
    "unaligned" (rows that the accelerator cannot load) or "ordered" (rows are gathered); rest: the
    most any head asks for; arithmetic: "full", "int8" or "fp8".
    """

    arch: int
    q_block: int
    kv_block: int
    dim: int
    element_bytes: int
    access: str
    rest: str
    arithmetic: str

    @property
    def name(self) -> str:
        """As files of tiles have it."""
        return " ".join(map(str, self))


def tiles_key(
    *,
    arch: int,
    block: tuple[int, int],
    dim: int,
    element_bytes: int,
    access: str = "plain",
    rest: str = "drop",
    arithmetic: str = "full",
) -> TilesKey:
    """The key of a call; sizes as they are, not filled up.

    Rows shorter than their tile need masks where they are loaded by pointers, as unaligned ones do.
    """
    least = 32 if arithmetic == "int8" or arithmetic == "fp8" else 16
    return TilesKey(
        arch,
        max(least, _power(block[0])),
        max(least, _power(block[1])),
        max(least, _power(dim)),
        element_bytes,
        "unaligned" if access == "plain" and arch < 90 and dim & (dim - 1) else access,
        rest,
        arithmetic,
    )


def choose_tiles(key: TilesKey, *, padded: bool = False) -> Tiles:
    """The tiles tried at the moment, the user's for this key, or those shipped; nothing is
    measured.

    padded: the call has valid lengths, which specialized warps cannot mask.
    """
    tried = _tried.get()
    if tried is not None and tried[0] == key:
        tiles: Tiles | None = tried[1]
    else:
        tiles = _user_table(user_table_path()).get(key)
    return shipped_tiles(key) if tiles is None or (tiles.specialized and padded) else tiles


@contextmanager
def trying(key: TilesKey, tiles: Tiles) -> Iterator[None]:
    """Calls with this key take these tiles, in this thread and for the length of a `with` block."""
    _check_fit(key, tiles)
    token = _tried.set((key, tiles))
    try:
        yield
    finally:
        _tried.reset(token)


def candidates(key: TilesKey) -> list[Tiles]:
    """What is worth timing for a key: what is shipped, then all else that fits the device.

    Specialized warps are among them and never shipped: compilers have got them wrong, so their
    results have to be checked on the device first.
    """
    found = [shipped_tiles(key)]
    modes = [mode for mode in product((False, True), repeat=3) if mode[0] or not mode[2]]
    for sizes in product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4)):
        for mode, registers in product(modes, REGISTERS):
            tiles = Tiles(*sizes, *mode)._replace(registers=registers)
            if _fits(tiles, key) and tiles not in found:
                found.append(tiles)
    return found


def shipped_tiles(key: TilesKey) -> Tiles:
    """The tiles of `SHIPPED` that serve a key, cut to its blocks."""
    arch = key.arch if key.arch in (80, 90) else 89
    kind = key.arithmetic if key.element_bytes == 2 else "fp32"
    plain, ordered = SHIPPED[arch, kind, max(64, key.dim)]
    queries, keys, warps, stages, *registers = plain if key.access == "plain" else ordered
    tma = arch == 90 and key.access == "plain" and kind != "fp32"
    if key.rest == "taylor" and key.dim > 128:
        queries, keys, tma = min(queries, 32), min(keys, 32), False
    if key.q_block < queries:
        warps = 4
    queries, keys = min(queries, key.q_block), min(keys, key.kv_block)
    # fewer warps have room enough
    bound = registers[0] if registers and warps == 8 else 0
    return Tiles(queries, keys, warps, stages, tma=tma, registers=bound)


def shared_bytes(tiles: Tiles, key: TilesKey) -> int:
    """About what a program holds: keys and values of every stage, and queries for wgmma."""
    key_bytes = 1 if key.arithmetic != "full" else key.element_bytes
    value_bytes = 1 if key.arithmetic == "fp8" else key.element_bytes
    queries = tiles.queries * key_bytes if key.arch in (90, 100) else 0
    return key.dim * (queries + tiles.stages * tiles.keys * (key_bytes + value_bytes))


def _fits(tiles: Tiles, key: TilesKey) -> bool:
    """Whether a call with this key can run so at all."""
    alone = (tiles.tma, tiles.warps, tiles.queries, key.rest, key.arithmetic, key.dim <= 128)
    return (
        tiles.queries <= key.q_block
        and tiles.keys <= key.kv_block
        # 128 registers of a thread for the accumulator leave little for all else
        and tiles.queries * key.dim <= 128 * 32 * tiles.warps
        and shared_bytes(tiles, key) <= SHARED_BYTES.get(key.arch, 99 << 10)
        and (not tiles.tma or (key.arch == 90 and key.access == "plain"))
        and (not tiles.specialized or alone == (True, 4, 128, "drop", "full", True))
        # fewer warps have room enough, and specialized ones share out registers by themselves
        and (not tiles.registers or (tiles.warps == 8 and not tiles.specialized))
    )


def user_table_path() -> Path | None:
    """Where `save_tiles` keeps what was measured here; None for a user without a home."""
    folder = cache_path()
    return None if folder is None else folder / "tiles.json"


def save_tiles(table: dict[TilesKey, Tiles]) -> Path:
    """Add measured tiles to the user's table; they hold from the next call on.

    OSError where there is no folder for it (see `cache_folder`).
    """
    for key, tiles in table.items():
        _check_fit(key, tiles)
    path = cache_folder() / "tiles.json"
    _user_table.cache_clear()  # another process may have added to the file
    merged = _user_table(path) | table
    content = {key.name: tiles._asdict() for key, tiles in sorted(merged.items())}
    write_atomically(path, json.dumps(content, indent=1) + "\n")
    _user_table.cache_clear()
    return path


def _check_fit(key: TilesKey, tiles: Tiles) -> None:
    if not _fits(tiles, key):
        raise ValueError(f"{tiles} do not fit {key}; take some of candidates(key)")


@cache
def _user_table(path: Path | None) -> dict[TilesKey, Tiles]:
    """The table of a file; what is not understood is left out, with one warning."""
    if path is None:
        return {}
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError:
        return {}
    table, wrong = {}, []
    try:
        if len(content) > MAX_FILE_BYTES:
            raise ValueError(f"more than {MAX_FILE_BYTES} bytes")
        entries = json.loads(content)
        if not isinstance(entries, dict):
            raise ValueError("no mapping of keys to tiles")
    except ValueError as error:
        log.warning("%s is no table of tiles and left unread: %s", path, error)
        return {}
    for name, fields in entries.items():
        key, tiles = _parse_key(name), _parse_tiles(fields)
        if key is None or tiles is None or not _fits(tiles, key):
            wrong.append(name)
        else:
            table[key] = tiles
    if wrong:
        log.warning("%s has %d entries that fit nothing, such as %r", path, len(wrong), wrong[0])
    return table


def _parse_key(name: str) -> TilesKey | None:
    parts = name.split(" ")
    if len(parts) != len(TilesKey._fields) or not all(x.isdecimal() for x in parts[:5]):
        return None
    arch, q_block, kv_block, dim, size = (int(x[:6]) for x in parts[:5])
    key = TilesKey(arch, q_block, kv_block, dim, size, *parts[5:])
    words = (key.access in ACCESS, key.rest in RESTS, key.arithmetic in ARITHMETIC)
    return key if all(words) and key.name == name else None


def _parse_tiles(fields) -> Tiles | None:
    if not isinstance(fields, dict) or set(fields) != set(Tiles._fields):
        return None
    tiles = Tiles(**fields)
    numbers, modes = (*tiles[:4], tiles.registers), tiles[4:7]
    if not all(type(x) is int for x in numbers) or not all(type(x) is bool for x in modes):
        return None
    powers = all(x in (16, 32, 64, 128, 256) for x in tiles[:2]) and tiles.warps in (4, 8, 16)
    bounded = 1 <= tiles.stages <= 8 and tiles.registers in REGISTERS
    return tiles if powers and bounded else None


def _power(size: int) -> int:
    """The least power of two that is no less."""
    return 1 << (size - 1).bit_length()
