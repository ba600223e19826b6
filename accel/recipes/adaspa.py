"""AdaSpa (arXiv 2502.21079)."""

from accel.choice import Choice
from accel.estimators import AdaptiveBlockMass
from accel.geometry import Geometry
from accel.plan import Plan
from accel.recipes.registry import published
from accel.schedule import Schedule


@published
def adaspa(
    geometry: Geometry,
    *,
    keep: float = 0.2,
    dense_start: float = 0.2,
    refresh: tuple[float, ...] = (0.6,),
    block: tuple[int, int] = (128, 64),
) -> Plan:
    """AdaSpa: exact block mass, head-adaptive keep, one refresh with the cached log-sum-exp.

    10 of 50 steps dense, searches at steps 10 and 30, sparsity 0.8 (arXiv 2502.21079, ICCV 2025).
    Its blocks are of 64 tokens in the paper: `block=(64, 64)`.
    """
    return Plan.uniform(
        "adaspa",
        geometry,
        Choice(AdaptiveBlockMass(keep=keep)),
        schedule=Schedule(dense_start=dense_start, refresh=refresh),
        block=block,
        provenance={"recipe": "adaspa", "keep": keep},
    )
