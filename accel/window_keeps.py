"""Window pruning: which share of its windows each block of a windowed vision model computes.

SparseViT (Chen et al., CVPR 2023, arXiv 2303.17605): everything of a block runs on its
highest-scoring windows, and the tokens of the others pass unchanged, so that feature maps keep
their shape.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from accel.errors import PlanError, nearest
from accel.untrusted import finite, table, typed

__all__ = ["SCORES", "WindowKeeps", "checked_keeps", "kept_of"]

SCORES = ("norm_of_means", "norm", "contrast")


@dataclass(frozen=True, slots=True)
class WindowKeeps:
    """Of every block the share of windows that it computes.

    keeps: name of a block's attention (a site) -> keep in (0, 1]; a block that is not named
        computes all. Of `n` windows ``max(1, floor(keep * n + 1e-6))`` are kept, of every image as
        many and each its own. Within a stage keeps do not grow from block to block of one shift,
        since later blocks take a prefix of one ranking.
    score: what ranks the windows of a stage, found once from the tokens that enter its first
        pruned block. `norm_of_means`: L2 norm over a window's tokens of the mean over channels of
        |x| (SparseViT's code); `norm`: L2 norm of all that is in the window (its paper);
        `contrast` (ours): that of what is left of it when the mean token of the image is taken
        out. What is rare in an image is far from its mean, be it by large activations or by small
        ones; norms rank it last where a model's ground has the larger ones.
    """

    keeps: Mapping[str, float]
    score: str = "norm_of_means"

    def __post_init__(self) -> None:
        object.__setattr__(self, "keeps", checked_keeps("windows.keeps", self.keeps))
        if self.score not in SCORES:
            raise PlanError(
                f"windows.score {self.score!r} is unknown; {nearest(str(self.score), SCORES)}"
            )

    def of(self, site: str) -> float:
        """The keep of the block whose attention is `site`."""
        return self.keeps.get(site, 1.0)

    def to_dict(self) -> dict[str, Any]:
        return {"keeps": dict(self.keeps), "score": self.score}

    @classmethod
    def from_dict(cls, data: Any) -> "WindowKeeps":
        """Read what `to_dict` wrote; every departure is a `PlanError` that names it."""
        return cls(**table("windows", data, set(cls.__dataclass_fields__), {"keeps"}))


def checked_keeps(name: str, keeps: Any) -> dict[str, float]:
    """Keeps by site, if each is a fraction in (0, 1]."""
    found = {}
    for site, keep in typed(name, keeps, Mapping).items():
        if not finite(keep) or not 0 < keep <= 1:
            raise PlanError(f"{name}[{site!r}] is a fraction in (0, 1], got {keep!r}")
        found[typed(f"a site of {name}", site, str)] = float(keep)
    return found


def kept_of(keep: float, windows: int) -> int:
    """How many of `windows` a keep leaves: ``max(1, floor(keep * windows + 1e-6))``."""
    return max(1, int(keep * windows + 1e-6))
