"""SubBlock (SGLang, pull request 34148)."""

from accel.choice import Choice
from accel.estimators import SubBlock
from accel.geometry import Geometry
from accel.plan import Plan
from accel.recipes.registry import published
from accel.schedule import Schedule


@published(vision=True)
def subblock(
    geometry: Geometry,
    *,
    keep: float = 0.25,
    q_cells: int = 4,
    kv_cells: int = 4,
    dense_start: float = 0.2,
    refresh: tuple[float, ...] = (0.4, 0.6, 0.8),
    block: tuple[int, int] = (64, 64),
) -> Plan:
    """SubBlock: the `keep` heaviest blocks by the log-sum-exp over the means of their cells.

    Four cells of 16 tokens in a block of 64, three quarters of the blocks left out, 10 of 50 steps
    dense, no forced diagonal and no sink (SGLang's MiniMax-H3 integration). The method selects in
    every call, here at the first sparse step and at `refresh`; its kernel rounds the number of
    blocks up to eights, this one does not.
    """
    return Plan.uniform(
        "subblock",
        geometry,
        Choice(SubBlock(keep=keep, q_cells=q_cells, kv_cells=kv_cells)),
        schedule=Schedule(dense_start=dense_start, refresh=refresh),
        block=block,
        provenance={"recipe": "subblock", "keep": keep},
    )
