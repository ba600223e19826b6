"""The grid heads of MMInference (arXiv 2504.16083)."""

from accel.choice import Alternatives, Choice
from accel.estimators import ColumnMass, Joined
from accel.geometry import Geometry
from accel.pattern import Band
from accel.plan import Plan
from accel.recipes.registry import published
from accel.schedule import Schedule


@published
def mminference_grid(
    geometry: Geometry,
    *,
    lines: float = 0.1,
    local: float = 0.1,
    orders: tuple[str, ...] = ("thw", "htw", "wth", "hwt"),
    rows: int = 64,
    dense_start: float = 0.2,
    refresh: tuple[float, ...] = (0.4, 0.6, 0.8),
    block: tuple[int, int] = (128, 64),
) -> Plan:
    """MMInference's grid heads: per head the stride and the phase of the lines that hold most mass.

    Attention to video comes in lines of one stride: along a row, down the columns, through the same
    place of all frames. An order that makes such lines contiguous stands for the stride, and is
    taken per head by the error on `rows` sampled rows. The phase is which lines are kept: the
    `lines` heaviest key blocks of sampled queries, for all rows, with a band of half-width `local`
    of the sequence around the diagonal.

    What departs: the method looks at the last 64 queries, since it serves causal models; here rows
    are evenly spaced. It budgets 1k global and 4k local tokens of up to a million, of which shares
    of a denoiser's sequence do not follow; and it has families for heads without a grid, found
    offline. Dense start and refresh points are accel's own.
    """
    select = Joined(ColumnMass(keep=lines, queries=rows), Band(local))
    options = tuple(Choice(select, order=order) for order in orders)
    return Plan.uniform(
        "mminference_grid",
        geometry,
        Choice(Alternatives(options, rows)),
        schedule=Schedule(dense_start=dense_start, refresh=refresh),
        block=block,
        provenance={"recipe": "mminference_grid", "lines": lines, "local": local},
    )
