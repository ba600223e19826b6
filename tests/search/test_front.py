"""Which points of a front to measure, and which one a budget takes."""

from accel.search.front import spread, within

POINTS = [(0.9, 40.0), (0.5, 30.0), (0.6, 29.0), (0.5, 31.0), (0.3, 20.0), (0.95, 40.0)]


def time(point):
    return point[0]


def quality(point):
    return point[1]


def test_what_is_measured_spans_the_front():
    points = [(t / 10, float(t)) for t in (9, 8.9, 8.8, 6, 4, 2, 1)]
    assert [p[0] for p in spread(points, 4, time)] == [0.9, 0.6, 0.4, 0.1]
    assert spread(points, 9, time) == points
    assert spread(points, 1, time) == [points[-1]]


def test_a_budget_takes_the_best_that_is_fast_enough():
    assert within(POINTS, time, quality, most_time=0.55) == (0.5, 31.0)
    assert within(POINTS, time, quality, most_time=0.1) == (0.3, 20.0)
    assert within(POINTS, time, quality, most_time=0.1, least_quality=29.5) == (0.5, 30.0)
    assert within(POINTS, time, quality, most_time=0.1, least_quality=50)[1] == 40.0
