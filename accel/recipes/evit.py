"""EViT (arXiv 2202.07800)."""

from collections.abc import Sequence

from accel.choice import DENSE
from accel.geometry import Geometry
from accel.plan import Plan
from accel.recipes.registry import published
from accel.schedule import Schedule
from accel.token_reduction import TokenReduction


@published(frames=False, vision=True)
def evit(
    geometry: Geometry,
    *,
    keep: float = 0.7,
    blocks: Sequence[int] | None = None,
    score: str = "class",
) -> Plan:
    """EViT: some blocks pass on the share `keep` of their patches, and the rest as one token.

    The rest are those to which the class token attends least. blocks: their numbers from 0; None:
    at a quarter, a half and three quarters of the depth, 3, 6 and 9 of 12 as in the paper, which
    leave 0.7, 0.49 and 0.343 of the patches (DeiT-S: 79.5% of ImageNet at 3.0 GMACs, trained so).

    score: `mass` ranks by what all queries give instead, for models without a class token.

    What departs: the fused token is a mean weighted by attention, where EViT leaves the sum as it
    is, and counts among the share that is kept; all patches come back behind the last block.
    """
    depth = len(geometry.sites)
    chosen = sorted({depth * i // 4 for i in (1, 2, 3)}) if blocks is None else list(blocks)
    if not chosen or chosen != sorted(set(chosen)) or not 0 <= chosen[0] <= chosen[-1] < depth:
        raise ValueError(f"blocks are ascending numbers from 0 to {depth - 1}, got {list(chosen)}")
    keeps = {geometry.sites[b].name: keep ** (i + 1) for i, b in enumerate(chosen)}
    return Plan.uniform(
        "evit",
        geometry,
        DENSE,
        schedule=Schedule(dense_start=0.0),
        tokens=TokenReduction(keeps, method="fuse", score=score, proportional=False),
        provenance={"recipe": "evit", "keep": keep, "blocks": chosen},
    )
