"""What is lost where the mean key stands in for a block (SVG-EAR)."""

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from accel.estimators.contract import ESTIMATORS, Call, Estimator, Selection, check_fraction
from accel.kind import register
from accel.ranking import top_blocks

__all__ = ["Residual"]


@register(ESTIMATORS, "residual")
@dataclass(frozen=True, slots=True)
class Residual(Estimator):
    """Where exactness pays most per token, `ceil(keep * n)` of the n visual blocks per row.

    Error-aware routing of SVG-EAR (arXiv 2603.08982), for runs in which block means stand in for
    the rest: with the mean query of block i against every key, keeping block j is worth

        sum_{n in j} | exp(s q̄_i·k_n) - exp(s q̄_i·k̄_j) | / n_j

    that is, the error of the weights that its mean key makes, over the tokens it would cost. The
    method spends one budget over all rows; here rows keep equally many, as everywhere in accel.
    """

    keep: int | float

    def __post_init__(self) -> None:
        check_fraction(self, "keep")

    def select_in(self, call: Call) -> Selection:
        rows, columns = call.blocking.block
        q, _ = call.means(call.q, rows)
        k, count = call.means(call.k, columns)
        keys = call.ordered(call.k)
        group = q.shape[1] // keys.shape[1]
        valid = call.valid[:, None, None]
        scores = []
        for h in range(keys.shape[1]):  # one at a time: rows of logits over every key
            queries = q[:, h * group : (h + 1) * group]
            logits = call.products(queries, keys[:, h : h + 1]).masked_fill(~valid, -torch.inf)
            # a common factor of a row; of one without a valid key it only has to be finite
            peak = logits.amax(-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).min)
            weights = pad((logits - peak).exp_(), (0, -logits.shape[3] % columns))
            by_mean = (call.products(queries, k[:, h : h + 1]) - peak).exp_()
            inside = pad(valid, (0, -valid.shape[3] % columns)).unflatten(3, (-1, columns))
            wrong = (weights.unflatten(3, (-1, columns)) - by_mean[..., None]).abs() * inside
            scores.append(wrong.sum(4) / count[:, :, None])
        worth = torch.cat(scores, 1).masked_fill(~call.columns, -torch.inf)
        return Selection(top_blocks(worth, self.keep, call.blocking))
