"""Key blocks that many queries attend to: the vertical lines of an attention map."""

from dataclasses import dataclass
from math import inf

import torch
from torch.nn.functional import pad

from accel.estimators.contract import ESTIMATORS, Call, Estimator, Selection, check_fraction
from accel.kernels.column_sums import column_sums
from accel.kernels.pooling import in_order
from accel.kind import register
from accel.ranking import top_blocks

__all__ = ["ColumnMass"]


@register(ESTIMATORS, "column_mass")
@dataclass(frozen=True, slots=True)
class ColumnMass(Estimator):
    """The same `ceil(keep * n)` of the n visual key blocks for all rows: the heaviest columns.

    The vertical lines of MInference (arXiv 2407.02490), by the softmax mass that `queries` rows
    give them, evenly spaced over the valid tokens; and in an order that brings the lines of a grid
    together, those of MMInference's grid heads (arXiv 2504.16083). The last 64 rows, which these
    take, see all keys of a causal model; here every row does.
    """

    keep: int | float
    queries: int = 64

    def __post_init__(self) -> None:
        check_fraction(self, "keep")
        if type(self.queries) is not int or self.queries < 1:
            raise ValueError(f"queries is a number of rows, at least 1, got {self.queries!r}")

    @property
    def work(self) -> str:
        return f"{self.kind}/{self.queries}"

    def select_in(self, call: Call) -> Selection:
        columns = call.blocking.block[1]
        tokens = call.q.shape[2]
        if self.queries < tokens:
            # of every batch element over its own length
            turn = torch.arange(self.queries, device=call.q.device)
            last = (call.lengths.long() - 1).clamp(min=0)[:, None]
            places = turn * last // max(1, self.queries - 1)
            seen = call.q.take_along_dim(places[:, None, :, None], 2)
        else:
            seen = call.q
        mass = column_sums(seen, call.k, scale=call.scale, kv_length=call.lengths)
        mass = in_order(mass[..., None], None if call.order is None else call.order[None])[..., 0]
        mass = pad(mass, (0, -tokens % columns)).unflatten(2, (-1, columns)).sum(3)
        scores = mass[:, :, None].masked_fill(~call.columns, -inf)
        scores = scores.expand(-1, -1, call.blocking.q_blocks, -1)
        return Selection(top_blocks(scores, self.keep, call.blocking))
