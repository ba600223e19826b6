"""A window in space and time."""

from accel.choice import Choice
from accel.geometry import Geometry
from accel.pattern import FirstFrames, Window
from accel.pattern_union import Union
from accel.plan import Plan
from accel.recipes.registry import published
from accel.schedule import Schedule


@published(vision=True)
def window(
    geometry: Geometry,
    *,
    t: int | float | None = None,
    h: int | float | None = 0.2,
    w: int | float | None = 0.2,
    sink_frames: int = 0,
    order: str = "hwt",
    rest: str = "drop",
    dense_start: float = 0.2,
    block: tuple[int, int] = (128, 64),
) -> Plan:
    """A window of half-widths (t, h, w) around every token.

    Half-widths in frames, rows and columns, or as fractions of the axis; None is unlimited. The
    default sees the spatial neighbourhood in all frames, the diagonal of SVG's temporal heads
    (arXiv 2502.01776), in the order that makes it a band. `sink_frames` keeps so many first frames
    for all rows as well: for windows in time, in an order of whole frames or of tiles. In `hwt` a
    block has tokens of every frame, so a sink there would keep all blocks.
    """
    near = Window(t=t, h=h, w=w)
    select = Union((near, FirstFrames(sink_frames))) if sink_frames else near
    return Plan.uniform(
        "window",
        geometry,
        Choice(select, order=order, rest=rest),
        schedule=Schedule(dense_start=dense_start),
        block=block,
        provenance={"recipe": "window"},
    )
