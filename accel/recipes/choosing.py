"""What recipes share that choose per site, step band and head by a profile."""

from collections.abc import Callable, Sequence

from accel.choice import Choice
from accel.geometry import Geometry, Site
from accel.profile import Key

__all__ = ["by_site", "even_bands"]


def even_bands(count: int, dense_start: float = 0.0) -> tuple[float, ...]:
    """Inner borders of `count` equal step bands behind a dense start."""
    if type(count) is not int or count < 1:
        raise ValueError(f"bands is a number of step bands, at least 1, got {count!r}")
    return tuple(dense_start + (1 - dense_start) * i / count for i in range(1, count))


def by_site(
    geometry: Geometry, bands: int, pick: Callable[[Key, Site], Sequence[Choice]]
) -> dict[str, tuple[tuple[Choice, ...], ...]]:
    """The sites of a plan; `pick` gives the choices of all heads of a site in one band."""
    return {
        site.name: tuple(tuple(pick((site.name, band), site)) for band in range(bands))
        for site in geometry.sites
    }
