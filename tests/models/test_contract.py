"""What every kind of model has to satisfy, one class for all of them."""

import copy
import pickle
from collections import Counter

import pytest
import torch
from cases import CASES, TEXTS, Case
from reference import masked

import accel
from accel.choice import DENSE, Choice
from accel.pattern import Window
from accel.pipelines.adapters import geometry_of, sites_of
from accel.pipelines.enable import session_of
from accel.plan import Plan
from accel.schedule import Schedule

BLOCK = (16, 16)
# sides in grid units, so that they hold at any resolution; one head in another order
NEAR = Window(h=0.3, w=0.3)
SPARSE = (Choice(NEAR), Choice(Window(h=0.2, w=1.0), order="hilbert"), Choice(Window(h=0.1)))


@pytest.fixture(params=CASES, ids=str, scope="module")
def case(request) -> Case:
    return request.param


@pytest.fixture(scope="module")
def plain(case):
    """The untouched model; never enabled."""
    return case.model()


@pytest.fixture
def model(plain):
    return copy.deepcopy(plain)


def choices_of(heads):
    return tuple(SPARSE[h % len(SPARSE)] for h in range(heads))


def plan_of(model, *choices, **settings):
    geometry = geometry_of(model)
    heads = geometry.sites[0].heads
    chosen = choices * heads if choices else choices_of(heads)
    settings = {"block": BLOCK, "schedule": Schedule(dense_start=0.0), **settings}
    sites = {site.name: (chosen,) * settings["schedule"].n_bands for site in geometry.sites}
    return Plan.of("contract", geometry, sites, **settings)


@torch.no_grad()
def run(model, inputs, step=None, total=10, branch=""):
    if step is None:
        out = model(**inputs, return_dict=False)[0]
    else:
        with accel.step(step, total, branch):
            out = model(**inputs, return_dict=False)[0]
    # Z-Image gives a list
    return out if isinstance(out, torch.Tensor) else torch.stack(list(out))


def enable(model, *choices, **settings):
    plan = plan_of(model, *choices)
    return accel.enable(model, plan, strict=True, guard=False, **settings)


class TestContract:
    @pytest.mark.feature("every site found")
    def test_sites_are_found_by_name(self, case, plain):
        assert tuple(site.name for site in sites_of(plain)) == case.sites
        attentions = [
            name
            for name, module in plain.named_modules()
            if getattr(module, "processor", None) is not None
        ]
        # whatever else computes attention is cross-attention, a refiner, or another modality
        rest = set(attentions) - set(case.sites)
        assert all(
            any(word in name for word in ("attn2", "refiner", "audio", "video_to", "crossattn"))
            for name in rest
        ), rest

    @pytest.mark.feature("keep 1 is bit-equal")
    def test_keep_1_is_the_model(self, case, model, plain):
        inputs = case.inputs()
        enable(model, DENSE)
        assert torch.equal(run(model, case.inputs(), 0), run(plain, inputs))
        calls = Counter({row.site: row.calls for row in accel.summary(model).rows})
        times = len(TEXTS) if case.by_sample else 1
        assert calls == Counter(dict.fromkeys(case.sites, times))

    @pytest.mark.feature("sparse is masked dense")
    @pytest.mark.parametrize("at", [0, 1], ids=["", "another resolution"])
    def test_a_plan_is_the_model_under_its_mask(self, case, model, plain, at):
        grid = case.grids[at]
        heads = geometry_of(model).sites[0].heads
        layouts = case.expected(grid)
        with masked(plain, layouts, choices_of(heads), BLOCK, case.by_sample) as met:
            expected = run(plain, case.inputs(grid))
        assert set(met) == set(case.sites)
        enable(model)
        if at:
            run(model, case.inputs(case.grids[0]), 0)
        out = run(model, case.inputs(grid), 0)
        assert torch.allclose(out, expected, atol=2e-4, rtol=2e-4), (out - expected).abs().max()
        assert not torch.allclose(out, run(plain, case.inputs(grid)), atol=1e-3)

    @pytest.mark.feature("text and references kept")
    def test_conditions_are_attended_and_attend(self, case, model):
        enable(model)
        run(model, case.inputs(), 0)
        masks = session_of(model).run.masks
        assert masks
        for key, found in masks.items():
            keep, block = found.mask.to_dense(), found.mask.block
            end = key.layout.valid_length
            for segment in key.layout.segments:
                if segment.kind in ("text", "reference"):
                    rows = keep[..., segment.start // block[0] : -(-segment.stop // block[0]), :]
                    columns = keep[..., segment.start // block[1] : -(-segment.stop // block[1])]
                    assert rows[..., : -(-end // block[1])].all()
                    assert columns[..., : -(-end // block[0]), :].all()

    @pytest.mark.feature("padded text never attended")
    def test_padded_text_is_never_attended(self, case, model):
        if not case.padded:
            pytest.skip("pads no text: all of it is attended, or is no part of the sequence")
        enable(model)
        expected = run(model, case.inputs(), 0)
        inputs = case.inputs()
        for name in case.padded:
            for sample, length in enumerate(TEXTS):
                inputs[name][sample, length:] = 7.0
        assert torch.allclose(run(model, inputs, 0), expected, atol=1e-5)

    @pytest.mark.feature("batch of 3")
    def test_a_batch_is_its_samples(self, case, model):
        enable(model)
        together = run(model, case.inputs(), 0)
        for sample in range(len(TEXTS)):
            alone = run(model, case.inputs(samples=(sample,)), 0)
            assert torch.allclose(together[sample], alone[0], atol=2e-4, rtol=2e-4)

    @pytest.mark.feature("guidance batched and separate")
    def test_both_forms_of_guidance(self, case, model):
        """One batched call of two prompts, or a call for each under a name."""
        enable(model)
        batched = [run(model, case.inputs(samples=(0, 1), seed=step), step) for step in range(2)]
        enable(model)
        for step in range(2):
            for sample, branch in enumerate(("cond", "uncond")):
                inputs = case.inputs(samples=(sample,), seed=step)
                apart = run(model, inputs, step, branch=branch)
                assert torch.allclose(batched[step][sample], apart[0], atol=2e-4, rtol=2e-4)
        assert {key.owner for key in session_of(model).run.masks} == {None}

    @pytest.mark.feature("disable is exact")
    def test_disable_leaves_the_model(self, case, model, plain):
        before = {name: type(m) for name, m in model.named_modules()}, list(model.state_dict())
        enable(model)
        run(model, case.inputs(), 0)
        accel.disable(model)
        assert (
            {name: type(m) for name, m in model.named_modules()},
            list(model.state_dict()),
        ) == before
        assert torch.equal(run(model, case.inputs()), run(plain, case.inputs()))
        assert torch.equal(run(model, case.inputs(), 0), run(plain, case.inputs()))

    @pytest.mark.feature("deepcopy, pickle")
    def test_copies_are_plain(self, case, model, plain):
        enable(model)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(run(twin, case.inputs(), 0), run(plain, case.inputs()))
