"""Tiles of the Triton attention kernel, tried out on this device; what is fastest stays.

Tuned are calls in natural order that leave the rest out, on masks that keep a quarter of the blocks
in uneven rows. The winner goes into the user's own table (`accel.kernels.tiles`), which every later
call on a device like this one reads.
"""

import json
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from accel.dense import usual_dense
from accel.errors import AccelError
from accel.files import write_atomically
from accel.kernels.attention import sparse_attention
from accel.kernels.cache_folder import cache_folder
from accel.kernels.tiles import (
    Tiles,
    TilesKey,
    candidates,
    choose_tiles,
    save_tiles,
    tiles_key,
    trying,
)
from accel.pipelines.bench.case import BenchSettings, Block, Case
from accel.pipelines.bench.contest import Rival, contest
from accel.pipelines.bench.gate import attention_gate
from accel.pipelines.bench.inputs import inputs_of, random_mask
from accel.pipelines.host import DTYPES
from accel.pipelines.provenance import code_digest, device_name, versions

KEEP = 0.25
# the files that decide which tiles win
CODE = ("contest", "gate", "inputs", "tune")
# how many times the winner is checked before it stays
CHECKS = 5


def tune(settings: BenchSettings) -> dict[TilesKey, Tiles]:
    """The fastest tiles for every case, block and precision; kept as soon as they are known.

    What this device, these versions and this code have tuned is not tuned again: times differ a
    little, and other tiles would make all that was measured since worthless. Raises AccelError
    where there is no GPU.
    """
    if settings.device.type != "cuda":
        raise AccelError(
            f"tune=true is for the Triton kernels of GPUs, and the device is {settings.device.type}"
        )
    major, minor = torch.cuda.get_device_capability(settings.device)
    best: dict[TilesKey, Tiles] = {}
    for case in settings.cases:
        for block in settings.blocks:
            for precision in settings.precisions:
                key = key_of(case, block, precision, 10 * major + minor)
                if key not in best and not is_tuned(key, settings.device):
                    best[key] = fastest_tiles(key, case, block, precision, settings)
                    note_tuned(key, best[key], settings.device)
    print(f"tiles: {cache_folder() / 'tiles.json'}, {len(best)} of them new")
    return best


def is_tuned(key: TilesKey, device: torch.device) -> bool:
    """Whether the tiles that hold for a key were found here, and by this code."""
    return _notes().get(key.name) == _note(choose_tiles(key), device)


def note_tuned(key: TilesKey, tiles: Tiles, device: torch.device) -> None:
    """Note beside the user's table what found its tiles for a key."""
    notes = {**_notes(), key.name: _note(tiles, device)}
    write_atomically(_notes_path(), json.dumps(notes, indent=1) + "\n")


def _notes_path() -> Path:
    return cache_folder() / "tuned.json"


def _notes() -> dict[str, Any]:
    try:
        found = json.loads(_notes_path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # tuning again is all that comes of it
    return found if isinstance(found, dict) else {}


def _note(tiles: Tiles, device: torch.device) -> dict[str, Any]:
    files = (Path(__file__).parent / f"{name}.py" for name in CODE)
    return {
        "tiles": list(tiles),
        "device": device_name(device),
        "versions": versions(),
        "code": code_digest(*files),
    }


def key_of(case: Case, block: Block, precision: str, arch: int) -> TilesKey:
    """What the tiles of such a call are looked up by."""
    from accel.kernels.attention_triton import arithmetic

    halved = precision != "full" and case.dtype == "float32"
    return tiles_key(
        arch=arch,
        block=block,
        dim=case.dim,
        element_bytes=2 if halved else DTYPES[case.dtype].itemsize,
        arithmetic=arithmetic(precision, arch),
    )


@torch.no_grad()
def fastest_tiles(
    key: TilesKey, case: Case, block: Block, precision: str, settings: BenchSettings
) -> Tiles:
    """The candidate with the lowest price of those that are right; only it is kept in the user's
    table, and nothing before it is known.
    """
    inputs = inputs_of(case, settings.device)
    mask = random_mask(case, block, KEEP, "uneven", settings.device)
    gate = attention_gate(inputs[0], mask, settings.checked_rows)
    run = partial(sparse_attention, mask=mask, precision=precision, backend="triton")
    rival = Rival(lambda: run, precision)
    # enough to tell candidates apart; the benchmark itself measures with care
    quick = replace(settings, rounds=3, warm_up_ms=20.0, sample_ms=10.0)
    best, prices = choose_tiles(key), dict[Tiles, float]()
    tried: Iterable[Tiles] = tqdm(
        candidates(key), desc=f"tiles for {case.shape} {case.dtype} {precision}", unit="tiles"
    )
    for tiles in tried:
        with trying(key, tiles):
            outcome = contest({"triton": rival}, gate, inputs, quick, usual_dense)["triton"]
        if outcome.price is not None:
            prices[tiles] = outcome.price
    for tiles in sorted(prices, key=prices.__getitem__):
        with trying(key, tiles):
            # what a compiler got wrong may show only now and then
            errors = [gate.error(run(*inputs[0])) for _ in range(CHECKS)]
        if all(error <= gate.limit(precision) for error in errors):
            best = tiles
            break
    save_tiles({key: best})
    return best
