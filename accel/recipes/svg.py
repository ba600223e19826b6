"""Sparse VideoGen (arXiv 2502.01776)."""

from math import sqrt

from accel.choice import Alternatives, Choice
from accel.geometry import Geometry
from accel.pattern import Band, FirstFrames, Pattern
from accel.pattern_union import Union
from accel.plan import Plan
from accel.recipes.registry import behind, published
from accel.schedule import Schedule


@published
def svg(
    geometry: Geometry,
    *,
    keep: float = 0.25,
    sink_frames: int = 0,
    rows: int = 64,
    dense_start: float = 0.2,
    dense_sites: int = 1,
    refresh: tuple[float, ...] = (0.4, 0.6, 0.8),
    block: tuple[int, int] = (128, 64),
) -> Plan:
    """Sparse VideoGen: every head is spatial or temporal, whichever errs less on sampled rows.

    Both keep one band of the sequence: spatial heads in the natural order, frame by frame, temporal
    ones in `hwt`, place by place. A band of half-width `1 - sqrt(1 - keep)` of the sequence covers
    the share `keep` of the map; where text is attended beside it, it is narrower by that. 20% of
    the steps and the first layer dense (Sparse VideoGen, ICML 2025, keeps 0.25 to 0.3 there).

    The method decides anew in every call; here at the first sparse step and at `refresh`. A block
    is kept where the band touches it, so that somewhat more than `keep` is computed. `sink_frames`:
    first frames that spatial heads keep for all rows, as the method does for Wan; in `hwt` a block
    has tokens of every frame, and a sink would keep all blocks.
    """
    layout = geometry.layout
    visual = 1.0 if layout is None else 1 - layout.text_tokens / layout.length
    band = Band(max(0.0, 1 - sqrt(1 - keep) / visual))
    spatial: Pattern = Union((band, FirstFrames(sink_frames))) if sink_frames else band
    options = (Choice(spatial), Choice(band, order="hwt"))
    sites = behind(dense_sites, geometry, Choice(Alternatives(options, rows)))
    return Plan.of(
        "svg",
        geometry,
        sites,
        schedule=Schedule(dense_start=dense_start, refresh=refresh),
        block=block,
        provenance={"recipe": "svg", "keep": keep},
    )
