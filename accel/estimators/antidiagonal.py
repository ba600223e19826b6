"""Antidiagonal sums of the attention map's cells (XAttention)."""

from dataclasses import dataclass
from math import inf

from accel.estimators.contract import ESTIMATORS, Call, Estimator, Selection, check_fraction
from accel.kernels.antidiagonal import antidiagonal_scores
from accel.kind import register
from accel.ranking import top_mass

__all__ = ["Antidiagonal"]


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
        check_fraction(self, "tau")
        if type(self.stride) is not int or self.stride < 1:
            raise ValueError(f"stride is a number of tokens, at least 1, got {self.stride!r}")

    def check_block(self, block: tuple[int, int]) -> None:
        if any(size % self.stride for size in block):
            raise ValueError(
                f"block {tuple(block)} is not a multiple of the stride {self.stride}; take a stride"
                " that divides both sizes"
            )

    def select_in(self, call: Call) -> Selection:
        self.check_block(call.blocking.block)
        mass = antidiagonal_scores(call.q, call.k, stride=self.stride, **call.settings)
        mass = mass.masked_fill(~call.columns, -inf)
        return Selection(top_mass(mass, self.tau, call.blocking))
