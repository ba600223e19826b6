"""The trade-off of time against quality: what is not beaten, what a front has at a time, volumes.

A point is (time, PSNR): time as a fraction of the fastest dense generation, less is better; PSNR
against dense in dB, more is better.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import Any, TypeVar

T = TypeVar("T")
Point = tuple[float, float]

# Hypervolumes are of the region between the reference point (time 1, this PSNR) and the points;
# more than the cap counts as the cap, beyond which nobody sees a difference.
FLOOR_DB, CAP_DB = 15.0, 50.0


def unbeaten(
    points: Iterable[T],
    time: Callable[[Any], float] = itemgetter(0),
    quality: Callable[[Any], float] = itemgetter(1),
) -> list[T]:
    """The points that no other beats, by rising time, and so rising quality; of equal ones the
    first. One beats another that is at least as fast and at least as good, and better in one.

    time, quality: those of a point; of a pair, what it begins with and what follows.

    >>> unbeaten([(0.5, 30.0), (0.6, 28.0), (0.4, 25.0), (0.5, 29.0)])
    [(0.4, 25.0), (0.5, 30.0)]
    """
    kept: list[T] = []
    for point in sorted(points, key=lambda p: (time(p), -quality(p))):
        if not kept or quality(point) > quality(kept[-1]):
            kept.append(point)
    return kept


def quality_at(front: Sequence[Point], time: float) -> float | None:
    """What a front is worth at `time`, in dB: on the line between the unbeaten points around it,
    which the front itself has only at their ends; points that another beats do not count.

    From the slowest unbeaten point on it is that one's PSNR, for it is done by then. None before
    the fastest.

    >>> quality_at([(0.4, 20.0), (0.6, 30.0)], 0.45)
    22.5
    """
    points = unbeaten(front)
    at = bisect_right([t for t, _ in points], time)
    if at == 0:
        return None
    if at == len(points):
        return points[-1][1]
    (before, low), (after, high) = points[at - 1 : at + 1]
    return low + (high - low) * (time - before) / (after - before)


def hypervolume(points: Iterable[Point], floor: float = FLOOR_DB, cap: float = CAP_DB) -> float:
    """The area that the points dominate, in dB: up to time 1 and down to `floor`, PSNR at most
    `cap`. Points slower than dense or below the floor add nothing.

    >>> hypervolume([(0.5, 25.0)], floor=15.0)
    5.0
    """
    area, reached = 0.0, floor
    for time, psnr in unbeaten((t, min(q, cap)) for t, q in points if t < 1):
        area += (1 - time) * max(0.0, psnr - reached)
        reached = max(reached, psnr)
    return area
