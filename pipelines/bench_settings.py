"""What a benchmark is asked for, checked before anything is spent on it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from accel.errors import AccelError, nearest
from accel.pipelines.host import DTYPES, resolve_device
from accel.plan import check_block
from accel.untrusted import check_whole, finite

Block = tuple[int, int]

KERNELS = ("attention", "block_mass", "antidiagonal")
ROWS = ("uniform", "uneven")
PRECISIONS = {"cpu": ("full", "half"), "cuda": ("full", "half", "int8", "fp8")}
BLOCKS: dict[str, tuple[Block, ...]] = {"cpu": ((64, 64),), "cuda": ((128, 64),)}
BACKENDS = {
    "cpu": ("native", "cpu", "flex"),
    "cuda": ("triton", "flex", "flashinfer"),
}
SIZES = ("heads", "tokens", "dim")
CONDITIONS = (
    "backends", "precisions", "blocks", "keeps", "rows", "stride",
    "rounds", "warm_up_ms", "sample_ms", "limit_s", "checked_rows",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One self-attention call: `[batch, heads, tokens, dim]` in `dtype`. shape: what it is of."""

    shape: str
    batch: int
    heads: int
    tokens: int
    dim: int
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSettings:
    """What is measured, and how; see `configs/bench.yaml`."""

    device: torch.device
    kernels: tuple[str, ...]
    cases: tuple[Case, ...]
    backends: tuple[str, ...]
    precisions: tuple[str, ...]
    blocks: tuple[Block, ...]
    keeps: tuple[float, ...]
    rows: tuple[str, ...]
    stride: int
    rounds: int
    warm_up_ms: float
    sample_ms: float
    limit_s: float
    checked_rows: int

    @property
    def masks(self) -> list[tuple[float, str]]:
        """Every keep with every kind of rows; those of a full mask are even."""
        return [(k, r) for k in self.keeps for r in self.rows if k < 1 or r == self.rows[0]]

    @property
    def conditions(self) -> dict[str, Any]:
        """What a measured row depends on besides its own fields: how it was taken."""
        return {name: getattr(self, name) for name in CONDITIONS}


def bench_settings(config: Mapping[str, Any]) -> BenchSettings:
    """The settings of a configuration; raises AccelError naming the value that cannot be."""
    device = resolve_device("device", config["device"])
    kind = device.type
    if kind not in BACKENDS:
        raise AccelError(f"device is {config['device']!r}; accel-bench measures cpu and cuda")
    kernels = KERNELS if config["kernel"] == "all" else _chosen("kernel", config, KERNELS)
    for name in ("rounds", "checked_rows", "stride"):
        check_whole(name, config[name], 1)
    for name in ("warm_up_ms", "sample_ms", "limit_s"):
        if not finite(config[name]) or config[name] < 0:
            raise AccelError(f"{name} is {config[name]!r}; it is a number, at least 0")
    if type(config["tune"]) is not bool:
        raise AccelError(f"tune is {config['tune']!r}; it is true or false")
    keeps = config["keeps"]
    if not isinstance(keeps, Sequence) or not keeps:
        raise AccelError(f"keeps is {keeps!r}; it is a list of fractions, as in keeps=[1.0,0.25]")
    for keep in keeps:
        if not finite(keep) or not 0 < keep <= 1:
            raise AccelError(f"keeps holds {keep!r}; a keep is a fraction in (0, 1]")
    blocks = config["blocks"]
    if blocks is not None and (not isinstance(blocks, Sequence) or not blocks):
        raise AccelError(f"blocks is {blocks!r}; it is a list of pairs, as in blocks=[[128,64]]")
    blocks = BLOCKS[kind] if blocks is None else tuple(check_block(block) for block in blocks)
    if "antidiagonal" in kernels and any(size % config["stride"] for b in blocks for size in b):
        raise AccelError(f"stride is {config['stride']}; it must divide the sizes of {blocks}")
    return BenchSettings(
        device=device,
        kernels=kernels,
        cases=_cases(config, kind),
        backends=_chosen("backends", config, BACKENDS[kind]),
        precisions=_chosen("precisions", config, PRECISIONS[kind]),
        blocks=blocks,
        keeps=tuple(sorted((float(keep) for keep in keeps), reverse=True)),
        rows=_chosen("rows", config, ROWS),
        stride=config["stride"],
        rounds=config["rounds"],
        warm_up_ms=float(config["warm_up_ms"]),
        sample_ms=float(config["sample_ms"]),
        limit_s=float(config["limit_s"]),
        checked_rows=config["checked_rows"],
    )


def _chosen(name: str, config: Mapping[str, Any], known: Sequence[str]) -> tuple[str, ...]:
    """The words of a setting, one or a list; all that are known where nothing is given."""
    value = config[name]
    if value is None:
        return tuple(known)
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, Sequence) or not words:
        raise AccelError(f"{name} is {value!r}; it is a word or a list of words of {list(known)}")
    for word in words:
        if word not in known:
            raise AccelError(f"{name} {word!r} is unknown here; {nearest(str(word), known)}")
    return tuple(dict.fromkeys(words))


def _cases(config: Mapping[str, Any], kind: str) -> tuple[Case, ...]:
    """Every shape in each of its dtypes, or in those that `dtype` asks for instead."""
    shapes = config.get("shapes")
    if isinstance(shapes, Mapping) and set(shapes) == set(BACKENDS):
        shapes = shapes[kind]  # what `shapes=auto` means on this device
    if not isinstance(shapes, Mapping) or not shapes:
        raise AccelError(
            f"shapes is {shapes!r}; choose a group as in shapes=real, or give one of your own:"
            " shapes=none '+shapes.mine={heads: 8, tokens: 4096, dim: 64}'"
        )
    cases = []
    for shape, given in shapes.items():
        if not isinstance(given, Mapping):
            raise AccelError(f"shapes.{shape} is {given!r}; it is a table with {', '.join(SIZES)}")
        for name in given:
            if name not in (*SIZES, "batch", "dtypes"):
                known = (*SIZES, "batch", "dtypes")
                raise AccelError(f"shapes.{shape}.{name} is unknown; {nearest(str(name), known)}")
        sizes = {"batch": 1, **given}
        for name in ("batch", *SIZES):
            check_whole(f"shapes.{shape}.{name}", sizes.get(name), 1)
        if sizes["dim"] > 256:
            raise AccelError(f"shapes.{shape}.dim is {sizes['dim']}; kernels take at most 256")
        own = {"dtype": given.get("dtypes", "bfloat16")}
        dtypes = _chosen("dtype", own if config["dtype"] is None else config, tuple(DTYPES))
        cases += [
            Case(shape=str(shape), dtype=dtype, **{n: sizes[n] for n in ("batch", *SIZES)})
            for dtype in dtypes
        ]
    return tuple(cases)
