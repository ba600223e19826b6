"""SVG-EAR (arXiv 2603.08982)."""

from accel.choice import Choice
from accel.estimators import Residual
from accel.geometry import Geometry
from accel.plan import Plan
from accel.recipes.registry import behind, published
from accel.schedule import Schedule


@published(vision=True)
def svg_ear(
    geometry: Geometry,
    *,
    keep: float = 0.25,
    order: str = "tile(4,4,4)",
    dense_start: float = 0.2,
    dense_sites: int = 1,
    refresh: tuple[float, ...] = (0.4, 0.6, 0.8),
    block: tuple[int, int] = (64, 64),
) -> Plan:
    """SVG-EAR, experimental: exact where the block's mean would err most for what it costs.

    A mean query per block probes all keys; a block is worth the error of the weights that its mean
    key makes, per token. The rest stands as one key and value per block. 10 of 50 steps and the
    first layer dense, about a quarter exact (arXiv 2603.08982, ECCV 2026).

    What departs: the method clusters queries and keys by k-means and spends one budget over all
    pairs of clusters; here blocks are tiles of space and time, rows keep equally many, and the
    selection is made at the first sparse step and at `refresh`. The probe weighs keys alone, not
    values.
    """
    choice = Choice(Residual(keep=keep), order=order, rest="mean")
    return Plan.of(
        "svg_ear",
        geometry,
        behind(dense_sites, geometry, choice),
        schedule=Schedule(dense_start=dense_start, refresh=refresh),
        block=block,
        provenance={"recipe": "svg_ear", "keep": keep},
    )
