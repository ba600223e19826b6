"""SpargeAttn (arXiv 2502.18137)."""

from accel.choice import Choice
from accel.estimators import PooledMass
from accel.geometry import Geometry
from accel.plan import Plan
from accel.recipes.registry import published
from accel.schedule import Schedule


@published(vision=True)
def sparge(
    geometry: Geometry,
    *,
    tau: float = 0.98,
    similarity: float = 0.6,
    dense_start: float = 0.0,
    refresh: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8),
    block: tuple[int, int] = (128, 64),
) -> Plan:
    """SpargeAttn: pooled scores up to a cumulative probability, where a mean speaks for its block.

    Per query block the fewest key blocks that hold `tau` of the softmax over mean query . mean key.
    A block whose tokens have a mean cosine of `similarity` or less is not judged by its mean: as
    keys it is always kept, as queries it sees everything. No dense steps; 0.98 and 0.6 are the
    method's own where nothing is tuned (SpargeAttn, ICML 2025).

    What departs: text stands apart and is always kept, masks are made at the first step and at
    `refresh` instead of in every call, and thresholds are one pair for all heads. The skipping of
    single products inside the kernel, and its 8-bit logits, are left out; the latter are
    `precision` of a plan.
    """
    return Plan.uniform(
        "sparge",
        geometry,
        Choice(PooledMass(tau=tau, similarity=similarity)),
        schedule=Schedule(dense_start=dense_start, refresh=refresh),
        block=block,
        provenance={"recipe": "sparge", "tau": tau, "similarity": similarity},
    )
