"""Sol-Attn (arXiv 2607.24027)."""

from typing import Literal

from accel.choice import Choice
from accel.estimators import Estimator, Joined, Threshold
from accel.geometry import Geometry
from accel.pattern import FirstFrames
from accel.plan import Plan
from accel.recipes.registry import behind, published
from accel.schedule import Schedule


@published(vision=True)
def sol_attn(
    geometry: Geometry,
    *,
    tau: float = 1.0,
    variance: Literal["diag", "exact"] = "diag",
    sink_frames: int = 0,
    order: str = "morton",
    rest: str = "mean",
    dense_start: float = 0.2,
    dense_sites: int = 1,
    refresh: tuple[float, ...] = (0.4, 0.6, 0.8),
    block: tuple[int, int] = (64, 64),
) -> Plan:
    """Sol-Attn: exact where a block scores above a closed-form threshold, block means elsewhere.

    Key block j is exact for query block i if its pooled score lies `tau` standard deviations above
    the row's mean, both known from block statistics alone, or if it is next to it, or text. Heads
    and rows so get budgets of their own; about 16% at tau 1. All other blocks stand as one key
    each, their mean with the weight of their length. 20% of the steps and the first layer dense,
    tokens along a Morton curve (arXiv 2607.24027).

    What departs: the method decides inside the attention kernel, in every call; here masks are made
    at the first sparse step and at `refresh`, while the means are always those of the call.
    `sink_frames`: first frames kept for all rows, where a model needs a sink that is not text; a
    block with any token of theirs counts.
    """
    select: Estimator = Threshold(tau=tau, variance=variance)
    if sink_frames:
        select = Joined(select, FirstFrames(sink_frames))
    sites = behind(dense_sites, geometry, Choice(select, order=order, rest=rest))
    return Plan.of(
        "sol_attn",
        geometry,
        sites,
        schedule=Schedule(dense_start=dense_start, refresh=refresh),
        block=block,
        provenance={"recipe": "sol_attn", "tau": tau},
    )
