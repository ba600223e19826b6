"""How a masked diffusion language model commits tokens: the part of a plan that samplers read."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import inf
from typing import Any

from accel.errors import PlanError, nearest
from accel.untrusted import finite, table

__all__ = ["CONFIDENCES", "RULES", "Decoding"]

CONFIDENCES = ("probability", "margin", "entropy", "random")
# what a rule's bound is, where it has one: (least, greatest), or (least, none)
RULES: Mapping[str, tuple[float, float] | None] = {
    "quota": None,
    "threshold": (0.0, 1.0),
    "threshold_or_quota": (0.0, 1.0),
    "factor": (0.0, inf),
    "entropy_bound": (0.0, inf),
}
# the confidences that a rule with a bound speaks of
SPEAKS_OF: Mapping[str, tuple[str, ...]] = {
    "threshold": ("probability", "margin"),
    "threshold_or_quota": ("probability", "margin"),
    "factor": ("probability",),
    "entropy_bound": ("entropy",),
}
MAX_TOKENS = 1 << 20


@dataclass(frozen=True, slots=True)
class Decoding:
    """Blocks that are filled from left to right, and how many tokens every step commits.

    block_length: tokens of a block (semi-autoregressive, LLaDA); the last one is whatever is left;
        None: all generated tokens are one block.
    tokens_per_step: the quota: so many of a block's tokens are committed in a step (LLaDA's steps
        are gen_length / tokens_per_step).
    confidence: what ranks candidates. `probability` of the candidate (LLaDA's low_confidence,
        Dream's maskgit_plus); `margin` between the two likeliest (topk_margin); `entropy`, the
        negative entropy; `random` (origin).
    rule: `quota`; `threshold`, all whose confidence is at least `bound`, and always the best
        (Fast-dLLM, arXiv 2505.22618); `threshold_or_quota`, those above it if they are as many as
        the quota, else the quota (SDAR, LLaDA2); `factor`, the most n with (n + 1)(1 - c_n) < bound
        where c_n is the n-th best (Fast-dLLM); `entropy_bound`, the most whose entropies sum to at
        most bound plus the largest of them (arXiv 2505.24857).
    bound: the number of the rule; None for `quota`.
    stop_at_eos: a sample whose finished blocks hold an end-of-text token is not gone on with: what
        follows is filled with that token.
    """

    block_length: int | None = 32
    tokens_per_step: int = 1
    confidence: str = "probability"
    rule: str = "quota"
    bound: float | None = None
    stop_at_eos: bool = False

    def __post_init__(self) -> None:
        for name in ("block_length", "tokens_per_step"):
            value = getattr(self, name)
            if name == "block_length" and value is None:
                continue
            if type(value) is not int or not 1 <= value <= MAX_TOKENS:
                raise PlanError(
                    f"decoding.{name} is a number of tokens from 1 to {MAX_TOKENS}, got {value!r}"
                )
        for name, known in (("confidence", CONFIDENCES), ("rule", tuple(RULES))):
            value = getattr(self, name)
            if value not in known:
                raise PlanError(
                    f"decoding.{name} {value!r} is unknown; {nearest(str(value), known)}"
                )
        if type(self.stop_at_eos) is not bool:
            raise PlanError(f"decoding.stop_at_eos is true or false, got {self.stop_at_eos!r}")
        limits = RULES[self.rule]
        if limits is None:
            if self.bound is not None:
                raise PlanError(f"decoding.rule 'quota' has no bound, got {self.bound!r}")
            return
        least, greatest = limits
        if self.bound is None or not finite(self.bound) or not least <= self.bound <= greatest:
            span = f"from {least:g} to {greatest:g}" if greatest < inf else f"of at least {least:g}"
            raise PlanError(
                f"decoding.bound is a number {span} for rule {self.rule!r}, got {self.bound!r}"
            )
        if self.confidence not in SPEAKS_OF[self.rule]:
            meant = " or ".join(SPEAKS_OF[self.rule])
            raise PlanError(
                f"decoding.rule {self.rule!r} needs confidence {meant}, got {self.confidence!r}"
            )
        object.__setattr__(self, "bound", float(self.bound))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> "Decoding":
        """Read what `to_dict` wrote; every departure is a `PlanError` that names it."""
        known = set(cls.__dataclass_fields__)
        return cls(**table("decoding", data, known, set()))
