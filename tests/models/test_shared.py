"""One denoiser in two pipelines."""

import copy
import logging

import pytest
import torch
from cases import COGVIDEOX, FLUX, SD3, WAN
from diffusers import CogVideoXDDIMScheduler, FlowMatchEulerDiscreteScheduler
from features import over
from test_contract import plan_of
from tiny_pipelines import cogvideox, flux, generate, sd3, wan

import accel
from accel.schedule import Schedule

STEPS = 10
SCHEDULE = Schedule(dense_start=0.3)
# with a step in the context; by the scheduler's index; by the timestep
BUILDS = {WAN.name: wan, SD3.name: sd3, FLUX.name: flux, COGVIDEOX.name: cogvideox}
cases = over((WAN, SD3, FLUX, COGVIDEOX), few=(SD3, COGVIDEOX))


def twin_of(pipe, scheduler=None):
    """Another pipeline around the same denoiser, with a scheduler of its own."""
    components = dict(pipe.components)
    components["scheduler"] = scheduler or copy.deepcopy(pipe.scheduler)
    other = type(pipe)(**components)
    other.set_progress_bar_config(disable=True)
    return other


def two(case):
    first, call = BUILDS[case.name]()
    return first, twin_of(first), call


def enable(pipe, **settings):
    settings = {"strict": True, "guard": False, **settings}
    return accel.enable(pipe, plan_of(pipe.transformer, schedule=SCHEDULE), **settings)


@pytest.mark.feature("two pipelines, both enabled")
@cases
def test_the_one_that_runs_tells_the_step(case):
    first, second, call = two(case)
    alone = BUILDS[case.name]()[0]
    enable(alone)
    expected = [generate(alone, call, steps, seed) for seed, steps in enumerate((STEPS, 7, STEPS))]
    enable(first)
    enable(second)
    for pipes in ((first, second, first), (second, first, second), (first, first, second)):
        for seed, (pipe, steps) in enumerate(zip(pipes, (STEPS, 7, STEPS), strict=True)):
            assert torch.equal(generate(pipe, call, steps, seed), expected[seed])
            assert str(accel.summary(first)) == str(accel.summary(second))
            assert not accel.summary(pipe).notices


@pytest.mark.feature("two pipelines, one interrupted")
@cases
def test_one_that_was_interrupted_is_not_asked(case):
    first, second, call = two(case)
    enable(first)
    enable(second)
    expected = generate(second, call, STEPS)

    def interrupt(pipe, step, timestep, tensors):
        if step == 4:
            raise KeyboardInterrupt
        return tensors

    with pytest.raises(KeyboardInterrupt):
        generate(first, call, STEPS, callback_on_step_end=interrupt)
    assert torch.equal(generate(second, call, STEPS), expected)


@pytest.mark.feature("two pipelines, one scheduler")
@cases
def test_one_scheduler_for_both_needs_one_enable(case):
    """`from_pipe` and `Pipeline(**other.components)` share the scheduler too."""
    first, call = BUILDS[case.name]()
    second = twin_of(first, first.scheduler)
    enable(first)
    assert torch.equal(generate(second, call, STEPS), generate(first, call, STEPS))
    assert not accel.summary(second).notices


@pytest.mark.feature("two pipelines, one enabled")
@cases
def test_one_that_was_not_enabled_is_dense_and_it_is_said(case, caplog):
    first, second, call = two(case)
    plain = generate(second, call, STEPS)
    enable(first, strict=False)
    expected = generate(first, call, STEPS)
    with caplog.at_level(logging.WARNING, logger="accel"):
        out = generate(second, call, STEPS)
    if case in (WAN, COGVIDEOX):
        # the context says the step with every call, or the timestep is among the known ones
        assert torch.equal(out, expected)
        return
    assert torch.equal(out, plain)
    (why,) = accel.summary(second).notices
    assert why.startswith("the step is unknown: call the model through its pipeline (one that")
    assert len(caplog.records) == 1
    assert torch.equal(generate(first, call, STEPS), expected)


@pytest.mark.feature("two pipelines, one disabled")
@cases
def test_disabling_one_disables_both(case):
    first, second, call = two(case)
    plain = generate(first, call, STEPS)
    enable(first)
    enable(second)
    accel.disable(second)
    for pipe in (first, second):
        assert torch.equal(generate(pipe, call, STEPS), plain)


@pytest.mark.feature("another scheduler")
@pytest.mark.parametrize("case", [COGVIDEOX, SD3], ids=str)
def test_another_scheduler_of_a_pipeline_is_asked(case):
    pipe, call = BUILDS[case.name]()
    enable(pipe)
    expected = generate(pipe, call, STEPS)
    kind = CogVideoXDDIMScheduler if case is COGVIDEOX else FlowMatchEulerDiscreteScheduler
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    assert torch.equal(generate(pipe, call, STEPS), expected)


@pytest.mark.feature("a pipeline and its denoiser")
@pytest.mark.parametrize("case", [COGVIDEOX, SD3], ids=str)
def test_enabling_the_denoiser_again_keeps_its_pipeline(case):
    pipe, call = BUILDS[case.name]()
    enable(pipe)
    expected = generate(pipe, call, STEPS)
    plan = plan_of(pipe.transformer, schedule=SCHEDULE)
    accel.enable(pipe.transformer, plan, strict=True, guard=False)
    assert torch.equal(generate(pipe, call, STEPS), expected)
