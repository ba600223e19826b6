"""ToMe (arXiv 2210.09461)."""

from accel.choice import DENSE
from accel.geometry import Geometry
from accel.plan import Plan
from accel.recipes.registry import published
from accel.schedule import Schedule
from accel.token_reduction import TokenReduction


@published(frames=False, vision=True)
def tome(
    geometry: Geometry,
    *,
    r: int | float | None = None,
    patches: int = 196,
    inflection: float = 0.0,
    proportional: bool = True,
) -> Plan:
    """Token merging: every block merges `r` of `patches` tokens, the most similar pairs by keys.

    The share `r / patches` of an image's patches goes in each block, so that a plan for 196 patches
    (224 pixels in patches of 16) holds at other resolutions. None: 156 in all, 13 in each of 12
    blocks, as for ViT-S and B (81.41 to 79.30 and 84.57 to 82.60% of ImageNet); 6.5 in each of 24,
    near the 7 for ViT-L. A block that would merge more than half of what it has merges half.

    inflection: in [-1, 1], turns the constant into a line from ``r (1 - inflection)`` in the first
        block to ``r (1 + inflection)`` in the last.
    proportional: off for models that are trained with merging (or MAE's, off the shelf).

    What departs: prefix tokens of every kind stay, keys are seen after their norm and rotation, and
    all patches come back behind the last block, so that dense heads work as they are.
    """
    blocks = len(geometry.sites)
    r = 156 / blocks if r is None else r
    if not r > 0:
        raise ValueError(f"r is a number of tokens above 0, got {r}")
    if patches < 1:
        raise ValueError(f"patches is the number of them that r is for, got {patches}")
    if not -1 <= inflection <= 1:
        raise ValueError(f"inflection is within [-1, 1], got {inflection}")
    keeps, keep = {}, 1.0
    for number, site in enumerate(geometry.sites):
        slope = 2 * number / (blocks - 1) - 1 if blocks > 1 else 0.0
        keep = max(keep - r / patches * (1 + inflection * slope), keep / 2)
        keeps[site.name] = keep
    return Plan.uniform(
        "tome",
        geometry,
        DENSE,
        schedule=Schedule(dense_start=0.0),
        tokens=TokenReduction(keeps, method="merge", proportional=proportional),
        provenance={"recipe": "tome", "r": r, "patches": patches, "inflection": inflection},
    )
