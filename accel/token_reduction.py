"""Fewer tokens from block to block of a vision transformer: merged, or fused into one.

Token merging (ToMe; Bolya et al., ICLR 2023, arXiv 2210.09461) and inattentive-token fusion (EViT;
Liang et al., ICLR 2022, arXiv 2202.07800).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from accel.errors import PlanError, nearest
from accel.untrusted import table
from accel.window_keeps import checked_keeps

__all__ = ["METHODS", "SCORES", "TokenReduction"]

METHODS = ("merge", "fuse")
SCORES = ("class", "mass")


@dataclass(frozen=True, slots=True)
class TokenReduction:
    """How many tokens of the image are left behind each block.

    keeps: name of a block's attention (a site) -> share of the image's patch tokens that the block
        passes on, in (0, 1]; they do not grow with depth. A block that is not named passes on what
        it got. Class, distillation and register tokens stay in any case and are not counted.
    method: `merge`: bipartite soft matching by the keys of the block's attention; the most similar
        pairs become their mean, weighted by how many tokens each stands for; one block can at most
        halve the tokens. `fuse`: those with the least attention become one token, their mean
        weighted by it.
    score: of `fuse`, whose attention ranks the tokens: that of the `class` token, or of all queries
        (`mass`: column sums of the attention map, for models without a class token).
    proportional: keys count as many times as the tokens that they stand for (log size is added to
        logits).
    """

    keeps: Mapping[str, float]
    method: str = "merge"
    score: str = "class"
    proportional: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "keeps", checked_keeps("tokens.keeps", self.keeps))
        for name, known in (("method", METHODS), ("score", SCORES)):
            value = getattr(self, name)
            if value not in known:
                raise PlanError(f"tokens.{name} {value!r} is unknown; {nearest(str(value), known)}")
        if type(self.proportional) is not bool:
            raise PlanError(f"tokens.proportional is true or false, got {self.proportional!r}")

    def check(self, sites: Sequence[str]) -> None:
        """Refuse keeps that grow from block to block, or that one block cannot merge down to.

        sites: of all blocks, in their order.
        """
        before, where = 1.0, "the patches"
        for site in sites:
            keep = self.keeps.get(site, before)
            if keep > before:
                raise PlanError(
                    f"tokens.keeps[{site!r}] is {keep}, more than the {before} that {where} leave:"
                    f" tokens do not come back; give at most {before}"
                )
            if self.method == "merge" and keep < before / 2 - 1e-9:
                raise PlanError(
                    f"tokens.keeps[{site!r}] is {keep}, less than half of the {before} that {where}"
                    f" leave: one block merges pairs; give at least {before / 2}, or merge in"
                    " earlier blocks as well"
                )
            if site in self.keeps:
                before, where = keep, repr(site)

    def to_dict(self) -> dict[str, Any]:
        return {
            "keeps": dict(self.keeps),
            "method": self.method,
            "score": self.score,
            "proportional": self.proportional,
        }

    @classmethod
    def from_dict(cls, data: Any) -> "TokenReduction":
        """Read what `to_dict` wrote; every departure is a `PlanError` that names it."""
        return cls(**table("tokens", data, set(cls.__dataclass_fields__), {"keeps"}))
