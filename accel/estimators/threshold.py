"""A threshold on pooled scores that is known before they are (Sol-Attn)."""

from dataclasses import dataclass
from math import isfinite
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from accel.estimators.contract import ESTIMATORS, Call, Estimator, Selection
from accel.heads import by_key_head
from accel.kind import register

__all__ = ["Threshold"]


@register(ESTIMATORS, "threshold")
@dataclass(frozen=True, slots=True)
class Threshold(Estimator):
    """Blocks whose pooled score lies `tau` standard deviations above the mean of its row.

    Sol-Attn (arXiv 2607.24027). With `s` the scale and means over the visual key blocks j, block
    (i, j) is kept if `s q̄_i·k̄_j > mu_i + tau sigma_i` or if the key block overlaps the query block
    or adjoins it (`|i - j| <= 1` where both have one size):

        mu_i = s q̄_i·mean(k̄),  sigma_i^2 = s^2 sum_d q̄_id^2 var(k̄_d) + 1e-6     variance="diag"
                                sigma_i^2 = s^2 q̄_i^T cov(k̄) q̄_i + 1e-6          variance="exact"

    `diag` takes channels for independent and needs no product of the two sides. How many blocks a
    row keeps is what comes out: for a normal row `1 - Phi(tau)`, 16% at tau 1.
    """

    tau: int | float = 1.0
    variance: Literal["diag", "exact"] = "diag"

    def __post_init__(self) -> None:
        if type(self.tau) not in (int, float) or not isfinite(self.tau):
            raise ValueError(f"tau is a number of standard deviations, got {self.tau!r}")
        object.__setattr__(self, "tau", float(self.tau))
        if self.variance not in ("diag", "exact"):
            raise ValueError(f"variance is diag or exact, got {self.variance!r}")

    def select_in(self, call: Call) -> Selection:
        rows, columns = call.blocking.block
        q, _ = call.means(call.q, rows)
        k, _ = call.means(call.k, columns)
        scores, visual = call.products(q, k), call.visual
        mean = _mean(scores, visual)
        if self.variance == "exact":  # the variance of the row itself: q̄^T cov(k̄) q̄
            variance = _mean((scores - mean).square(), visual)
        else:
            by_channel = visual.mT  # [batch, 1, kv_blocks, 1]
            centre = _mean(k, by_channel, -2)
            spread = _mean((k - centre).square(), by_channel, -2)
            variance = call.scale**2 * by_key_head(q.square(), spread.mT)
        keep = scores > mean + self.tau * (variance + 1e-6).sqrt()
        near = _adjoining(q.shape[2], k.shape[2], call.blocking.block, q.device)
        return Selection(call.settled(keep | near))


def _mean(x: Float[Tensor, "*shape"], among: Bool[Tensor, "*mask"], dim: int = -1) -> Tensor:
    return x.where(among, 0.0).sum(dim, keepdim=True) / among.sum(dim, keepdim=True).clamp(min=1)


def _adjoining(
    q_blocks: int, kv_blocks: int, block: tuple[int, int], device: torch.device
) -> Bool[Tensor, "q_blocks kv_blocks"]:
    """Key blocks that share a token with the query block, or that begin or end where it does."""
    first_q = torch.arange(q_blocks, device=device)[:, None] * block[0]
    first_k = torch.arange(kv_blocks, device=device) * block[1]
    return (first_k <= first_q + block[0]) & (first_q <= first_k + block[1])
