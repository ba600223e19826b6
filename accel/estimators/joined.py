"""An estimator and a pattern together."""

from dataclasses import dataclass, replace
from typing import ClassVar

from accel.estimators.contract import (
    ESTIMATORS,
    Call,
    Estimator,
    Selection,
    estimator_from_dict,
)
from accel.kind import register
from accel.pattern import Pattern, Skip, known_mask, pattern_from_dict

__all__ = ["Joined"]


@register(ESTIMATORS, "joined")
@dataclass(frozen=True, slots=True)
class Joined(Estimator):
    """What `estimator` selects and, beside it, what `pattern` keeps.

    Jenga's pooled selection with the neighbours in space and time (arXiv 2505.16864), lines with a
    band, any selection with a sink of first frames. Several patterns are a `Union`. How many blocks
    that makes only the call can tell.
    """

    estimator: Estimator
    pattern: Pattern
    readers: ClassVar = {"estimator": estimator_from_dict, "pattern": pattern_from_dict}

    def __post_init__(self) -> None:
        if not isinstance(self.estimator, Estimator) or isinstance(self.estimator, Joined):
            raise ValueError(
                f"joined needs an estimator that is not itself joined, got {self.estimator!r};"
                " several patterns are a union"
            )
        if not self.estimator.in_one_order:
            raise ValueError(
                f"{self.estimator.kind} selects in several orders; join a pattern to its options"
            )
        if not isinstance(self.pattern, Pattern) or isinstance(self.pattern, Skip):
            raise ValueError(f"joined needs a pattern that keeps blocks, got {self.pattern!r}")

    @property
    def work(self) -> str:
        return self.estimator.work  # the pattern's blocks are made once

    @property
    def by_head(self) -> bool:
        return self.estimator.by_head

    @property
    def name(self) -> str:
        return f"{self.kind}({self.estimator.name},{self.pattern.name})"

    def to_dict(self) -> dict:
        parts = {"estimator": self.estimator.to_dict(), "pattern": self.pattern.to_dict()}
        return {"kind": self.kind, **parts}

    def check_block(self, block: tuple[int, int]) -> None:
        self.estimator.check_block(block)

    def select_in(self, call: Call) -> Selection:
        found = self.estimator.select_in(call)
        kept = known_mask(self.pattern, call.blocking, call.q.device, call.patterns)
        return replace(found, keep=call.settled(found.keep | kept), recall=None)
