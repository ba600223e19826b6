"""Mean queries against mean keys of blocks: the cheapest estimate (PISA, SpargeAttn, Jenga)."""

from dataclasses import dataclass
from math import inf

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from accel.estimators.contract import (
    ESTIMATORS,
    Call,
    Estimator,
    Selection,
    check_fraction,
    check_switch,
)
from accel.kernels.pooled_scores import pooled_scores
from accel.kind import register
from accel.ranking import top_blocks, top_mass

__all__ = ["Pooled", "PooledMass"]


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
        check_fraction(self, "keep")
        check_switch(self, "value_bias")

    def select_in(self, call: Call) -> Selection:
        scores = pooled_scores(call.q, call.k, call.v, value_bias=self.value_bias, **call.settings)
        return Selection(top_blocks(scores, self.keep, call.blocking))


@register(ESTIMATORS, "pooled_mass")
@dataclass(frozen=True, slots=True)
class PooledMass(Estimator):
    """The fewest blocks that hold `tau` of the softmax over mean query . mean key, per row.

    The visual blocks compete among themselves, each with the weight of its valid tokens. `least`:
    at least that share of them is kept (Jenga, arXiv 2505.16864: the larger of a top-k and of what
    reaches a cumulative probability).

    similarity: SpargeAttn's test (arXiv 2502.18137) whether a mean speaks for its block: the mean
    cosine of all pairs of its tokens, which is `|mean of x / |x||^2`. A key block at or below it
    is kept by all rows and takes no part in the softmax; a query block at or below it keeps all
    blocks. None for no test.
    """

    tau: int | float
    least: int | float = 0.0
    similarity: int | float | None = None

    def __post_init__(self) -> None:
        check_fraction(self, "tau")
        if type(self.least) not in (int, float) or not 0 <= self.least <= 1:
            raise ValueError(f"least is a fraction in [0, 1], got {self.least!r}")
        object.__setattr__(self, "least", float(self.least))
        if self.similarity is not None:
            if type(self.similarity) not in (int, float) or not -1 <= self.similarity <= 1:
                raise ValueError(f"similarity is in [-1, 1] or None, got {self.similarity!r}")
            object.__setattr__(self, "similarity", float(self.similarity))

    @property
    def work(self) -> str:
        return self.kind if self.similarity is None else f"{self.kind}/similarity"

    def select_in(self, call: Call) -> Selection:
        rows, columns = call.blocking.block
        q, _ = call.means(call.q, rows)
        k, count = call.means(call.k, columns)
        scores = call.products(q, k) + count.log()[:, :, None]
        ranked = call.visual.expand_as(scores)
        forced = None
        if self.similarity is not None:
            odd_rows = _similarity(call, call.q, rows)[..., None] <= self.similarity
            odd_columns = _similarity(call, call.k, columns) <= self.similarity
            odd_columns = odd_columns.repeat_interleave(q.shape[1] // k.shape[1], 1)[:, :, None]
            ranked, forced = ranked & ~odd_columns, odd_rows | odd_columns
        # a row of which no block is ranked is NaN
        mass = scores.masked_fill(~ranked, -inf).softmax(-1).nan_to_num(0.0)
        keep = top_mass(mass.masked_fill(~ranked, -inf), self.tau, call.blocking, least=self.least)
        return Selection(call.settled(keep if forced is None else keep | forced))


def _similarity(call: Call, x: Tensor, size: int) -> Float[Tensor, "batch some_heads blocks"]:
    """Mean cosine of all pairs of a block's tokens, each with itself among them."""
    means, _ = call.means(normalize(x.float(), dim=-1), size)
    return means.square().sum(-1)
