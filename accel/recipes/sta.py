"""Sliding tile attention (arXiv 2502.04507)."""

from math import prod

from accel.choice import Choice
from accel.geometry import Geometry
from accel.pattern import Extent
from accel.pattern_tiles import TileWindow
from accel.plan import Plan
from accel.profile import Profile
from accel.recipes.choosing import by_site, even_bands
from accel.recipes.registry import Demand, published
from accel.schedule import Schedule

# tiles of the windows of its code for HunyuanVideo, as parts of the (3, 6, 10) tiles there
WINDOWS: tuple[tuple[Extent, Extent, Extent], ...] = (
    (1.0, 1 / 6, 1.0),
    (1 / 3, 5 / 6, 0.7),
    (1.0, 0.5, 0.3),
    (1 / 3, 1.0, 0.5),
    (1 / 3, 0.5, 1.0),
    (1.0, 1.0, 0.1),
)


def _demand(
    _: Geometry,
    tile: tuple[int, int, int],
    windows: tuple[tuple[Extent, Extent, Extent], ...],
    bands: int,
    dense_start: float,
) -> Demand:
    tokens = prod(tile)
    return Demand(
        candidates=tuple(
            Choice(TileWindow(tile, window), order="tile({},{},{})".format(*tile))
            for window in windows
        ),
        schedule=Schedule(dense_start=dense_start, bands=even_bands(bands, dense_start)),
        block=(tokens, tokens),
    )


@published(demand=_demand)
def sta(
    geometry: Geometry,
    profile: Profile,
    *,
    tile: tuple[int, int, int] = (4, 4, 4),
    windows: tuple[tuple[Extent, Extent, Extent], ...] = WINDOWS,
    bands: int = 5,
    dense_start: float = 0.24,
) -> Plan:
    """Sliding tile attention: per layer, step band and head the window of tiles of least error.

    Tokens lie tile by tile, a block is a tile, and a window holds whole tiles, so no block is cut.
    The least error of the head's output decides, whatever a window costs, and there is no dense
    candidate. 12 of 50 steps are dense (arXiv 2502.04507).

    What departs: tiles are of 4 x 4 x 4 tokens, a block of the kernels here, where the paper has
    6 x 8 x 8. Windows are parts of the grid's tiles, those of the published ones for HunyuanVideo.
    There, 69 frames of 768 x 1280, they keep 10 to 19% of the map, which the method calls similar;
    with these tiles it is 11 to 25%, and on small grids parts are rounded to few tiles and they
    differ by a factor of two (17 to 34% on 17 x 16 x 16), so that the widest is favoured more than
    in the paper. The choice is made in `bands` equal parts of the run, not for every step, by the
    mean of relative errors on sampled rows at the ends of each part, over the prompts of the
    calibration and both branches of guidance, where the paper takes that of squared errors of all
    rows over 16 to 18 prompts.
    """
    asked = _demand(geometry, tile, windows, bands, dense_start)
    return Plan.of(
        "sta",
        geometry,
        by_site(
            geometry,
            bands,
            lambda key, _: [
                profile.candidates[i] for i in profile.head_errors[key].argmin(0).tolist()
            ],
        ),
        schedule=asked.schedule,
        block=asked.block,
        provenance={"recipe": "sta", "tile": list(tile)},
    )
