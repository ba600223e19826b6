"""The front: which of its plans to measure, and which one to take.

It is what no other plan that was tried beats (`accel.pipelines.trade_off.unbeaten`), from the
slowest and best to the fastest.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def spread(points: Sequence[T], count: int, time: Callable[[T], float]) -> list[T]:
    """At most `count` of points sorted by time, the first and the last among them, whose times are
    spaced as evenly as the points allow.
    """
    if len(points) <= count:
        return list(points)
    if count < 2:
        return list(points[-count:]) if count else []
    chosen = {0, len(points) - 1}
    first, last = time(points[0]), time(points[-1])
    for i in range(1, count - 1):
        wanted = first + (last - first) * i / (count - 1)
        left = [n for n in range(len(points)) if n not in chosen]
        chosen.add(min(left, key=lambda n: abs(time(points[n]) - wanted)))
    return [points[n] for n in sorted(chosen)]


def within(
    points: Sequence[T],
    time: Callable[[T], float],
    quality: Callable[[T], float],
    *,
    most_time: int | float,
    least_quality: int | float | None = None,
) -> T:
    """The best point of at most that time, the fastest where none is; with `least_quality` the
    fastest of at least that quality, the best where none is.
    """
    if least_quality is not None:
        good = [p for p in points if quality(p) >= least_quality]
        return min(good, key=time) if good else max(points, key=quality)
    allowed = [p for p in points if time(p) <= most_time]
    return max(allowed, key=quality) if allowed else min(points, key=time)
