import re
import threading
from types import SimpleNamespace

import pytest

import accel
from accel.context import Where, locate


def context(name="cond", step_index=None, num_inference_steps=None):
    return SimpleNamespace(
        name=name, step_index=step_index, num_inference_steps=num_inference_steps
    )


def scheduler(step_index=None, steps=7, begin_index=None, **more):
    given = {"num_inference_steps": steps, "timesteps": list(range(steps)), **more}
    return SimpleNamespace(step_index=step_index, begin_index=begin_index, **given)


def test_nothing_said_is_nothing_known():
    assert locate(None, None) is None


def test_what_the_caller_says_comes_first():
    with accel.step(2, 5, "uncond"):
        assert locate(context("cond", 3, 9), scheduler(4)) == Where(2, 5, "uncond")
    assert locate(context("cond", 3, 9), scheduler(4)) == Where(3, 9, "cond")


def test_steps_nest_and_end_with_an_exception():
    with accel.step(2, 5):
        with pytest.raises(KeyError), accel.step(1, 3):
            raise KeyError("interrupted")
        assert locate(None, None) == Where(2, 5)
    assert locate(None, None) is None


def test_a_step_holds_for_its_thread():
    seen = []
    with accel.step(2, 5):
        thread = threading.Thread(target=lambda: seen.append(locate(None, None)))
        thread.start()
        thread.join()
    assert seen == [None]


@pytest.mark.parametrize(("index", "total"), [(-1, 4), (4, 4), (0, 0)])
def test_a_step_outside_the_run_is_refused(index, total):
    with (
        pytest.raises(ValueError, match=re.escape(f"accel.step({index}, {total})")),
        accel.step(index, total),
    ):
        pass


@pytest.mark.parametrize(
    ("name", "branch"),
    [
        ("cond", "cond"),
        ("pred_cond", "cond"),
        ("uncond", "uncond"),
        ("pred_uncond", "uncond"),
        ("cond_uncond", "batched"),
        ("pag", "pag"),
        (None, ""),
    ],
)
def test_branches_of_the_cache_context(name, branch):
    assert locate(context(name, 1, 4), None) == Where(1, 4, branch)


@pytest.mark.parametrize(
    ("cache", "schedule", "where"),
    [
        pytest.param(None, scheduler(3), Where(3, 7), id="scheduler alone"),
        pytest.param(None, scheduler(None), Where(0, 7), id="before its first step"),
        pytest.param(None, scheduler(None, begin_index=2), Where(2, 7), id="begins later"),
        pytest.param(context("cond"), scheduler(3), Where(3, 7, "cond"), id="context names branch"),
        pytest.param(context("", 3), scheduler(5), Where(3, 7), id="context has no total"),
        pytest.param(None, scheduler(7), None, id="after its last step"),
        pytest.param(
            None, scheduler(3, num_inference_steps=None), None, id="its steps were never set"
        ),
        pytest.param(context("cond", 3), None, None, id="no total anywhere"),
        pytest.param(None, SimpleNamespace(step_index=2), None, id="scheduler without timesteps"),
        pytest.param(None, SimpleNamespace(timesteps=[1, 2]), None, id="scheduler without index"),
    ],
)
def test_where_a_call_stands(cache, schedule, where):
    assert locate(cache, schedule) == where


def test_a_place_names_its_run_and_whether_the_step_is_assumed():
    clock = scheduler(3)
    assumed, told = locate(None, clock), locate(context("cond", 3, 7), clock)
    assert assumed.run is told.run is clock.timesteps
    assert (assumed.assumed, told.assumed) == (True, False)
    with accel.step(2, 5):
        assert locate(None, clock) is locate(None, clock)
        assert locate(None, clock).run is None
