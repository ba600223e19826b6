"""Radial Attention (arXiv 2506.19852)."""

from accel.choice import Choice
from accel.geometry import Geometry
from accel.pattern import Radial
from accel.plan import Plan
from accel.recipes.registry import behind, published
from accel.schedule import Schedule


@published
def radial(
    geometry: Geometry,
    *,
    decay: float = 0.2,
    dense_start: float = 0.24,
    dense_sites: int = 1,
    block: tuple[int, int] = (128, 64),
) -> Plan:
    """Radial Attention: a band whose width halves with the logarithm of the frame distance.

    One static mask for all heads, with the first frame as sink; 12 of 50 steps and the first layer
    dense, decay 0.2 as for Wan 2.1 (arXiv 2506.19852, NeurIPS 2025).
    """
    choice = Choice(Radial(decay=decay, first_frame_sink=True))
    schedule = Schedule(dense_start=dense_start)
    sites = behind(dense_sites, geometry, choice)
    return Plan.of(
        "radial",
        geometry,
        sites,
        schedule=schedule,
        block=block,
        provenance={"recipe": "radial", "decay": decay},
    )
