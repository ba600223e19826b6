"""PISA (arXiv 2602.01077)."""

from accel.choice import Choice
from accel.estimators import Pooled
from accel.geometry import Geometry
from accel.plan import Plan
from accel.recipes.registry import behind, published
from accel.schedule import Schedule


@published(vision=True)
def pisa(
    geometry: Geometry,
    *,
    keep: float = 0.15,
    order: str = "tile(4,4,4)",
    rest: str = "taylor",
    dense_start: float = 0.2,
    dense_sites: int = 1,
    block: tuple[int, int] = (64, 64),
) -> Plan:
    """Piecewise sparse attention: pooled selection, the rest by its block means to first order.

    Per query block the top `keep` of q_mean . k_mean + ln ||G||; every other block stands as one
    key with the weight of its length, and its values turn with the query by a mean slope. 10 of 50
    steps and the first layer dense; blocks are compact tiles of space-time (arXiv 2602.01077). The
    slope is one for 32 blocks, as in PASA (arXiv 2604.12219), not one for the head, and `rest=mean`
    is the zeroth order. Selection is made anew in every step in the paper; here once per refresh
    point, four of them.
    """
    choice = Choice(Pooled(keep=keep), order=order, rest=rest)
    sites = behind(dense_sites, geometry, choice)
    return Plan.of(
        "pisa",
        geometry,
        sites,
        schedule=Schedule(dense_start=dense_start, refresh=(0.4, 0.6, 0.8)),
        block=block,
        provenance={"recipe": "pisa", "keep": keep},
    )
