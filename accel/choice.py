"""What one head does in one band of the schedule."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

import accel.pattern_tiles  # noqa: F401  registers its kind
from accel.errors import PlanError, nearest
from accel.estimators import ESTIMATORS, Call, Estimator, Selection, estimator_from_dict
from accel.heads import of_heads
from accel.kernels.arguments import RESTS
from accel.kind import each, register
from accel.order import parse_order
from accel.pattern import PATTERNS, Full, Identity, Pattern, Share, known_mask, pattern_from_dict
from accel.pattern_blocks import block_sets
from accel.sampled import SampledRows
from accel.untrusted import table, typed

MAX_OPTIONS = 16
MAX_ROWS = 4096
# fp32 logits of sampled rows held at a time: 64 MiB
CHUNK_LOGITS = 1 << 24


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
        order = parse_order(self.order).name
        if self.rest not in RESTS:
            raise PlanError(f"rest {self.rest!r} is unknown; {nearest(str(self.rest), RESTS)}")
        for found in block_sets(self.select):
            if found.order != order:
                raise PlanError(
                    f"a choice in order {order!r} selects blocks that were found in order"
                    f" {found.order!r}; give it that order"
                )
        own_order = isinstance(self.select, Estimator) and not self.select.in_one_order
        if own_order and (self.order, self.rest) != ("thw", "drop"):
            raise PlanError(
                f"a choice of {self.select.kind} has no order or rest of its own, got"
                f" {self.order!r} and {self.rest!r}; give them to its options"
            )

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


@register(ESTIMATORS, "alternatives")
@dataclass(frozen=True, slots=True)
class Alternatives(Estimator):
    """For every head the one of `options` whose output is nearest to that of dense attention.

    Sparse VideoGen (arXiv 2502.01776) decides so between its spatial and its temporal heads: the
    squared error on `rows` query rows, evenly spaced, summed over the batch; the first option where
    two are equal. Options have orders and rests of their own, and one of them is taken with both,
    so blocks that are selected are in the order of the option (`Selection.taken`).
    """

    options: tuple[Choice, ...]
    rows: int = 64
    readers: ClassVar = {"options": lambda options: each(Choice.from_dict, options)}
    in_one_order: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", tuple(self.options))
        if any(not isinstance(option, Choice) for option in self.options):
            raise ValueError(f"options are choices, got {self.options!r:.200}")
        if not 2 <= len(set(self.options)) == len(self.options) <= MAX_OPTIONS:
            raise ValueError(
                f"alternatives are 2 to {MAX_OPTIONS} different options, got {len(self.options)}"
            )
        for option in self.options:
            if isinstance(option.select, Alternatives | Identity | Share):
                raise ValueError(
                    f"{option.select.kind} cannot be an option: options are blocks to compute"
                )
        if type(self.rows) is not int or not 1 <= self.rows <= MAX_ROWS:
            raise ValueError(f"rows is a number from 1 to {MAX_ROWS}, got {self.rows!r}")

    @property
    def keep(self) -> float | None:
        """The share of blocks where all options ask for the same one; else only the call tells."""
        keeps = {getattr(option.select, "keep", None) for option in self.options}
        return keeps.pop() if len(keeps) == 1 else None

    @property
    def work(self) -> str:
        online = [o.select.work for o in self.options if isinstance(o.select, Estimator)]
        patterns = [self.kind] * (len(self.options) - len(online))
        return f"{'+'.join([*patterns, *sorted(online)])}/{self.rows}"

    @property
    def by_head(self) -> bool:
        selects = (option.select for option in self.options)
        return all(select.by_head for select in selects if isinstance(select, Estimator))

    @property
    def name(self) -> str:
        return f"{self.kind}({' | '.join(option.name for option in self.options)})"

    def to_dict(self) -> dict[str, Any]:
        options = [option.to_dict() for option in self.options]
        return {"kind": self.kind, "options": options, "rows": self.rows}

    def check_block(self, block: tuple[int, int]) -> None:
        for option in self.options:
            if isinstance(option.select, Estimator):
                option.select.check_block(block)

    def select_in(self, call: Call) -> Selection:
        batch, heads, tokens, _ = call.q.shape
        calls, keeps, lse = [], [], call.lse
        scores: dict[str, dict[str, Any]] = {}  # by order, as they are of its blocks
        for option in self.options:
            blocking = replace(call.blocking, order=option.order)
            found_before = scores.setdefault(option.order, {})
            own = replace(call, blocking=blocking, lse=lse, scores=found_before)
            if isinstance(option.select, Estimator):
                found = option.select.select_in(own)
                lse = found.lse if lse is None else lse
                keep = found.keep
            else:
                keep = known_mask(option.select, own.blocking, call.q.device, call.patterns)
                keep = keep.expand(batch, heads, -1, -1) & own.columns
            calls.append(own)
            keeps.append(keep)
        some = max(1, CHUNK_LOGITS // (batch * min(self.rows, tokens) * tokens))
        groups = [list(range(heads))[first : first + some] for first in range(0, heads, some)]
        taken = torch.cat([self._errors(calls, keeps, group) for group in groups], 1).argmin(0)
        keep = torch.stack(keeps)[taken, :, torch.arange(heads, device=taken.device)]
        return Selection(keep.transpose(0, 1), lse, taken=tuple(taken.tolist()))

    def _errors(
        self, calls: list[Call], keeps: list[Tensor], group: list[int]
    ) -> Float[Tensor, "options some_heads"]:
        """Squared error of the sampled outputs of some heads; rows of padding do not count."""
        call = calls[0]
        some = SampledRows.of(
            *(of_heads(x, group, call.q.shape[1]) for x in (call.q, call.k, call.v)),
            layout=call.blocking.layout,
            rows=self.rows,
            scale=call.scale,
            lengths=call.lengths,
        )
        exact, padding = some.exact, (some.rows >= call.lengths[:, None])[:, None, :, None]
        errors = []
        for option, own, keep in zip(self.options, calls, keeps, strict=True):
            wrong = some.output(keep[:, group], own.blocking, option.rest) - exact
            errors.append(wrong.masked_fill(padding, 0.0).square().sum((0, 2, 3)))
        return torch.stack(errors)


def guard(read: Any, value: Any) -> Any:
    """Bad parameters of a pattern, estimator or order are errors of the plan that has them."""
    try:
        return read(value)
    except PlanError:
        raise
    except (TypeError, ValueError, KeyError) as error:
        raise PlanError(f"{error!s:.500}") from error
