"""SparseD (arXiv 2509.24014)."""

from accel.choice import Choice
from accel.estimators import BlockMassTopK
from accel.geometry import Geometry
from accel.plan import Plan
from accel.recipes.registry import published
from accel.schedule import Schedule


@published(text=True)
def sparsed(
    geometry: Geometry,
    *,
    keep: float = 0.3,
    dense_start: float = 0.2,
    isolated: bool = True,
    block: tuple[int, int] = (128, 64),
) -> Plan:
    """SparseD: after a dense start, per-head blocks by exact mass, found once and reused.

    Per query block the `keep` heaviest blocks by the two-pass log-sum-exp method, text columns
    apart from visual ones (arXiv 2509.24014: dense for 20% of the steps, select 30%). isolated:
    of a text the share is taken of prompt and answer each.
    """
    return Plan.uniform(
        "sparsed",
        geometry,
        Choice(BlockMassTopK(keep=keep, by_grid=isolated)),
        schedule=Schedule(dense_start=dense_start),
        block=block,
        provenance={"recipe": "sparsed", "keep": keep},
    )
