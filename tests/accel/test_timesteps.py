"""Steps of schedulers without an index, by the timesteps of calls."""

from types import SimpleNamespace

import pytest
import torch

from accel.context import Where, locate
from accel.timesteps import StepCounter, position

TIMESTEPS = torch.tensor([900, 700, 500, 300, 100])


@pytest.mark.parametrize("i", range(5))
def test_a_view_is_known_by_its_memory(i):
    twice = torch.tensor([7, 7, 7, 7, 7])  # values would not tell
    for timesteps in (TIMESTEPS, twice):
        for timestep in (timesteps[i], timesteps[i].expand(3), timesteps[i][None]):
            assert position(timestep, timesteps) == i


def test_a_copy_on_the_cpu_is_known_by_its_value():
    assert position(TIMESTEPS[3].expand(2).clone(), TIMESTEPS) == 3
    assert position(TIMESTEPS[3].expand(2).float(), TIMESTEPS) == 3
    assert position(torch.tensor([0.3]), TIMESTEPS) is None, "one that was scaled"


@pytest.mark.parametrize(
    ("timestep", "timesteps"),
    [
        (300, TIMESTEPS),
        (None, TIMESTEPS),
        (TIMESTEPS[3], TIMESTEPS.tolist()),
        (TIMESTEPS[3], None),
        (TIMESTEPS[:0], TIMESTEPS),
        (TIMESTEPS[3].to("meta"), TIMESTEPS),
        (TIMESTEPS[3].clone(), TIMESTEPS[None]),
    ],
)
def test_what_cannot_be_compared_is_unknown(timestep, timesteps):
    assert position(timestep, timesteps) is None


def test_steps_are_counted_by_tensors():
    counter, run = StepCounter(), object()
    one, two, three = (torch.tensor([9]) for _ in range(3))
    seen = [counter.index(t, run, "") for t in (one, one, two, two, three)]
    assert seen == [0, 0, 1, 1, 2]
    assert counter.index(one, object(), "") == 0, "another run"
    assert counter.index(500, run, "") is None


def test_branches_of_a_step_may_have_copies():
    counter, run = StepCounter(), object()
    steps = [
        counter.index(torch.tensor([9]), run, branch)
        for _ in range(3)
        for branch in ("cond", "uncond")
    ]
    assert steps == [0, 0, 1, 1, 2, 2]


def test_memory_that_was_written_to_is_another_timestep():
    counter, run, timestep = StepCounter(), object(), torch.tensor([9])
    assert counter.index(timestep, run, "") == 0
    assert counter.index(timestep.fill_(7), run, "") == 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_memory_is_not_taken_for_that_of_a_tensor_that_is_gone(mode):
    counter, run = StepCounter(), object()
    with mode():
        # each is let go before the next, whose memory might be the same
        assert [counter.index(torch.tensor([9]), run, "") for _ in range(8)] == list(range(8))


def test_a_scheduler_without_an_index_is_located_by_the_timestep():
    scheduler = SimpleNamespace(timesteps=TIMESTEPS, num_inference_steps=5)
    assert locate(None, scheduler) is None
    found = locate(None, scheduler, TIMESTEPS[2].expand(2), StepCounter())
    assert found == Where(2, 5)
    assert found.run is TIMESTEPS
    assert not found.assumed
    counter = StepCounter()
    scaled = [locate(None, scheduler, torch.tensor([-float(i)]), counter) for i in range(6)]
    assert scaled[:5] == [Where(i, 5) for i in range(5)]
    assert scaled[5] is None, "there are no more steps"
    assert all(where.assumed for where in scaled[:5])
    unset = SimpleNamespace(timesteps=TIMESTEPS, num_inference_steps=None)
    assert locate(None, unset, TIMESTEPS[2]) is None
