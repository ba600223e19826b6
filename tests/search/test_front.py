"""Which points nobody beats, which to measure, and which one a budget takes."""

from hypothesis import given
from hypothesis import strategies as st

from accel.search.front import spread, unbeaten, within

POINTS = [(0.9, 40.0), (0.5, 30.0), (0.6, 29.0), (0.5, 31.0), (0.3, 20.0), (0.95, 40.0)]


def time(point):
    return point[0]


def quality(point):
    return point[1]


def test_points_that_others_beat_are_left_out():
    assert unbeaten(POINTS, time, quality) == [(0.9, 40.0), (0.5, 31.0), (0.3, 20.0)]


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 50)), max_size=30))
def test_the_front_is_exactly_what_none_beats(points):
    front = unbeaten(points, time, quality)

    def beats(a, b):
        return a[0] <= b[0] and a[1] >= b[1] and a != b

    assert not any(beats(a, b) for a in points for b in front)
    assert all(any(a == b or beats(b, a) for b in front) for a in points)
    assert [time(p) for p in front] == sorted(map(time, front), reverse=True)


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
