"""True softmax mass of blocks, from streamed passes over q and k."""

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from accel.estimators.contract import (
    ESTIMATORS,
    Call,
    Estimator,
    Selection,
    check_fraction,
    check_switch,
)
from accel.kernels.block_mass import block_mass
from accel.kernels.pooling import in_order
from accel.kind import register
from accel.ranking import (
    best_blocks,
    competing_blocks,
    recall_of,
    row_counts,
    settled,
    top_blocks,
)

__all__ = ["AdaptiveBlockMass", "BlockMassTopK"]


def _mass(call: Call, every: int | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
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
        check_fraction(self, "keep")
        check_switch(self, "by_grid")
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

    def select_in(self, call: Call) -> Selection:
        self.check_block(call.blocking.block)
        if self.work not in call.scores:
            call.scores[self.work] = _mass(call, self.every)
        mass, scores, lse = call.scores[self.work]
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
        check_fraction(self, "keep")
        check_fraction(self, "recall_target")

    @property
    def by_head(self) -> bool:
        return False

    def select_in(self, call: Call) -> Selection:
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
