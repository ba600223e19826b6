"""Prices from a data sheet, where nothing was measured: the roofline model.

A kernel takes

    max(operations / (peak * reached part), bytes / bandwidth) + launches * what a launch takes

(Williams, Waterman and Patterson, 2009). It ranks plans for a GPU on a machine without one; how far
it is off is not known, so everything made of it is marked uncalibrated.
"""

from dataclasses import dataclass, replace

from accel.baseline import Baseline
from accel.cost_table import KEEPS, CostTable, Price, Shape
from accel.estimators import Estimator
from accel.geometry import Geometry
from accel.hardware import Hardware
from accel.kernels.arguments import RESTS
from accel.kernels.pooling import TAYLOR_GROUP
from accel.origin import Origin

__all__ = ["Work", "roofline_baseline", "roofline_table", "seconds_of"]

SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}
INDEX_BYTES = 4
RECALL_ROWS = 64
# estimators of the true mass; without `every` they find the log-sum-exp of all rows
EXACT = ("block_mass", "adaptive_block_mass")


@dataclass(frozen=True, slots=True)
class Work:
    """What a kernel does. tensor_s: seconds of its products at the peak; bytes: that it moves."""

    tensor_s: int | float = 0.0
    bytes: int | float = 0.0
    launches: int = 1

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.tensor_s + other.tensor_s,
            self.bytes + other.bytes,
            self.launches + other.launches,
        )


def seconds_of(work: Work, hardware: Hardware, reached: float) -> float:
    """The roofline: as slow as products or memory make it, and the launches."""
    memory = work.bytes / (hardware.bandwidth_gb_s * 1e9)
    return max(work.tensor_s / reached, memory) + work.launches * hardware.launch_us * 1e-6


def roofline_table(
    shape: Shape, hardware: Hardware, estimators: tuple[Estimator, ...] = ()
) -> CostTable:
    """The table of a shape as the data sheet has it; of an estimator of unknown work, one whole
    product of queries and keys.
    """
    usual = seconds_of(_attention(shape, hardware, "full", 1.0), hardware, hardware.dense)

    def price(work: Work) -> Price:
        return Price.known(seconds_of(work, hardware, hardware.kernel) / usual)

    rows = {}
    for rest in RESTS:
        extra = _rest(shape, hardware, rest)
        natural = [_attention(shape, hardware, shape.precision, keep) + extra for keep in KEEPS]
        turned = _order(shape)
        rows[f"{rest}/natural"] = tuple(price(work) for work in natural)
        rows[f"{rest}/ordered"] = tuple(price(work + turned) for work in natural)
    selections = {e.work: _selection(e, shape, hardware) for e in estimators}
    q_blocks, kv_blocks = _blocks(shape)
    lists = shape.heads * q_blocks * kv_blocks * (1 + INDEX_BYTES)
    return CostTable(
        shape=shape,
        dense_ms=Price.known(1000 * usual),
        sparse=rows,
        select={work: price(done) for work, done in selections.items()},
        dense={
            word: price(_attention(shape, hardware, word, 1.0)) for word in ("full", "half")
        },
        again={
            work: price(Work(done.tensor_s / 2, done.bytes / 2))
            for work, done in selections.items()
            if work in EXACT
        },
        mask=price(Work(bytes=lists, launches=8)),
        recall=price(
            Work(
                2 * shape.heads * RECALL_ROWS * shape.tokens * shape.head_dim
                / hardware.rate("float32"),
                _tensor(shape, 1),
                launches=8 * shape.heads,
            )
        ),
        term=price(Work(bytes=q_blocks * kv_blocks, launches=16)),
        source="roofline",
        origin=Origin(device=hardware.name),
    )  # fmt: skip


def roofline_baseline(
    baseline: Baseline, geometry: Geometry, parameters: int, dtype: str, hardware: Hardware
) -> Baseline:
    """`baseline` as the data sheet has it; its layout, steps, branches and batch are kept.

    parameters: of the denoiser; every one is multiplied once with every token, which holds for the
    linear layers that nearly all of them are in. What is outside the steps counts as nothing: a
    text encoder and a decoder of latents are not looked at.
    """
    tokens = baseline.layout.length
    calls = baseline.steps * baseline.branches
    seconds = {}
    for site in geometry.sites:
        shape = Shape(
            tokens, site.heads, site.head_dim, dtype, "cuda", (128, 64), batch=baseline.batch
        )
        work = _attention(shape, hardware, "full", 1.0)
        seconds[site.name] = calls * seconds_of(work, hardware, hardware.dense)
    size = SIZES[dtype]
    # a layer reads its weights, and reads and writes tokens of some width; the former count
    linear = Work(
        2 * parameters * tokens * baseline.batch / hardware.rate(dtype),
        parameters * size,
        launches=32 * len(geometry.sites),
    )
    total = sum(seconds.values()) + calls * seconds_of(linear, hardware, hardware.linear)
    return replace(
        baseline,
        seconds=total,
        share={site: taken / total for site, taken in seconds.items()},
        denoiser=total,
        calibration=None,
        source="roofline",
    )


def _attention(shape: Shape, hardware: Hardware, precision: str, keep: float) -> Work:
    """Two products over the kept pairs; every query block reads its keys and values."""
    pairs = shape.batch * shape.heads * shape.tokens**2 * keep
    logits, values = _operands(shape.dtype, precision)
    product = 2 * pairs * shape.head_dim
    q_blocks, _ = _blocks(shape)
    # neighbouring blocks of a head find most of what they read in the cache of the chip
    lists = shape.heads * q_blocks * keep * (shape.tokens / shape.block[1]) * INDEX_BYTES
    return Work(
        product / hardware.rate(*logits) + product / hardware.rate(*values),
        _tensor(shape, 4) + lists,
    )


def _operands(dtype: str, precision: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Types of the operands of q k and of p v, the wanted one first (see `sparse_attention`)."""
    sixteen = "bfloat16" if dtype == "float32" else dtype
    if precision == "full":
        return (dtype,), (dtype,)
    if precision == "half":
        return (sixteen,), (sixteen,)
    return ("int8", sixteen), ("fp8", sixteen) if precision == "fp8" else (sixteen,)


def _rest(shape: Shape, hardware: Hardware, rest: str) -> Work:
    """Block means as keys and values of their own, and for `taylor` a slope for every group."""
    if rest == "drop":
        return Work(launches=0)
    _, kv_blocks = _blocks(shape)
    rate = hardware.rate(*_operands(shape.dtype, "half")[0])
    rows = shape.batch * shape.heads * shape.tokens
    means = Work(4 * rows * kv_blocks * shape.head_dim / rate, _tensor(shape, 2), launches=2)
    if rest == "mean":
        return means
    groups = -(-kv_blocks // TAYLOR_GROUP)
    # its slopes are made once of all keys and values, and each is applied to every query
    slopes = 2 * rows * shape.head_dim**2 * (1 + groups) / rate
    return means + Work(slopes, _tensor(shape, 2), launches=2)


def _order(shape: Shape) -> Work:
    """An order is read with the tokens, by the kernel itself."""
    return Work(bytes=2 * shape.heads * shape.tokens * INDEX_BYTES, launches=0)


def _selection(estimator: Estimator, shape: Shape, hardware: Hardware) -> Work:
    """Products of queries and keys: two of all tokens for exact masses, fewer for samples of the
    queries (`every`) and coarser maps (`stride`), one of block means, and the block scores.
    """
    rate = hardware.rate(*_operands(shape.dtype, shape.precision)[1][-1:])
    q_blocks, kv_blocks = _blocks(shape)
    heads = shape.batch * shape.heads
    pairs = float(heads * shape.tokens**2)
    if estimator.kind in EXACT:
        pairs = 2 * pairs / (getattr(estimator, "every", None) or 1)
    elif estimator.kind == "antidiagonal":
        pairs = pairs / getattr(estimator, "stride", 1)
    elif estimator.kind.startswith("pooled"):
        pairs = heads * q_blocks * kv_blocks
    scores = 4 * 4 * heads * q_blocks * kv_blocks
    return Work(2 * pairs * shape.head_dim / rate, _tensor(shape, 3) + scores, launches=12)


def _blocks(shape: Shape) -> tuple[int, int]:
    q_block, kv_block = shape.block
    return -(-shape.tokens // q_block), -(-shape.tokens // kv_block)


def _tensor(shape: Shape, number: int) -> float:
    """Bytes of so many tensors like q."""
    rows = shape.batch * shape.heads * shape.tokens
    return float(number * rows * shape.head_dim * SIZES[shape.dtype])
