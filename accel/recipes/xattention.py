"""XAttention (arXiv 2503.16428)."""

from accel.choice import Choice
from accel.estimators import Antidiagonal
from accel.geometry import Geometry
from accel.plan import Plan
from accel.recipes.registry import published
from accel.schedule import Schedule


@published(text=True, vision=True)
def xattention(
    geometry: Geometry,
    *,
    tau: float = 0.9,
    stride: int = 8,
    dense_start: float = 0.1,
    refresh: tuple[float, ...] = (0.3, 0.5, 0.7),
    block: tuple[int, int] = (128, 128),
) -> Plan:
    """XAttention: the fewest blocks that hold `tau` of the mass that antidiagonals estimate.

    Cells of `stride` x `stride` tokens are scored by their antidiagonal; blocks of 128 tokens, 5 of
    50 steps dense, stride 8 and tau 0.9 or 0.95 as for HunyuanVideo. The method selects in every
    call, here at the first sparse step and at `refresh`, and one tau serves all heads.
    """
    return Plan.uniform(
        "xattention",
        geometry,
        Choice(Antidiagonal(tau=tau, stride=stride)),
        schedule=Schedule(dense_start=dense_start, refresh=refresh),
        block=block,
        provenance={"recipe": "xattention", "tau": tau},
    )
