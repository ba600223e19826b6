"""Fidelities: what a plan is worth against dense, and that dense runs are made once."""

import numpy as np
import pytest
from tiny_wan import CALL

from accel.choice import Choice
from accel.errors import AccelError
from accel.metrics import psnr
from accel.pattern import Skip, Window
from accel.pipelines.adapters import geometry_of
from accel.pipelines.enable import enabled
from accel.pipelines.host import Host, ModelConfig
from accel.plan import Plan
from accel.schedule import Schedule
from accel.search.measure import Bench
from accel.search.objective import Objective, signal_to_error_db

PROMPTS = ("a seven moving left", "a one moving right")


@pytest.fixture(scope="module")
def host(tiny_wan_path):
    config = ModelConfig(
        name="tiny-wan",
        pipeline="diffusers.WanPipeline",
        path=str(tiny_wan_path),
        call=CALL,
        prompts=PROMPTS[:1],
        calibration=PROMPTS,
    )
    return Host(config)


def plan(host, select=None, **changes) -> Plan:
    choice = Choice(Window(t=1, h=2, w=2) if select is None else select)
    settings = {"schedule": Schedule(dense_start=0.25), "block": (32, 32)}
    return Plan.uniform("p", geometry_of(host.pipe), choice, **{**settings, **changes})


def judge(host, folder, fidelity, steps=3) -> Objective:
    return Objective(host, folder, "key", fidelity=fidelity, steps=steps, seed=5)


def test_signal_to_error():
    signal = np.array([1.0, -1.0, 3.0, 1.0], dtype=np.float32)
    error = np.array([0.1, 0.0, 0.0, -0.1], dtype=np.float32)
    wanted = 10 * np.log10(8 / 0.02)
    assert signal_to_error_db(signal + error, signal) == pytest.approx(wanted, abs=1e-4)
    assert signal_to_error_db(signal, signal) == 100


@pytest.mark.parametrize("fidelity", ["steps", "whole"])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_a_run_that_is_broken_is_worth_the_least(host, tmp_path, monkeypatch, fidelity, wrong):
    ask = judge(host, tmp_path, fidelity)
    dense = ask.dense(PROMPTS[0])
    broken = dense.copy()
    broken[0, 0, 0, 0] = wrong
    assert ask.quality(broken, dense) == -100
    for name in ("latents", "generate"):
        monkeypatch.setattr(Host, name, lambda *_, **__: broken)
    assert ask(plan(host), PROMPTS[:1]) == -100
    assert ask.quality(np.full_like(dense, 1e30), dense) == -100


def test_a_dense_run_that_is_broken_is_refused(host, tmp_path, monkeypatch):
    monkeypatch.setattr(Host, "latents", lambda *_, **__: np.full((2, 2), np.nan, np.float32))
    ask = judge(host, tmp_path, "steps")
    with pytest.raises(AccelError, match=r"the dense run of 'a seven.* not finite.*float32"):
        ask.dense(PROMPTS[0])
    assert not list(tmp_path.rglob("*.npz"))


def test_latents_are_what_the_videos_are_decoded_from(host):
    one = host.latents(PROMPTS[0], 5, num_inference_steps=2)
    assert one.dtype == np.float32
    assert np.array_equal(one, host.latents(PROMPTS[0], 5, num_inference_steps=2))
    assert not np.array_equal(one, host.latents(PROMPTS[1], 5, num_inference_steps=2))


@pytest.mark.parametrize("fidelity", ["steps", "whole"])
def test_a_dense_plan_is_worth_the_most_and_a_worse_one_less(host, tmp_path, fidelity):
    ask = judge(host, tmp_path, fidelity)
    dense = ask(plan(host, schedule=Schedule(dense_start=1.0)), PROMPTS[:1])
    near, nothing = ask(plan(host), PROMPTS[:1]), ask(plan(host, Skip()), PROMPTS[:1])
    assert dense == 100
    assert 100 > near > nothing
    assert ask(plan(host), PROMPTS[:1]) == near


def test_whole_is_the_psnr_of_the_videos(host, tmp_path):
    one = plan(host)
    with enabled(host.pipe, one):
        video = host.generate(PROMPTS[0], 5)
    wanted = psnr(video, host.generate(PROMPTS[0], 5))
    assert judge(host, tmp_path, "whole")(one, PROMPTS[:1]) == pytest.approx(wanted, abs=1e-6)


def test_dense_runs_are_made_once_and_apart_by_what_they_depend_on(host, tmp_path, monkeypatch):
    ask = judge(host, tmp_path, "steps")
    ask.dense(PROMPTS[0])
    judge(host, tmp_path, "steps", steps=2).dense(PROMPTS[0])
    judge(host, tmp_path, "whole").dense(PROMPTS[0])
    assert len(list((tmp_path / "dense").iterdir())) == 3
    monkeypatch.setattr(Host, "latents", None)
    ask.dense(PROMPTS[0])


def test_an_unknown_fidelity_is_refused(host, tmp_path):
    with pytest.raises(AccelError, match="'hole' is unknown"):
        judge(host, tmp_path, "hole")


def test_plans_are_measured_once_for_every_prompt(host, tmp_path, monkeypatch):
    plans = {"near": plan(host), "nothing": plan(host, Skip())}

    def bench():
        return Bench(host, judge(host, tmp_path, "whole"), tmp_path / "m.json", seed=5)

    first = bench().measure(plans, PROMPTS[:1], "measuring")
    assert first["near"].psnr > first["nothing"].psnr
    both = bench().measure({"near": plans["near"]}, PROMPTS, "measuring")
    assert both["near"].by_prompt[:1] == first["near"].by_prompt
    assert len(both["near"].by_prompt) == 2
    monkeypatch.setattr(Host, "generate", None)
    again = bench().measure({"near": plans["near"]}, PROMPTS, "measuring")
    assert again == both
