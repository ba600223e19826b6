"""Two pipelines of one denoiser: which scheduler is running."""

import gc
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from accel.pipelines.clocks import Clocks


class Pipeline(SimpleNamespace):
    def begin(self, steps=3):
        self.scheduler.set_timesteps(steps)

    def step(self):
        timesteps, index = self.scheduler.timesteps, self.scheduler.step_index
        self.scheduler.step(torch.zeros(1), timesteps[index or 0], torch.zeros(1))


def pipeline():
    return Pipeline(scheduler=FlowMatchEulerDiscreteScheduler())


def clocks_of(*pipelines):
    clocks = Clocks()
    for one in pipelines:
        clocks = clocks.with_pipeline(one)
    return clocks


def test_without_a_pipeline_there_is_none():
    assert Clocks().running() is None
    assert clocks_of(torch.nn.Linear(2, 2)).running() is None


def test_the_only_one_is_asked_whatever_it_does():
    one = pipeline()
    clocks = clocks_of(one, one, torch.nn.Linear(2, 2))
    assert clocks.running() is one.scheduler
    one.scheduler = FlowMatchEulerDiscreteScheduler()
    assert clocks.running() is one.scheduler


@pytest.mark.parametrize("first", [0, 1])
def test_runs_in_turn(first):
    pipelines = pipeline(), pipeline()
    clocks = clocks_of(*pipelines)
    assert clocks.running() is None, "none has begun"
    for turn in range(4):
        one = pipelines[(first + turn) % 2]
        one.begin()
        for _ in range(3):
            assert clocks.running() is one.scheduler
            assert clocks.running() is one.scheduler, "guidance as a second call"
            one.step()


def test_one_that_was_interrupted_gives_way():
    a, b = pipeline(), pipeline()
    clocks = clocks_of(a, b)
    a.begin()
    assert clocks.running() is a.scheduler
    a.step()  # and it is interrupted after its step
    b.begin()
    for _ in range(3):
        assert clocks.running() is b.scheduler
        b.step()
    a.begin()
    assert clocks.running() is a.scheduler


def test_a_run_inside_a_run():
    a, b = pipeline(), pipeline()
    clocks = clocks_of(a, b)
    a.begin()
    for _ in range(3):
        assert clocks.running() is a.scheduler
        a.step()
        b.begin(2)
        for _ in range(2):
            assert clocks.running() is b.scheduler
            b.step()


def test_two_that_began_at_once_are_not_told_apart():
    a, b = pipeline(), pipeline()
    clocks = clocks_of(a, b)
    a.begin()
    b.begin()
    assert clocks.running() is None
    b.step()
    assert clocks.running() is b.scheduler


def test_one_scheduler_for_both():
    a = pipeline()
    b = Pipeline(scheduler=a.scheduler)
    assert clocks_of(a, b).running() is a.scheduler


def test_a_pipeline_is_not_kept():
    a, b = pipeline(), pipeline()
    clocks = clocks_of(a, b)
    del a
    gc.collect()
    assert clocks.running() is b.scheduler
