"""What one head does in one band of the schedule."""

from dataclasses import dataclass
from typing import Any

from accel.errors import PlanError, nearest
from accel.estimators import ESTIMATORS, Estimator, estimator_from_dict
from accel.kernels.arguments import RESTS
from accel.order import parse_order
from accel.pattern import PATTERNS, Full, Pattern, pattern_from_dict
from accel.untrusted import table, typed


@dataclass(frozen=True, slots=True)
class Choice:
    """What one head does in one band: how its blocks are selected, in which order, and the rest.

    select: a pattern (known before the run) or an estimator (looks at q and k at refresh points).
    order: name of the token order the selection lives in; rest: what stands in for the blocks
    that are not kept.
    """

    select: Pattern | Estimator
    order: str = "thw"
    rest: str = "drop"

    def __post_init__(self) -> None:
        parse_order(self.order)
        if self.rest not in RESTS:
            raise PlanError(f"rest {self.rest!r} is unknown; {nearest(str(self.rest), RESTS)}")

    @property
    def dense(self) -> bool:
        return isinstance(self.select, Full)

    @property
    def online(self) -> bool:
        """Whether the selection looks at q and k."""
        return isinstance(self.select, Estimator)

    @property
    def name(self) -> str:
        parts = [self.select.name]
        if self.order != "thw":
            parts.append(self.order)
        if self.rest != "drop":
            parts.append(self.rest)
        return " ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        return {"select": self.select.to_dict(), "order": self.order, "rest": self.rest}

    @classmethod
    def from_dict(cls, data: Any) -> "Choice":
        data = table("a choice", data, {"select", "order", "rest"}, {"select"})
        select = table("select", data["select"], None, {"kind"})
        kind = typed("select kind", select["kind"], str)
        if kind in PATTERNS:
            chosen: Pattern | Estimator = guard(pattern_from_dict, select)
        elif kind in ESTIMATORS:
            chosen = guard(estimator_from_dict, select)
        else:
            known = [*PATTERNS, *ESTIMATORS]
            raise PlanError(f"select kind {kind!r} is unknown; {nearest(str(kind), known)}")
        order = typed("choice.order", data.get("order", "thw"), str)
        rest = typed("choice.rest", data.get("rest", "drop"), str)
        return cls(chosen, guard(lambda o: parse_order(o) and o, order), rest)


DENSE = Choice(Full())


def guard(read: Any, value: Any) -> Any:
    """Bad parameters of a pattern, estimator or order are errors of the plan that has them."""
    try:
        return read(value)
    except PlanError:
        raise
    except (TypeError, ValueError, KeyError) as error:
        raise PlanError(f"{error!s:.500}") from error
