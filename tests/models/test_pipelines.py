"""In the pipelines of diffusers."""

import time

import diffusers
import pytest
import torch
from cases import FLUX, HUNYUAN15, SD3, WAN
from test_contract import plan_of
from tiny_pipelines import TINY, flux, generate, hunyuan15, sd3, wan22

import accel
from accel.schedule import Schedule

# DPM-Solver, by itself
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")

STEPS = 10
SCHEDULE = Schedule(dense_start=0.3)
FEW = (
    "CogVideoX, batched, DDIM",
    "DiT, batched, DDIM",
    "Flux, embedded",
    "HunyuanVideo 1.5, guider",
    "SD3, Heun",
)


def tiny(*needed):
    """Parametrise over pipelines that have what is `needed`."""
    names = [name for name, t in TINY.items() if all(getattr(t, want) for want in needed)]
    return pytest.mark.parametrize(
        ("case", "name"),
        [
            pytest.param(
                TINY[name].case, name, id=name, marks=() if name in FEW else pytest.mark.slow
            )
            for name in names
        ],
    )


def enable(pipe, schedule=SCHEDULE, **settings):
    settings = {"strict": True, "guard": False, **settings}
    return accel.enable(pipe, plan_of(pipe.transformer, schedule=schedule), **settings)


def calls(pipe):
    """How often every site was called, by phase."""
    found = {}
    for row in accel.summary(pipe).rows:
        found.setdefault(row.phase, set()).add(row.calls)
    return found


@pytest.mark.feature("steps are found")
@tiny()
def test_dense_steps_come_first(case, name):
    pipe, call = TINY[name].build()
    plain = generate(pipe, call, STEPS)
    enable(pipe)
    out = generate(pipe, call, STEPS)
    times = TINY[name].calls
    dense, sparse = (6, 13) if TINY[name].twice else (3, 7)
    assert calls(pipe) == {"dense": {dense * times}, "band 0": {sparse * times}}
    assert not torch.allclose(out, plain, atol=1e-3)
    assert torch.equal(generate(pipe, call, STEPS), out), "the next run begins anew"
    assert calls(pipe) == {"dense": {dense * times}, "band 0": {sparse * times}}
    accel.disable(pipe)
    assert torch.equal(generate(pipe, call, STEPS), plain)


@pytest.mark.feature("steps are counted")
@tiny("unindexed")
def test_steps_are_counted_where_timesteps_are_copies(case, name, monkeypatch):
    """As DiT's are on a GPU: its timesteps stay on the CPU."""
    pipe, call = TINY[name].build()
    enable(pipe)
    expected = generate(pipe, call, STEPS)
    monkeypatch.setattr("accel.context.position", lambda *_: None)
    for _ in range(2):
        assert torch.equal(generate(pipe, call, STEPS), expected)
        assert calls(pipe) == {"dense": {3}, "band 0": {7}}


@pytest.mark.gpu
@pytest.mark.feature("steps are found on a GPU")
@tiny()
def test_dense_steps_come_first_on_a_gpu(case, name):
    pipe, call = TINY[name].build()
    pipe.to("cuda")
    call = {n: v.to("cuda") if isinstance(v, torch.Tensor) else v for n, v in call.items()}
    enable(pipe)
    generate(pipe, call, STEPS)
    times = TINY[name].calls
    dense, sparse = (6, 13) if TINY[name].twice else (3, 7)
    assert calls(pipe) == {"dense": {dense * times}, "band 0": {sparse * times}}


@pytest.mark.feature("callbacks")
@tiny("callbacks")
def test_callbacks_see_dense_steps_first(case, name):
    pipe, call = TINY[name].build()
    seen = []

    def look(pipe, step, timestep, tensors):
        seen.append(tensors["latents"].clone())
        return tensors

    generate(pipe, call, 4, callback_on_step_end=look)
    plain, seen[:] = list(seen), []
    enable(pipe, Schedule(dense_start=0.5))
    generate(pipe, call, 4, callback_on_step_end=look)
    same = [torch.equal(a, b) for a, b in zip(seen, plain, strict=True)]
    (dense,) = calls(pipe)["dense"]
    dense //= TINY[name].calls
    assert 0 < dense < len(same)
    assert same == [True] * dense + [False] * (len(same) - dense)


@pytest.mark.feature("interrupted and begun again")
@tiny("callbacks")
def test_an_interrupted_run_leaves_nothing(case, name):
    pipe, call = TINY[name].build()
    enable(pipe)
    expected = generate(pipe, call, 4)

    def interrupt(pipe, step, timestep, tensors):
        if step == 2:
            raise KeyboardInterrupt
        return tensors

    with pytest.raises(KeyboardInterrupt):
        generate(pipe, call, 4, seed=5, callback_on_step_end=interrupt)
    assert torch.equal(generate(pipe, call, 4), expected)


@pytest.mark.feature("two denoisers")
@pytest.mark.parametrize("case", [WAN], ids=str)
def test_two_denoisers_share_the_steps_of_a_run(case):
    """Wan2.2: the first has the dense steps and some more, the second the rest."""
    pipe, call = wan22()
    accel.enable(pipe, plan_of(pipe.transformer, schedule=SCHEDULE), strict=True, guard=False)
    out = generate(pipe, call, STEPS)
    first, second = (
        {row.phase: row.calls for row in accel.summary(pipe).rows if row.site.startswith(mark)}
        for mark in ("#1.", "#2.")
    )
    assert first["dense"] == 2 * 3
    assert first["band 0"] + second["band 0"] == 2 * 7
    assert set(second) == {"band 0"}
    assert torch.equal(generate(pipe, call, STEPS), out)


@pytest.mark.feature("guiders")
@pytest.mark.parametrize("case", [HUNYUAN15], ids=str)
@pytest.mark.parametrize(
    "guider",
    [
        diffusers.ClassifierFreeGuidance(3.0),
        diffusers.ClassifierFreeZeroStarGuidance(3.0),
        diffusers.AdaptiveProjectedGuidance(3.0),
        # guidance in a part of the run alone: the second call comes and goes
        diffusers.ClassifierFreeGuidance(3.0, start=0.2, stop=0.8),
    ],
    ids=["CFG", "CFG zero star", "APG", "interval"],
)
def test_guiders(case, guider):
    pipe, call = hunyuan15(guider)
    plain = generate(pipe, call, STEPS)
    enable(pipe, Schedule(dense_start=0.5))
    out = generate(pipe, call, STEPS)
    assert not torch.equal(out, plain)
    assert torch.equal(generate(pipe, call, STEPS), out)
    found = calls(pipe)
    assert all(STEPS // 2 <= min(counts) <= 2 * STEPS // 2 for counts in found.values())


class TestFewSteps:
    """Distilled models: at most 8 steps, often without guidance."""

    @pytest.mark.feature("4 steps")
    @tiny()
    def test_the_schedule_holds_and_nothing_is_unknown(self, case, name):
        pipe, call = TINY[name].build()
        enable(pipe, Schedule(dense_start=0.25))
        generate(pipe, call, 4)
        times = TINY[name].calls
        dense, sparse = (2, 5) if TINY[name].twice else (1, 3)
        assert calls(pipe) == {"dense": {dense * times}, "band 0": {sparse * times}}

    @pytest.mark.feature("the guard in 4 and 8 steps")
    @pytest.mark.parametrize("steps", [4, 8])
    @pytest.mark.parametrize("case", [FLUX, SD3], ids=str)
    def test_the_guard_decides_and_says_so(self, case, steps, monkeypatch):
        """One call a step, so every site has three sparse ones in 4 steps."""
        pipe, call = {"Flux": flux, "SD3": sd3}[case.name]()
        attend = accel.sparse_calls.sparse_attention

        def slowly(*args, **kwargs):
            time.sleep(0.02)
            return attend(*args, **kwargs)

        monkeypatch.setattr("accel.guard.LEAST_S", 0.0)
        monkeypatch.setattr("accel.sparse_calls.sparse_attention", slowly)
        enable(pipe, Schedule(dense_start=0.25), guard=True)
        generate(pipe, call, steps)
        notices = accel.summary(pipe).notices
        assert len(notices) == len(case.sites)
        assert all("slower than dense attention" in why for why in notices)
        # decided when three sparse calls are known, of one site or of several
        first = -(-3 // len(case.sites))
        assert set(notices.values()) <= {3 * steps // 4 - first, 3 * steps // 4 - first + 1}

    @pytest.mark.feature("one step")
    @tiny()
    def test_a_run_without_a_sparse_step_says_so(self, case, name):
        pipe, call = TINY[name].build()
        try:
            plain = generate(pipe, call, 1)
        except (ZeroDivisionError, IndexError):
            pytest.skip("the pipeline itself cannot take one step")
        enable(pipe, strict=False)
        assert torch.equal(generate(pipe, call, 1), plain)
        assert "none of the run's 1 steps is sparse" in str(accel.summary(pipe))
