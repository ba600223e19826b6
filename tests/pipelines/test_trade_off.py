"""Fronts and hypervolumes, against what can be counted by hand."""

import doctest
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accel.pipelines import trade_off
from accel.pipelines.trade_off import hypervolume, quality_at, unbeaten

# exact in binary
TIMES = st.integers(1, 40).map(lambda n: n / 32)
POINTS = st.lists(st.tuples(TIMES, st.integers(10, 60).map(float)), max_size=6)


def test_the_examples():
    assert doctest.testmod(trade_off).failed == 0


@given(POINTS)
def test_unbeaten_points_are_those_that_no_other_beats(points):
    kept = unbeaten(points)
    assert kept == sorted(set(kept))
    for time, psnr in points:
        beaten = any(t <= time and q >= psnr and (t, q) != (time, psnr) for t, q in points)
        assert ((time, psnr) in kept) != beaten


@given(POINTS)
def test_points_may_be_anything_that_has_a_time_and_a_quality(points):
    named = [{"name": n, "time": t, "psnr": q} for n, (t, q) in enumerate(points)]
    kept = unbeaten(named, lambda p: p["time"], lambda p: p["psnr"])
    assert [(p["time"], p["psnr"]) for p in kept] == unbeaten(points)
    # of equal ones the first
    assert all(points.index((p["time"], p["psnr"])) == p["name"] for p in kept)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 50)), max_size=30))
def test_any_point_is_beaten_or_kept(points):
    front = unbeaten(points)

    def beats(a, b):
        return a[0] <= b[0] and a[1] >= b[1] and a != b

    assert not any(beats(a, b) for a in points for b in front)
    assert all(any(a == b or beats(b, a) for b in front) for a in points)


@given(POINTS)
def test_the_hypervolume_is_the_number_of_cells_below_the_points(points):
    cells = sum(
        any(t <= at / 32 and min(q, 50) >= level for t, q in points)
        for at in range(32)
        for level in range(16, 51)
    )
    assert hypervolume(points, floor=15.0, cap=50.0) == Fraction(cells, 32)


def test_more_than_the_cap_is_the_cap_and_a_slow_point_adds_nothing():
    assert hypervolume([(0.5, 90.0)], 15.0, 50.0) == hypervolume([(0.5, 50.0)], 15.0, 50.0) == 17.5
    assert hypervolume([(1.0, 40.0), (1.5, 45.0), (0.25, 15.0)], 15.0, 50.0) == 0
    # the point behind the cap must not hide a faster one as good
    assert hypervolume([(0.75, 90.0), (0.5, 60.0)], 15.0, 50.0) == 17.5
    assert hypervolume([]) == 0


FRONT = [(0.75, 40.0), (0.25, 20.0), (0.5, 36.0), (0.625, 30.0)]


@pytest.mark.parametrize(
    ("time", "psnr"),
    [
        (0.2, None),
        (0.25, 20.0),
        (0.375, 28.0),
        (0.5, 36.0),
        (0.625, 38.0),  # between 36 and 40: the point with 30 is beaten
        (0.75, 40.0),
        (2.0, 40.0),
    ],
)
def test_a_front_has_at_a_time_what_lies_between_its_points(time, psnr):
    assert quality_at(FRONT, time) == psnr
    assert quality_at([], time) is None
