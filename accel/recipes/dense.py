"""Dense attention by accel's own kernel: the baselines among the recipes."""

from accel.choice import DENSE
from accel.geometry import Geometry
from accel.plan import Plan
from accel.recipes.registry import published
from accel.schedule import Schedule


@published(text=True, vision=True)
def full(geometry: Geometry, *, block: tuple[int, int] = (128, 64)) -> Plan:
    """Dense attention by accel's own kernel: nothing is left out, so results agree up to rounding.

    Tiled exact attention with an online softmax (FlashAttention, arXiv 2205.14135). Where it beats
    the host's attention it is the dense baseline that speed is measured against.
    """
    return _own_dense("full", geometry, block)


@published(text=True, vision=True)
def half(geometry: Geometry, *, block: tuple[int, int] = (128, 64)) -> Plan:
    """`full` with 16-bit operands: the dense baseline of plans whose precision is `half` or less.

    Other than `full` where the model computes in fp32.
    """
    return _own_dense("half", geometry, block)


def _own_dense(precision: str, geometry: Geometry, block: tuple[int, int]) -> Plan:
    return Plan.uniform(
        precision,
        geometry,
        DENSE,
        dense="kernel",
        precision=precision,
        schedule=Schedule(dense_start=1.0),
        block=block,
        provenance={"recipe": precision},
    )
