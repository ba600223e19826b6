"""Vision transformers with merged and fused tokens against the models themselves, and loops."""

import copy
from dataclasses import replace

import pytest
import timm
import torch
from tiny_vit import (
    ARCHITECTURES,
    CLASS,
    KEEPS,
    MASS,
    MERGE,
    blocks_of,
    build,
    enable,
    error,
    images,
    plan_of,
)
from token_loops import reference

import accel
from accel.errors import AccelError
from accel.pipelines.handle import HANDLE
from accel.schedule import Schedule
from accel.token_scores import mass_scores

EXACT = 1e-6


@pytest.fixture(params=ARCHITECTURES, scope="module")
def plain(request):
    return build(request.param)


class TestExactness:
    @torch.no_grad()
    def test_keep_1_is_the_model_bit_for_bit(self, plain):
        model, x = copy.deepcopy(plain), images(plain)
        enable(model, (1.0,) * 4)
        assert torch.equal(model(x), plain(x))
        # so few tokens that none is left out: blocks are taken, and are their own
        enable(model, (0.999,) * 4)
        assert torch.equal(model(x), plain(x))
        accel.disable(model)
        assert torch.equal(model(x), plain(x))
        assert not any("forward" in m.__dict__ for m in model.modules())

    @torch.no_grad()
    @pytest.mark.parametrize("proportional", [True, False])
    def test_merging_nothing_is_the_model(self, plain, proportional):
        model, x = copy.deepcopy(plain), images(plain)
        enable(model, (0.999,) * 4, proportional=proportional)
        blocks_of(model).always = True
        assert error(model(x), plain(x)) < EXACT
        for out_indices in (None, [0, 2]):
            last, taps = model.forward_intermediates(x, out_indices, norm=True)
            expected, wanted = plain.forward_intermediates(x, out_indices, norm=True)
            for found, one in zip([last, *taps], [expected, *wanted], strict=True):
                assert found.shape == one.shape
                assert error(found, one) < EXACT


class TestMethods:
    @torch.no_grad()
    @pytest.mark.parametrize("how", [MERGE, {**MERGE, "proportional": False}, MASS, CLASS], ids=str)
    @pytest.mark.parametrize(
        "name",
        ["deit3_small_patch16_224", "vit_small_patch14_reg4_dinov2", "eva02_tiny_patch14_224"],
    )
    def test_tokens_are_those_of_loops(self, name, how):
        model = build(name, **{"qk_norm": True} if name.startswith("deit3") else {})
        for block in model.blocks:
            block.attn.qkv.weight.mul_(4)  # attention far from uniform
        x = images(model)
        expected = [reference(model, image, KEEPS, **how) for image in x]
        enable(model, KEEPS, **how)
        taps = model.forward_intermediates(
            x, output_fmt="NLC", intermediates_only=True, return_prefix_tokens=True
        )
        for depth, (patches, prefix) in enumerate(taps):
            found = torch.cat([prefix, patches], 1).double()
            wanted = torch.stack([image[depth] for image in expected])
            assert error(found, wanted) < 1e-4, depth
        # the model's own head sees the last of them
        assert error(model.forward_features(x), model.norm(wanted.float())) < 1e-4

    @torch.no_grad()
    def test_a_batch_is_its_images_and_equal_calls_are_equal(self, plain):
        model, x = copy.deepcopy(plain), images(plain)
        enable(model, KEEPS, **MERGE)
        together = model(x)
        assert torch.equal(model(x), together)
        for i in range(3):
            assert torch.allclose(model(x[i : i + 1])[0], together[i], atol=1e-5)
        assert not torch.allclose(together, plain(x), atol=1e-3)

    @torch.no_grad()
    @pytest.mark.parametrize("pool", ["avg", "map", "token"])
    def test_pooling_sees_every_patch(self, pool):
        model = build(global_pool=pool)
        x = images(model)
        enable(model, KEEPS, **MERGE)
        features = model.forward_features(x)
        assert features.shape == (3, 36, 24)
        expected = model(x)
        accel.disable(model)
        assert torch.equal(model.forward_head(features), expected)


class TestTaps:
    @torch.no_grad()
    def test_features_only(self):
        model = build(features_only=True, out_indices=(0, 2))
        plain, x = copy.deepcopy(model), torch.randn(3, 3, 80, 112)
        enable(model, (0.8, 0.6, 0.5), **MERGE)
        found, expected = model(x), plain(x)
        assert [f.shape for f in found] == [f.shape for f in expected]
        assert [f.shape[2:] for f in found] == [(5, 7)] * 2
        assert 1e-4 < error(found[1], expected[1]) < 1

    @torch.no_grad()
    def test_a_tap_changes_nothing_behind_it(self, plain):
        model, x = copy.deepcopy(plain), images(plain)
        enable(model, KEEPS, **MERGE)
        last, taps = model.forward_intermediates(x, [1])
        assert len(taps) == 1
        assert torch.equal(last, model.forward_features(x))
        early = model.forward_intermediates(x, [1], stop_early=True, intermediates_only=True)
        assert torch.equal(early[0], taps[0])

    @torch.no_grad()
    def test_hooks_on_blocks_see_every_patch(self):
        model = build()
        x = images(model)
        enable(model, KEEPS, **MERGE)
        expected = model(x)
        wanted = model.forward_intermediates(x, [1, 2], output_fmt="NLC", intermediates_only=True)
        seen = []
        model.blocks[1].register_forward_hook(lambda m, a, out: seen.append(out))
        model.blocks[3].register_forward_pre_hook(lambda m, a: seen.append(a[0]))
        assert torch.equal(model(x), expected)
        for found, one in zip(seen, wanted, strict=True):
            assert torch.equal(found[:, 1:], one)


class TestArguments:
    @torch.no_grad()
    @pytest.mark.parametrize("how", [MERGE, MASS, CLASS], ids=str)
    @pytest.mark.parametrize("kind", ["keys", "matrix", "causal"])
    def test_masks_of_the_caller(self, kind, how):
        model = build()
        x = images(model)
        more = {"is_causal": True}
        if kind != "causal":
            shape = (3, 1, 1, 36) if kind == "keys" else (36, 36)
            more = {"attn_mask": torch.rand(shape) > 0.3}
            more["attn_mask"][..., 0] = True
        expected = model(x, **more)
        assert error(model(x), expected) > 1e-4
        enable(model, (0.999,) * 4, **how)
        blocks_of(model).always = True
        if how is MASS and kind != "keys":
            with pytest.raises(AccelError, match="mask that differs"):
                model(x, **more)
            return
        if how["method"] == "merge":
            assert error(model(x, **more), expected) < EXACT
        enable(model, KEEPS, **how)
        assert torch.isfinite(model(x, **more)).all()

    def test_a_hook_that_replaces_what_a_block_gives_with_gradients(self):
        """The next block's input is new, at an address that an earlier call had."""
        model = build()
        enable(model, KEEPS, **MERGE)
        model.blocks[0].register_forward_hook(lambda module, args, out: out * 1.5)
        for seed in range(16):
            x = images(model, seed=seed)
            with torch.no_grad():
                expected = model(x)
            out = model(x)
            out.square().sum().backward()
            torch.testing.assert_close(out.detach(), expected)
            del out

    def test_a_dense_plan_reduces_nothing(self):
        model = build()
        x = images(model)
        expected = model(x)
        plan = plan_of(model, KEEPS, **MERGE)
        accel.enable(model, replace(plan, schedule=Schedule(dense_start=1.0)))
        assert torch.equal(model(x), expected)

    @torch.no_grad()
    def test_a_plan_that_is_refused_leaves_the_one_before_it(self, caplog):
        model = build()
        accel.enable(model, plan_of(model, (1.0,) * 4))
        model.blocks[1].attn.fused_attn = False
        before = getattr(model, HANDLE)._interception
        with pytest.raises(AccelError):
            enable(model, KEEPS, **MERGE)
        assert before.intact
        model.blocks[1].attn.fused_attn = True
        model(images(model))
        assert "was replaced after" not in caplog.text

    @torch.no_grad()
    def test_masses_of_masks_by_head_are_refused_and_of_wide_heads_told(self):
        q, k = torch.randn(2, 2, 2, 5, 8)
        with pytest.raises(AccelError, match="differs between them"):
            mass_scores(q, k, scale=1.0, bias=torch.randn(2, 1, 5))
        keys = torch.randn(1, 1, 5)
        expected = mass_scores(q, k, scale=1.0, bias=keys[None].expand(2, 1, 1, 5))
        assert torch.equal(mass_scores(q, k, scale=1.0, bias=keys), expected)
        wide = torch.randn(1, 1, 3, 256)
        with pytest.raises(AccelError, match="less than 256 channels"):
            mass_scores(wide, wide, scale=1.0, bias=torch.zeros(3))

    @torch.no_grad()
    @pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
    def test_another_resolution(self, name):
        model = build(name, dynamic_img_size=True)
        patch = ARCHITECTURES[name][0]
        x = torch.randn(2, 3, 9 * patch, 4 * patch)
        expected = model(x)
        enable(model, (0.999,) * 4)
        blocks_of(model).always = True
        assert error(model(x), expected) < EXACT
        enable(model, KEEPS, **MERGE)
        assert model.forward_features(x).shape[1] == 37

    @torch.no_grad()
    def test_images_that_no_patch_divides(self):
        model = build(dynamic_img_size=True, dynamic_img_pad=True)
        x = torch.randn(3, 3, 75, 100)
        expected = model(x)
        enable(model, (0.999,) * 4)
        blocks_of(model).always = True
        assert error(model(x), expected) < EXACT
        enable(model, KEEPS, **MERGE)
        last, taps = model.forward_intermediates(x)
        assert [t.shape[2:] for t in taps] == [(5, 7)] * 4
        assert last.shape[1] == 36

    @torch.no_grad()
    @pytest.mark.parametrize("how", [MERGE, MASS, CLASS], ids=str)
    def test_half_precision_and_autocast(self, how):
        model = build()
        x = images(model)
        enable(model, KEEPS, **how)
        expected = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert error(model(x).float(), expected) < 0.1
        model.to(torch.bfloat16)
        assert error(model(x.to(torch.bfloat16)).float(), expected) < 0.1


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("size", [(224, 224), (200, 248)])
@pytest.mark.parametrize(
    "name", [*(n for n in ARCHITECTURES if "base" not in n), "eva02_small_patch14_224"]
)
def test_architectures_at_their_own_size(name, size):
    """Logits and all taps, with every block on the way of reduced ones."""
    torch.manual_seed(0)
    model = timm.create_model(name, dynamic_img_size=True, dynamic_img_pad=True).eval()
    for weight in model.parameters():  # scales that begin at next to nothing hide a block
        if weight.ndim == 1:
            weight += 0.1 * torch.randn_like(weight)
    x = torch.randn(1, 3, *size)
    expected, (last, taps) = model(x), model.forward_intermediates(x)
    enable(model, (1 - 1e-6,) * len(model.blocks))
    blocks_of(model).always = True
    assert error(model(x), expected) < EXACT
    found = model.forward_intermediates(x)
    for one, wanted in zip([found[0], *found[1]], [last, *taps], strict=True):
        assert error(one, wanted) < EXACT
    accel.enable(model, "tome")
    assert torch.isfinite(model(x)).all()
