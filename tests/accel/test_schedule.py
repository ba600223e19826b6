import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accel.errors import PlanError
from accel.schedule import Phase, Schedule

points = st.lists(st.floats(0, 1, exclude_min=True, exclude_max=True), unique=True, max_size=4).map(
    sorted
)


@st.composite
def schedules(draw):
    start = draw(st.floats(0, 1))
    end = draw(st.floats(0, 1).filter(lambda e: start + e <= 1))
    drift = draw(st.none() | st.floats(0, 9, exclude_min=True))
    return Schedule(start, end, tuple(draw(points)), tuple(draw(points)), drift)


@given(schedules(), st.integers(1, 80))
def test_every_step_has_one_phase_and_phases_go_forward(schedule, total):
    phases = [schedule.phase(step, total) for step in range(total)]
    bands = [p.band for p in phases if not p.dense]
    assert bands == sorted(bands)
    assert all(0 <= band < schedule.n_bands for band in bands)
    generations = [p.generation for p in phases]
    assert generations == sorted(generations)
    assert generations[-1] <= len(schedule.refresh)
    # dense steps lie at the two ends, nowhere else
    dense = [p.dense for p in phases]
    inner = [i for i, d in enumerate(dense) if not d]
    assert not inner or not any(dense[inner[0] : inner[-1] + 1])


@given(schedules(), st.integers(1, 80))
def test_dense_steps_are_the_rounded_fractions(schedule, total):
    def whole(fraction):
        return 0 if fraction == 0 else max(1, int(fraction * total + 0.5))

    dense = sum(schedule.phase(step, total).dense for step in range(total))
    assert dense == min(total, whole(schedule.dense_start) + whole(schedule.dense_end))


@given(schedules())
def test_a_schedule_survives_its_dictionary(schedule):
    assert Schedule.from_dict(schedule.to_dict()) == schedule


@given(schedules(), st.integers(1, 80))
def test_whether_blocks_are_selected_again_is_known(schedule, total):
    phases = [schedule.phase(step, total) for step in range(total)]
    sparse = [p for p in phases if not p.dense]
    for i, phase in enumerate(sparse):
        # the dense end is whole steps, so that a point beyond it may lie in a sparse step
        later = any(p != phase for p in sparse[i:]) and schedule.dense_end == 0
        assert schedule.looks_again(phase) >= later


@given(schedules(), st.integers(1, 80))
def test_sparse_steps_are_those_that_are_not_dense(schedule, total):
    dense = sum(schedule.phase(step, total).dense for step in range(total))
    assert schedule.sparse_steps(total) == total - dense


@given(schedules(), st.integers(1, 80))
def test_steps_of_a_band_are_those_in_it(schedule, total):
    phases = [schedule.phase(step, total) for step in range(total)]
    for band in range(schedule.n_bands):
        assert schedule.steps_of(band, total) == [p for p in phases if p.band == band]


def test_a_schedule_without_drift_says_nothing_of_it():
    assert "drift" not in Schedule().to_dict()
    assert Schedule(drift=0.2).to_dict()["drift"] == 0.2
    assert Schedule.from_dict({"drift": None}) == Schedule()


def test_phases_by_hand():
    schedule = Schedule(dense_start=0.2, dense_end=0.1, bands=(0.5,), refresh=(0.6,))
    assert [schedule.phase(step, 10) for step in range(10)] == [
        *[Phase(None, 0)] * 2,
        *[Phase(0, 0)] * 3,
        Phase(1, 0),
        *[Phase(1, 1)] * 3,
        Phase(None, 1),
    ]


def test_a_run_of_one_step_is_dense():
    assert Schedule().phase(0, 1).dense
    assert not Schedule(dense_start=0.0).phase(0, 1).dense


@pytest.mark.parametrize(("step", "total"), [(-1, 4), (4, 4), (0, 0)])
def test_a_step_outside_the_run_is_refused(step, total):
    with pytest.raises(ValueError, match=f"step {step} is not within a run of {total} steps"):
        Schedule().phase(step, total)


BAD = {
    "above one": ({"dense_start": 1.5}, "schedule.dense_start is a fraction in [0, 1], got 1.5"),
    "negative": ({"dense_end": -0.1}, "schedule.dense_end is a fraction in [0, 1], got -0.1"),
    "nan": ({"dense_start": float("nan")}, "in [0, 1], got nan"),
    "infinite": ({"dense_end": float("inf")}, "in [0, 1], got inf"),
    "huge": ({"dense_start": 10**400}, "schedule.dense_start is too large a number"),
    "word": ({"dense_start": "0.2"}, "schedule.dense_start must be a number, got '0.2'"),
    "switch": ({"dense_start": True}, "schedule.dense_start must be a number, got True"),
    "all dense twice": ({"dense_start": 0.7, "dense_end": 0.7}, "more than the whole run"),
    "bands descend": ({"bands": [0.5, 0.2]}, "schedule.bands must ascend strictly inside (0, 1)"),
    "bands repeat": ({"bands": [0.5, 0.5]}, "schedule.bands must ascend strictly"),
    "band at an end": ({"bands": [1.0]}, "schedule.bands must ascend strictly inside (0, 1)"),
    "nan in refresh": ({"refresh": [float("nan")]}, "schedule.refresh must ascend"),
    "refresh a number": ({"refresh": 0.5}, "schedule.refresh is a list of numbers"),
    "bands a string": ({"bands": "0.5"}, "schedule.bands is a list of numbers"),
    "no drift": ({"drift": 0}, "schedule.drift is a number above 0, or null, got 0.0"),
    "drift below 0": ({"drift": -1}, "schedule.drift is a number above 0, or null, got -1.0"),
    "drift nan": ({"drift": float("nan")}, "above 0, or null, got nan"),
    "drift infinite": ({"drift": float("inf")}, "above 0, or null, got inf"),
    "drift a word": ({"drift": "0.2"}, "schedule.drift must be a number, got '0.2'"),
    "unknown key": ({"dense_strat": 0.1}, "no key 'dense_strat'; did you mean 'dense_start'?"),
}


@pytest.mark.parametrize(("data", "message"), BAD.values(), ids=BAD)
def test_what_is_refused(data, message):
    with pytest.raises(PlanError, match=re.escape(message)):
        Schedule.from_dict(data)


def test_a_schedule_is_a_table():
    with pytest.raises(PlanError, match="schedule must be a table, got list"):
        Schedule.from_dict([0.2])
