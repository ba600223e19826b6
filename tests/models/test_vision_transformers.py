"""Block-sparse attention in timm's vision transformers, against the models under their masks."""

import copy

import pytest
import torch
from reference import masked
from tiny_vit import ARCHITECTURES, build, error, images

import accel
from accel.choice import Choice
from accel.errors import PlanError
from accel.layout import Layout
from accel.pattern import Window
from accel.pipelines.adapters import geometry_of, sites_of
from accel.pipelines.enable import session_of
from accel.plan import Plan
from accel.recipes import RECIPES
from accel.schedule import Schedule

BLOCK = (16, 16)
CHOICES = (
    Choice(Window(h=0.2, w=0.3)),
    Choice(Window(h=0.15, w=0.2), order="hilbert"),
    Choice(Window(h=0.1)),
)
ROWS, COLUMNS = 9, 13
# of models without windows
IMAGES = [
    name
    for name, made in RECIPES.items()
    if made.vision and made.demand is None and name != "sparsevit"
]


def plan_of(model):
    geometry = geometry_of(model)
    sites = {site.name: (CHOICES,) for site in geometry.sites}
    return Plan.of("sparse", geometry, sites, schedule=Schedule(dense_start=0.0), block=BLOCK)


def sharp(name, **changes):
    """A model whose attention is far from uniform."""
    model = build(name, ROWS, COLUMNS, depth=3, **changes)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(4)
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_plan_is_the_model_under_its_mask(name):
    """On a grid that no block divides; class, distillation and register tokens are all kept."""
    plain = sharp(name)
    model, x = copy.deepcopy(plain), images(plain)
    layout = Layout.of((1, ROWS, COLUMNS), text_before=plain.num_prefix_tokens)
    sites = [site.name for site in sites_of(plain)]
    assert sites == [f"blocks.{i}.attn" for i in range(3)]
    with masked(plain, {site: [layout] * 3 for site in sites}, CHOICES, BLOCK) as met:
        expected = plain(x)
    assert met == sites
    accel.enable(model, plan_of(model), strict=True, guard=False)
    assert error(model(x), expected) < 1e-4
    assert error(model(x), plain(x)) > 1e-3
    for row in accel.summary(model).rows:
        assert row.calls == 1
        assert row.keep < 0.9
    accel.disable(model)
    assert torch.equal(model(x), plain(x))


@torch.no_grad()
def test_every_tap_and_another_resolution():
    plain = sharp("vit_small_patch14_reg4_dinov2", dynamic_img_size=True, dynamic_img_pad=True)
    model, x = copy.deepcopy(plain), torch.randn(2, 3, 100, 200)
    layout = Layout.of((1, 8, 15), text_before=5)
    with masked(plain, {f"blocks.{i}.attn": [layout] * 2 for i in range(3)}, CHOICES, BLOCK):
        last, taps = plain.forward_intermediates(x)
    accel.enable(model, plan_of(model), strict=True, guard=False)
    found, seen = model.forward_intermediates(x)
    for one, expected in zip([found, *seen], [last, *taps], strict=True):
        assert one.shape == expected.shape
        assert error(one, expected) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("recipe", IMAGES)
def test_recipes_for_images(recipe):
    """A call is a whole run: no dense step before it, whatever the recipe's schedule."""
    plain = sharp("deit3_small_patch16_224")
    model, x = copy.deepcopy(plain), images(plain)
    accel.enable(model, recipe, strict=True, guard=False)
    session = session_of(model)
    out = model(x)
    assert torch.isfinite(out).all()
    assert not session.notices
    rows = accel.summary(model).rows
    assert [row.site for row in rows] == [f"blocks.{i}.attn" for i in range(3)]
    assert not session.plan.schedule.refresh
    assert session.plan.schedule.n_bands == 1
    if recipe in ("full", "half"):
        assert error(out, plain(x)) < (1e-5 if recipe == "full" else 1e-2)
    elif session.plan.tokens is None:
        assert session.plan.schedule.dense_start == 0
        assert session.plan.wants_sparse
        assert any(row.phase == "band 0" and row.kernels != ("dense",) for row in rows)
    else:
        assert rows[-1].keep < 0.9
    accel.disable(model)
    assert torch.equal(model(x), plain(x))


def test_checkpointed_gradients_are_the_models():
    """A checkpoint runs a block without gradients first: it must not be sparse there."""
    plain = sharp("vit_tiny_patch16_224")
    model, x = copy.deepcopy(plain), images(plain)
    accel.enable(model, plan_of(model), guard=False)
    for one in (plain, model):
        one.set_grad_checkpointing()
        one(x.clone().requires_grad_()).square().sum().backward()
    assert any("gradients" in notice for notice in session_of(model).notices)
    for weight, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert (weight.grad is None) == (expected.grad is None)
        assert expected.grad is None or torch.equal(weight.grad, expected.grad)


def test_a_plan_that_would_be_dense_is_refused():
    """A call is a run of one step, which is among the first share of its steps."""
    model = sharp("vit_tiny_patch16_224")
    plan = accel.recipe("sparge", geometry_of(model), dense_start=0.2)
    with pytest.raises(PlanError, match=r"dense_start 0\.2, but one call .* give dense_start 0"):
        accel.enable(model, plan)
    accel.enable(model, accel.recipe("sparge", geometry_of(model), dense_start=1.0))
