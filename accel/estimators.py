"""Estimators: functions that look at this call's q and k and select the blocks to compute.

The common contract, whatever the estimator:

* q, k and v come in natural layout; blocks are those of `blocking`, in its order.
* Scores become blocks by the rules of `accel.ranking`: text is kept, padding never, every row with
  a valid query keeps at least one block.
* Scores are fp32: half-precision ties at the cut would favour one region.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from accel.blocking import Blocking
from accel.kernels.antidiagonal import antidiagonal_scores
from accel.kernels.arguments import check_tensors, valid_lengths
from accel.kernels.block_mass import block_mass
from accel.kernels.pooled_scores import pooled_scores
from accel.kernels.pooling import in_order
from accel.pattern import Kind, from_kind, register
from accel.ranking import (
    best_blocks,
    competing_blocks,
    recall_of,
    row_counts,
    settled,
    top_blocks,
    top_mass,
)

__all__ = [
    "ESTIMATORS",
    "AdaptiveBlockMass",
    "Antidiagonal",
    "BlockMassTopK",
    "Estimator",
    "Pooled",
    "Selection",
    "estimator_from_dict",
]


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """What an estimator found.

    keep: the blocks to compute. lse: the log-sum-exp of every query row in natural layout, to
    hand back at the next refresh. recall: share of softmax mass inside `keep`. The last two are
    None where the estimator does not measure them.
    """

    keep: Bool[Tensor, "batch heads q_blocks kv_blocks"]
    lse: Float[Tensor, "batch heads tokens"] | None = None
    recall: Float[Tensor, "batch heads"] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """One attention call, checked, with defaults filled in; tensors in natural layout."""

    q: Tensor
    k: Tensor
    v: Tensor
    blocking: Blocking
    scale: float
    lse: Tensor | None
    lengths: Tensor  # valid tokens: [batch]
    order: Tensor | None  # int64 [tokens]
    valid: Tensor  # which tokens are, in order: bool [batch, tokens]
    padded: bool  # whether some may not be

    @property
    def settings(self) -> dict[str, Any]:
        """What every estimator kernel asks for beside its tensors."""
        return {
            "block": self.blocking.block,
            "scale": self.scale,
            "kv_length": self.lengths,
            "order": self.order,
        }

    @property
    def columns(self) -> Tensor:
        """Key blocks that hold a valid token: bool `[batch, 1, 1, kv_blocks]`."""
        size = self.blocking.block[1]
        inside = torch.nn.functional.pad(self.valid, (0, -self.valid.shape[1] % size))
        return inside.unflatten(1, (-1, size)).any(2)[:, None, None]


ESTIMATORS: dict[str, type["Estimator"]] = {}


class Estimator(Kind):
    """A rule that selects blocks from q and k; the ones below are frozen dataclasses."""

    __slots__ = ()

    def select(
        self,
        q: Float[Tensor, "batch heads tokens dim"],
        k: Float[Tensor, "batch kv_heads tokens dim"],
        v: Float[Tensor, "batch kv_heads tokens dim"],
        *,
        blocking: Blocking,
        scale: float | None = None,
        kv_length: int | Int[Tensor, " batch"] | None = None,
        lse: Float[Tensor, "batch heads tokens"] | None = None,
    ) -> Selection:
        """The blocks of this call, per batch element and head.

        Natural tokens from `kv_length` on are padding, as are those of the layout. `scale` is
        `dim ** -0.5` unless given. An `lse` of an earlier step saves the estimators that weigh
        true mass a pass: the rows' normalisers hardly move between steps (AdaSpa).
        """
        check_tensors(q, k, v)
        layout = blocking.layout
        if q.shape[2] != layout.length or k.shape[2] != layout.length:
            raise ValueError(
                f"the layout has {layout.length} tokens, got q {tuple(q.shape)} and k "
                f"{tuple(k.shape)}"
            )
        lengths = valid_lengths(layout.length if kv_length is None else kv_length, k)
        if lengths is None:
            lengths = torch.full(q.shape[:1], layout.length, device=q.device)
        lengths = lengths.clamp(max=layout.valid_length)
        order = blocking.indices(q.device)
        places = torch.arange(layout.length, device=q.device) if order is None else order
        padded = kv_length is not None or layout.valid_length < layout.length
        valid = places < lengths[:, None]
        scale = q.shape[3] ** -0.5 if scale is None else scale
        with torch.no_grad():  # a choice of blocks has none
            call = _Call(q, k, v, blocking, scale, lse, lengths, order, valid, padded)
            return self._select(call)

    def check_block(self, block: tuple[int, int]) -> None:
        """Refuse, with a ValueError, blocks that this estimator cannot select."""

    @property
    def work(self) -> str:
        """Names what a selection takes: estimators that share it cost the same."""
        return self.kind

    def _select(self, call: _Call) -> Selection:
        raise NotImplementedError(f"{type(self).__name__} selects nothing")


def estimator_from_dict(data: Mapping) -> Estimator:
    """The estimator that `to_dict` wrote; unknown kinds, unknown keys and wrong types refused."""
    return from_kind(data, ESTIMATORS, "estimator")


def _check_fraction(estimator: Estimator, name: str) -> None:
    """Field `name` as a float in (0, 1]."""
    value = getattr(estimator, name)
    if type(value) not in (int, float) or not 0 < value <= 1:
        raise ValueError(f"{name} is a fraction in (0, 1], got {value!r}")
    object.__setattr__(estimator, name, float(value))


def _check_switch(estimator: Estimator, name: str) -> None:
    """Field `name` as a bool."""
    if type(getattr(estimator, name)) is not bool:
        raise ValueError(f"{name} is true or false, got {getattr(estimator, name)!r}")


def _mass(call: _Call, every: int | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Block mass, the same with invalid columns at -inf (to rank), and the LSE of the rows.

    every: of so many query rows one is looked at, and there is no LSE; all where there is padding.
    """
    if every is not None and not call.padded:
        q, k = (
            in_order(x, None if call.order is None else call.order[None]) for x in (call.q, call.k)
        )
        rows, columns = call.blocking.block
        mass, _ = block_mass(q[:, :, ::every], k, block=(rows // every, columns), scale=call.scale)
        return mass, mass, None
    mass, lse = block_mass(call.q, call.k, lse=call.lse, **call.settings)
    return mass, mass.masked_fill(~call.columns, -inf), lse


@register(ESTIMATORS, "block_mass")
@dataclass(frozen=True, slots=True)
class BlockMassTopK(Estimator):
    """The blocks of largest true softmax mass, `ceil(keep * n)` of the n visual ones per row.

    SparseD (arXiv 2509.24014), with the mass from two streamed passes instead of whole rows, and
    exact shares at ragged ends. `by_grid` ranks the columns of each grid apart, each with the
    same share: SparseD's isolated selection of prompt and answer, when both are grids. `every`: of
    so many neighbouring query rows one is looked at, which takes that part of the time; neighbours
    attend alike.
    """

    keep: int | float
    by_grid: bool = False
    every: int | None = None

    def __post_init__(self) -> None:
        _check_fraction(self, "keep")
        _check_switch(self, "by_grid")
        if self.every is not None and (type(self.every) is not int or self.every < 2):
            raise ValueError(f"every is a number of rows, at least 2, or None, got {self.every!r}")

    @property
    def work(self) -> str:
        return self.kind if self.every is None else f"{self.kind}/{self.every}"

    def check_block(self, block: tuple[int, int]) -> None:
        if self.every is not None and block[0] % self.every:
            raise ValueError(
                f"block {tuple(block)} has query rows that every={self.every} does not divide"
            )

    def _select(self, call: _Call) -> Selection:
        self.check_block(call.blocking.block)
        mass, scores, lse = _mass(call, self.every)
        if self.by_grid:
            keep = torch.zeros_like(scores, dtype=torch.bool)
            owner = call.blocking.grid_blocks(scores.device)
            for grid in range(len(call.blocking.layout.grids)):
                allowed = competing_blocks(scores, call.blocking) & (owner == grid)
                keep |= best_blocks(scores, allowed, row_counts(self.keep, allowed))
            keep = settled(keep, scores, call.blocking)
        else:
            keep = top_blocks(scores, self.keep, call.blocking)
        return Selection(keep, lse, recall_of(mass, keep))


@register(ESTIMATORS, "adaptive_block_mass")
@dataclass(frozen=True, slots=True)
class AdaptiveBlockMass(Estimator):
    """True mass, with a share per head: heads that need less give to heads that need more.

    AdaSpa (arXiv 2502.21079). Of the H heads of a batch element, n have a recall above
    `recall_target` at the base `keep` (n at most H // 2). The best n take keep / 2, the worst n
    3 keep / 2. Where the latter would exceed 1 both move by less, so the mean over the heads is
    that of `keep`, to the block.
    """

    keep: int | float
    recall_target: int | float = 0.8

    def __post_init__(self) -> None:
        _check_fraction(self, "keep")
        _check_fraction(self, "recall_target")

    def _select(self, call: _Call) -> Selection:
        mass, scores, lse = _mass(call)
        heads = mass.shape[1]
        recall = recall_of(mass, top_blocks(scores, self.keep, call.blocking))
        easy = (recall > self.recall_target).sum(1, keepdim=True).clamp(max=heads // 2)
        order = recall.argsort(dim=1, descending=True, stable=True)
        rank = order.argsort(1)
        turn = (rank >= heads - easy).long() - (rank < easy).long()
        allowed = competing_blocks(scores, call.blocking)
        base = row_counts(self.keep, allowed)
        step = torch.minimum(base // 2, allowed.sum(-1, keepdim=True) - base).clamp(min=0)
        keep = best_blocks(scores, allowed, base + turn[:, :, None, None] * step)
        keep = settled(keep, scores, call.blocking)
        return Selection(keep, lse, recall_of(mass, keep))


@register(ESTIMATORS, "antidiagonal")
@dataclass(frozen=True, slots=True)
class Antidiagonal(Estimator):
    """The fewest blocks per row that hold `tau` of an attention map `stride` times coarser.

    XAttention (arXiv 2503.16428): the map's cells are scored by their antidiagonals
    (`accel.kernels.antidiagonal`), block sums of its softmax ranked by `top_mass`. Any length;
    blocks are multiples of the stride.
    """

    tau: int | float
    stride: int = 8

    def __post_init__(self) -> None:
        _check_fraction(self, "tau")
        if type(self.stride) is not int or self.stride < 1:
            raise ValueError(f"stride is a number of tokens, at least 1, got {self.stride!r}")

    def check_block(self, block: tuple[int, int]) -> None:
        if any(size % self.stride for size in block):
            raise ValueError(
                f"block {tuple(block)} is not a multiple of the stride {self.stride}; take a stride"
                " that divides both sizes"
            )

    def _select(self, call: _Call) -> Selection:
        self.check_block(call.blocking.block)
        mass = antidiagonal_scores(call.q, call.k, stride=self.stride, **call.settings)
        mass = mass.masked_fill(~call.columns, -inf)
        return Selection(top_mass(mass, self.tau, call.blocking))


@register(ESTIMATORS, "pooled")
@dataclass(frozen=True, slots=True)
class Pooled(Estimator):
    """Mean query against mean key per block, `ceil(keep * n)` of the n visual blocks per row.

    PISA (arXiv 2602.01077): `accel.kernels.pooled_scores`. `value_bias` prefers the blocks whose
    mean would hurt most; it belongs to runs in which the blocks left out are stood in for (`rest`
    is `mean` or `taylor`).
    """

    keep: int | float
    value_bias: bool = True

    def __post_init__(self) -> None:
        _check_fraction(self, "keep")
        _check_switch(self, "value_bias")

    def _select(self, call: _Call) -> Selection:
        scores = pooled_scores(call.q, call.k, call.v, value_bias=self.value_bias, **call.settings)
        return Selection(top_blocks(scores, self.keep, call.blocking))
