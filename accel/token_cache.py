"""Which tokens a masked diffusion language model computes in a step, and which it remembers.

Every committed token changes the keys and values of all others, so each of these caches is an
approximation; they differ in which tokens are computed anew, and when. One value says it: the
published methods are settings of it (`accel.recipes`).
"""

from dataclasses import asdict, dataclass
from typing import Any

from accel.errors import PlanError, nearest
from accel.untrusted import finite, table

__all__ = ["FEEDS", "TokenCache"]

FEEDS = ("block", "suffix", "generated", "undecided")
EXTERNALS = ("attend", "frozen")
MAX = 1 << 20


@dataclass(frozen=True, slots=True)
class TokenCache:
    """Keys and values are kept from whole calls, so that the calls between feed fewer tokens.

    A group is `blocks` blocks of the decoding. Its first `delay + 1` steps are whole calls, which
    fill the cache. The steps after them feed some tokens, which see each other and what the cache
    holds. Steps are those that the decoding's quota asks for: where a rule commits more at once,
    some of a block's last ones are not taken, so that samples of a batch do not depend on others.

    feed: the tokens that calls between feed. `block`: the current one (Fast-dLLM's DualCache, arXiv
        2505.22618; Sparse-dLLM, arXiv 2508.02558). `suffix`: it and all that follow (Fast-dLLM's
        prefix cache). `generated`: everything after the prompt (dKV-Cache-Prefill, arXiv
        2505.15781). `undecided`: tokens that were masked before the last step, so that a token's
        keys are kept one step after it was committed (dKV-Cache-Decode).
    keep: share of the tokens outside `feed` that the cache holds, at every site those with the
        largest q̄·k, where q̄ is the mean of the block's queries; at least one. 1: all.
    pool: maximum over so many neighbours before tokens are ranked; odd, 1 for none.
    by_head: every key head ranks for itself; else one ranking for all heads of a site.
    delay: whole calls after the first, before what the cache holds is used.
    refresh: every so many steps of a group are whole calls, from its first on; None: only at its
        start. 1: every call is whole.
    blocks: blocks of a group; None: all of them are one. The first call of a block inside a group
        also feeds the block before it, whose last tokens were committed since.
    external: what fed tokens see of the cache. `attend`: its keys and values; `frozen`: what the
        whole call saw of them, its output and log-sum-exp, merged with what they see of each other
        (FlashBlock, arXiv 2602.05305).
    window: how many masked tokens after the block are computed at all; the last token stays.
        None: all of them. (DPad, arXiv 2508.14148; Streaming-dLLM.)
    """

    feed: str = "block"
    keep: float = 1.0
    pool: int = 1
    by_head: bool = False
    delay: int = 0
    refresh: int | None = None
    blocks: int | None = 1
    external: str = "attend"
    window: int | None = None

    def __post_init__(self) -> None:
        for name, known in (("feed", FEEDS), ("external", EXTERNALS)):
            value = getattr(self, name)
            if value not in known:
                raise PlanError(f"cache.{name} {value!r} is unknown; {nearest(str(value), known)}")
        if not finite(self.keep) or not 0 < self.keep <= 1:
            raise PlanError(f"cache.keep is a fraction in (0, 1], got {self.keep!r}")
        object.__setattr__(self, "keep", float(self.keep))
        if type(self.by_head) is not bool:
            raise PlanError(f"cache.by_head is true or false, got {self.by_head!r}")
        for name, least, none in (
            ("pool", 1, False),
            ("delay", 0, False),
            ("refresh", 1, True),
            ("blocks", 1, True),
            ("window", 0, True),
        ):
            value = getattr(self, name)
            if value is None and none:
                continue
            if type(value) is not int or not least <= value <= MAX:
                raise PlanError(f"cache.{name} is a whole number from {least}, got {value!r}")
        if self.pool % 2 == 0:
            raise PlanError(f"cache.pool is an odd number of neighbours, got {self.pool}")
        if self.external == "frozen" and (self.feed != "block" or self.blocks != 1):
            raise PlanError(
                "cache.external 'frozen' is what one block saw: it needs feed 'block' and blocks 1"
            )

    def whole(self, step: int) -> bool:
        """Whether step `step` (from 0) of a group is a whole call."""
        if step <= self.delay:
            return True
        return self.refresh is not None and step % self.refresh == 0

    @property
    def holds(self) -> bool:
        """Whether whole calls fill a cache: not where every call is whole."""
        return self.refresh != 1

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> "TokenCache":
        """Read what `to_dict` wrote; every departure is a `PlanError` that names it."""
        return cls(**table("cache", data, set(cls.__dataclass_fields__), set()))
