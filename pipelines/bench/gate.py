"""The check that comes before every time: a result against the float64 truth on sampled rows.

A kernel may be at most twice as far from the truth as the naive computation in the precision that
it was allowed, plus 1e-5 (the rule of flash-attention's tests). Where it was allowed 8 bits, the
limit is a stated one: there is no naive computation to compare it with.
"""

from collections.abc import Callable
from functools import cached_property, partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from accel.kernels.block_mask import BlockMask
from accel.kernels.pooling import TAYLOR_GROUP
from accel.pipelines.bench.inputs import Inputs

# relative L2 errors; rounding normal q and k to 8 bits costs about 0.013, P and V to e4m3 0.04
STATED = {"int8": 0.05, "fp8": 0.1}
# rows of query blocks whose mass is computed exactly, in every head
CHECKED_BLOCKS = 3


def sampled(total: int, count: int) -> Int[Tensor, " places"]:
    """`count` places of `total`, ascending, or all; among them the last, which may be ragged."""
    places = torch.randperm(total - 1, generator=torch.Generator().manual_seed(2))
    return torch.cat([places[: count - 1], torch.tensor([total - 1])]).sort().values


def attention_rows(
    inputs: Inputs,
    rows: Int[Tensor, " rows"],
    mask: BlockMask | None,
    dtype: torch.dtype,
    *,
    order: Int[Tensor, "heads tokens"] | None = None,
    rest: str = "drop",
) -> Float[Tensor, "batch heads rows dim"]:
    """`softmax(q kT / sqrt(dim)) v` of some query rows, computed naively in `dtype`, head by head;
    in float64 it is the truth. Every key where there is no mask; order and rest are those of
    `sparse_attention`.
    """
    q, k, v = inputs
    out = q.new_empty(*q.shape[:2], len(rows), q.shape[3], dtype=torch.float64)
    keep = None if mask is None else mask.to_dense()
    places = torch.arange(q.shape[2], device=q.device)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            taken = places if order is None else order[h]
            queries = q[b, h, rows].to(dtype) * q.shape[3] ** -0.5
            keys, values = (x[b, h, taken].to(dtype) for x in (k, v))
            if mask is None or keep is None:
                out[b, h] = (queries @ keys.mT).softmax(-1) @ values
                continue
            own = keep[b % keep.shape[0], h]
            kept = own[taken.argsort()[rows] // mask.block[0]]
            out[b, h] = _masked_rows(queries, keys, values, kept, ~own.all(0), mask.block[1], rest)
    return out


def _masked_rows(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    kept: Tensor,
    left_out: Tensor,
    block: int,
    rest: str,
) -> Tensor:
    """Rows of one head. kept: blocks of keys, by row; left_out: those that some row does without;
    queries are scaled.
    """
    logits = queries @ keys.mT
    logits = logits.masked_fill(~kept.repeat_interleave(block, 1)[:, : len(keys)], -torch.inf)
    if rest == "drop":
        return logits.softmax(-1) @ values
    counts = torch.tensor([len(x) for x in keys.split(block)], device=keys.device)
    means = [torch.stack([x.mean(0) for x in some.split(block)]) for some in (keys, values)]
    pooled = queries @ means[0].mT + counts.to(keys.dtype).log()
    weights = torch.cat([logits, pooled.masked_fill(kept, -torch.inf)], 1).softmax(-1)
    out = weights @ torch.cat([values, means[1]])
    if rest == "taylor":
        per_token = weights[:, len(keys) :] / counts
        deviation = keys - means[0].repeat_interleave(counts, 0)
        # a slope for every group of blocks: the mean over those of it that are left out
        for first in range(0, len(counts), TAYLOR_GROUP):
            group = slice(first, first + TAYLOR_GROUP)
            tokens = slice(first * block, (first + TAYLOR_GROUP) * block)
            stands_in = left_out[group].repeat_interleave(counts[group])[:, None]
            slope = (deviation[tokens] * stands_in).mT @ values[tokens]
            slope /= left_out[group].sum().clamp(min=1)
            out = out + per_token[:, group].sum(1, keepdim=True) * (queries @ slope)
    return out


def mass_rows(
    inputs: Inputs,
    block: tuple[int, int],
    stride: int,
    rows: Int[Tensor, " rows"],
    dtype: torch.dtype,
) -> Float[Tensor, "batch heads rows kv_blocks"]:
    """Softmax mass of every key block in some rows of query blocks, computed naively in `dtype`.

    Of the map of cells of `stride` tokens that `antidiagonal_scores` defines; stride 1 is the
    attention map itself. A last cell with fewer tokens repeats them, and weighs less.
    """
    q, k, _ = inputs
    starts = torch.arange(0, q.shape[2], stride, device=q.device)[:, None]
    counts = (q.shape[2] - starts).clamp(max=stride)
    cells = starts + torch.arange(stride, device=q.device) % counts
    weights = (counts[:, 0] / stride).to(dtype)
    q_cells, kv_cells = (size // stride for size in block)
    found = []
    for row in rows.tolist():
        some = slice(row * q_cells, (row + 1) * q_cells)
        for b in range(q.shape[0]):
            for h in range(q.shape[1]):
                queries = q[b, h, cells[some].flip(1)].flatten(1).to(dtype)
                keys = k[b, h, cells].flatten(1).to(dtype)
                scale = q.shape[3] ** -0.5 / stride
                p = (scale * queries @ keys.mT + weights.log()).softmax(-1) * weights[some, None]
                sums = p.double().sum(0).split(kv_cells)
                found.append(torch.stack([part.sum() for part in sums]))
    return torch.stack(found).view(len(rows), *q.shape[:2], -1).movedim(0, 2)


def relative_error(found: Tensor, truth: Tensor) -> float:
    """`|found - truth| / |truth|` in the L2 norm."""
    if found.shape != truth.shape:
        raise ValueError(f"the result is {tuple(found.shape)}, not {tuple(truth.shape)}")
    return float((found.double() - truth).norm() / truth.norm())


class Gate:
    """Checks what one job gives for its first inputs.

    compute: the sampled part of the result, computed naively in a dtype; pick: that part of a
    result; dtype: that of the inputs.
    """

    def __init__(
        self,
        compute: Callable[[torch.dtype], Tensor],
        pick: Callable[[Tensor], Tensor],
        dtype: torch.dtype,
    ) -> None:
        self._compute, self._pick, self._dtype = compute, pick, dtype
        self._naive: dict[torch.dtype, float] = {}

    @cached_property
    def truth(self) -> Tensor:
        return self._compute(torch.float64)

    def error(self, result: Tensor) -> float:
        """How far a result is from the truth; NaN where it holds one."""
        return relative_error(self._pick(result), self.truth)

    def limit(self, precision: str) -> float:
        """The largest error that passes."""
        if precision in STATED:
            return STATED[precision]
        dtype = self._dtype
        if precision == "half" and dtype == torch.float32:
            dtype = torch.bfloat16
        if dtype not in self._naive:
            self._naive[dtype] = relative_error(self._compute(dtype), self.truth)
        return 2 * self._naive[dtype] + 1e-5


def attention_gate(
    inputs: Inputs,
    mask: BlockMask | None,
    rows: int,
    *,
    order: Int[Tensor, "heads tokens"] | None = None,
    rest: str = "drop",
) -> Gate:
    """Checks attention on so many query rows of every head."""
    q = inputs[0]
    places = sampled(q.shape[2], rows).to(q.device)
    compute = partial(attention_rows, inputs, places, mask, order=order, rest=rest)
    return Gate(compute, lambda out: out[:, :, places], q.dtype)


def mass_gate(inputs: Inputs, block: tuple[int, int], stride: int = 1) -> Gate:
    """Checks the mass of all key blocks in some rows of query blocks of every head."""
    q = inputs[0]
    places = sampled(-(-q.shape[2] // block[0]), CHECKED_BLOCKS).to(q.device)
    return Gate(
        partial(mass_rows, inputs, block, stride, places), lambda mass: mass[:, :, places], q.dtype
    )
