"""Every error is one clear message, and afterwards the pipeline is as if nothing had happened."""

import inspect
import json
import re
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from tiny_denoiser import SITES, call, tiny_denoiser, tiny_plan
from tiny_wan import CALL
from torch import nn

import accel
from accel.choice import Choice
from accel.errors import AccelError, MissedSiteError, PlanError, UnsupportedModelError
from accel.estimators import BlockMassTopK

SPARSE = Choice(BlockMassTopK(keep=0.5))


@pytest.fixture
def model():
    return tiny_denoiser()


@pytest.fixture
def unharmed(model):
    """After the test the model is what it was before."""
    plain, keys = call(model), sorted(model.__dict__)
    yield
    assert torch.equal(call(model, 0), plain)
    assert sorted(model.__dict__) == keys
    with pytest.raises(AccelError, match="accel is not enabled here; call accel"):
        accel.summary(model)


def _file(path, change):
    data = tiny_plan(SPARSE).to_dict()
    change(data)
    path.write_text(json.dumps(data))
    return path


REFUSED = {
    "another class": (
        lambda path: _file(path, lambda d: d.update(model="FluxTransformer2DModel")),
        "model is 'FluxTransformer2DModel', but this is a 'WanTransformer3DModel'",
    ),
    "other sites": (
        lambda path: _file(path, lambda d: d.update(n_sites=30)),
        "n_sites is 30, but the model has 2 sites",
    ),
    "other heads": (
        lambda path: _file(path, lambda d: d["sites"].update({SITES[1]: [[0, 0]]})),
        "sites['blocks.1.attn1'] is for 2 heads, the model has 3",
    ),
    "other head dim": (
        lambda path: _file(path, lambda d: d.update(head_dim=128)),
        "head_dim is 128, the model's is 24",
    ),
    "newer schema": (
        lambda path: _file(path, lambda d: d.update(schema=9)),
        "the plan has schema 9, this accel reads 1; update accel",
    ),
    "cut short": (
        lambda path: path.write_text('{"schema": 1, "na') and path,
        "is not a whole JSON file",
    ),
    "missing": (lambda path: path, "there is no plan file at"),
    "no recipe": (lambda _: "sparsd", "no plan file 'sparsd'; did you mean 'sparsed'?"),
    "not on the hub": (lambda _: "nobody/no-such-plan", "there is no plan file 'nobody/no-such"),
    "not a plan": (
        lambda _: {"transformer": 0.3},
        "a plan is a Plan, a path, a recipe or a hub name, not 0.3",
    ),
    "no plan for it": (lambda _: {"transfromer": SPARSE}, "must be given for ['transformer']"),
}


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize(("plan", "message"), REFUSED.values(), ids=REFUSED)
def test_a_plan_that_does_not_fit_is_refused(model, tmp_path, plan, message):
    with pytest.raises(PlanError, match=re.escape(message)):
        accel.enable(model, plan(tmp_path / "plan.json"))


NO_DENOISER = "has no denoiser that accel knows; give a diffusers pipeline with a `transformer`"
NO_SITES = {
    "linear": (nn.Linear(2, 2), "accel has no attention sites in a Linear;"),
    "no transformer": (SimpleNamespace(unet=nn.Linear(2, 2)), f"a SimpleNamespace {NO_DENOISER}"),
    "transformer is None": (SimpleNamespace(transformer=None), NO_DENOISER),
    "a name": ("wan", f"a str {NO_DENOISER}"),
}


@pytest.mark.parametrize(("target", "message"), NO_SITES.values(), ids=NO_SITES)
def test_what_has_no_sites_cannot_be_enabled(target, message):
    with pytest.raises(UnsupportedModelError, match=re.escape(message)):
        accel.enable(target, "sparsed")


@pytest.mark.parametrize("use", [accel.disable, accel.summary])
def test_what_has_no_denoiser_has_nothing_to_undo_or_say(use):
    with pytest.raises(UnsupportedModelError, match=re.escape(NO_DENOISER)):
        use(SimpleNamespace(unet=nn.Linear(2, 2)))


def test_a_model_without_blocks():
    with pytest.raises(UnsupportedModelError, match="has no block with self-attention"):
        accel.enable(tiny_denoiser(num_layers=0), "sparsed")


class _OwnAttention(WanAttnProcessor):
    """Attention by hand, past dispatcher and SDPA."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, *_, **__):
        q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        return attn.to_out[0]((q @ k.transpose(1, 2)).softmax(-1) @ v)


def _function(attn, hidden_states, *_, **__):
    return attn.to_out[0](attn.to_v(hidden_states))


class TestMissedSites:
    @pytest.mark.usefixtures("unharmed")
    def test_a_site_that_goes_past_the_dispatcher_is_named(self, model):
        own = model.blocks[1].attn1.processor
        model.blocks[1].attn1.processor = _OwnAttention()
        with pytest.raises(MissedSiteError, match=r"blocks\.1\.attn1 \(0 calls\)") as caught:
            accel.enable(model, tiny_plan(SPARSE))
        assert "blocks.0" not in str(caught.value)
        assert type(model.blocks[1].attn1.processor) is _OwnAttention
        model.blocks[1].attn1.processor = own

    @pytest.mark.usefixtures("unharmed")
    def test_a_processor_that_is_a_function_is_named(self, model):
        own = model.blocks[1].attn1.processor
        model.blocks[1].attn1.processor = _function
        with pytest.raises(UnsupportedModelError, match=r"blocks\.1\.attn1 is a function"):
            accel.enable(model, tiny_plan(SPARSE))
        assert type(model.blocks[0].attn1.processor) is WanAttnProcessor
        model.blocks[1].attn1.processor = own

    @pytest.mark.usefixtures("unharmed")
    def test_a_model_that_fails_the_check_by_itself(self, model, monkeypatch):
        def fail(*_, **__):
            raise RuntimeError("out of memory")

        with monkeypatch.context() as patch:
            patch.setattr(model.blocks[1], "forward", fail)
            with pytest.raises(RuntimeError, match="out of memory"):
                accel.enable(model, tiny_plan(SPARSE))

    def test_without_the_check_the_site_stays_dense(self, model):
        model.blocks[1].attn1.processor = _OwnAttention()
        accel.enable(model, tiny_plan(SPARSE), check=False)
        call(model, 0)
        assert {row.site for row in accel.summary(model).rows} == {SITES[0]}

    def test_the_second_of_two_denoisers_undoes_the_first(self):
        both = SimpleNamespace(transformer=tiny_denoiser(), transformer_2=tiny_denoiser())
        both.transformer_2.blocks[0].attn1.processor = _OwnAttention()
        plain = call(both.transformer)
        with pytest.raises(MissedSiteError):
            accel.enable(both, tiny_plan(SPARSE))
        assert torch.equal(call(both.transformer, 0), plain)


@pytest.mark.usefixtures("unharmed")
def test_a_layout_of_another_type(model):
    enable = inspect.unwrap(accel.enable)  # the tests' type check would refuse it first
    with pytest.raises(AccelError, match=r"layout= is an accel.Layout.* not \(3, 5, 7\)"):
        enable(model, tiny_plan(SPARSE), layout=(3, 5, 7))


@pytest.mark.usefixtures("unharmed")
def test_a_layout_function_that_gives_another_type(model):
    with pytest.raises(AccelError, match=r"gives one of these, not \(3, 5, 7\)"):
        accel.enable(model, tiny_plan(SPARSE), layout=lambda model, call: (3, 5, 7))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"kep": 0.3}, "recipe 'sparsed': .*unexpected keyword argument 'kep'"),
        ({"keep": 1.5}, r"recipe 'sparsed': keep is a fraction in \(0, 1\], got 1.5"),
        ({"dense_start": 2.0}, r"schedule.dense_start is a fraction in \[0, 1\], got 2.0"),
        ({"block": (24, 24)}, "block must be two powers of two"),
    ],
    ids=["unknown", "keep", "schedule", "block"],
)
def test_parameters_of_a_recipe(model, parameters, message):
    from accel.pipelines.adapters import geometry_of

    with pytest.raises(PlanError, match=message):
        accel.recipe("sparsed", geometry_of(model), **parameters)


def test_an_unknown_recipe_is_named(model):
    from accel.pipelines.adapters import geometry_of

    with pytest.raises(PlanError, match="there is no recipe 'radail'; did you mean 'radial'"):
        accel.recipe("radail", geometry_of(model))


@pytest.mark.parametrize("prompt", ["", "   "], ids=["empty", "blank"])
def test_a_prompt_of_no_words_does_what_the_plain_pipeline_does(pipe, prompt):
    def generate():
        generator = torch.Generator().manual_seed(0)
        return pipe(prompt, generator=generator, output_type="latent", **CALL).frames

    plain = generate()
    accel.enable(pipe, "sparsed", strict=True)
    sparse = generate()
    assert sparse.shape == plain.shape
    assert sparse.isfinite().all()
    accel.disable(pipe)
    assert torch.equal(generate(), plain)
