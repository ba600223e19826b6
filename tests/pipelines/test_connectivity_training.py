"""Training the connectivity predictor on a tiny vision transformer."""

import copy

import pytest
import torch
from tiny_vit import build

import accel
from accel.blocking import Blocking
from accel.errors import UnsupportedModelError
from accel.estimators import Pooled
from accel.kernels.block_mass import block_mass
from accel.layout import Layout
from accel.pipelines.connectivity_training import calls_of, spread, start, train_connectivity
from accel.plan import Plan
from accel.ranking import recall_of

BLOCK = (16, 16)


@pytest.fixture(scope="module")
def model():
    found = build("vit_small_patch14_reg4_dinov2", 12, 13, depth=2)
    with torch.no_grad():
        for block in found.blocks:
            block.attn.qkv.weight.mul_(5)  # attention far from uniform
    return found


def batches(count, seed=0, size=(168, 182)):
    """Smooth images, so that neighbours are alike."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        small = torch.randn(2, 3, 7, 8, generator=generator)
        yield torch.nn.functional.interpolate(small, size, mode="bicubic") * 2


@pytest.fixture(scope="module")
def trained(model):
    return train_connectivity(model, batches(40), keep=0.3, block=BLOCK, lr=1e-2)


def recall(call, keep):
    mass, _ = block_mass(call.q, call.k, block=BLOCK, scale=call.scale, order=call.order)
    return float(recall_of(mass, keep).mean())


def test_it_learns_what_means_do_not_tell(model, trained):
    early, late = (sum(part) / 5 for part in (trained.losses[:5], trained.losses[-5:]))
    assert late < 0.9 * early
    found, means = [], []
    for images in batches(3, seed=9):
        for call, bands in zip(
            calls_of(model, images, "hilbert", BLOCK), trained.plan.sites.values(), strict=True
        ):
            found.append(recall(call, bands[0][0].select.select_in(call).keep))
            pooled = Pooled(keep=0.3, value_bias=False).select_in(call)
            means.append(recall(call, pooled.keep))
    assert sum(found) > sum(means)


@torch.no_grad()
def test_its_plan_runs_at_this_and_at_another_size(model, trained, tmp_path):
    plan = Plan.load(trained.plan.save(tmp_path / "plan.json"))
    other = build("vit_small_patch14_reg4_dinov2", 9, 17, depth=2)
    for one in (copy.deepcopy(model), other):
        accel.enable(one, plan, strict=True, guard=False)
        out = one(next(batches(1, size=one.patch_embed.img_size)))
        assert torch.isfinite(out).all()
        for row in accel.summary(one).rows:
            assert row.keep < 0.7
            assert row.recall > 0.3


def test_the_model_is_left_as_it_is(model):
    before = [p.clone() for p in model.parameters()]
    model.blocks[0].train()
    train_connectivity(model, batches(1), block=BLOCK)
    assert [block.training for block in model.blocks] == [True, False]
    model.eval()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_attention_that_nothing_is_seen_of_is_refused(model):
    other = copy.deepcopy(model)
    for block in other.blocks:
        block.attn.fused_attn = False
    with pytest.raises(UnsupportedModelError, match=r"of 2 sites .* 0 called scaled_dot"):
        train_connectivity(other, batches(1), block=BLOCK)


@torch.no_grad()
def test_targets_are_shares_of_the_true_mass(model):
    images = next(batches(1))
    calls = list(calls_of(model, images, "hilbert", BLOCK))
    assert len(calls) == 2
    blocking = Blocking(Layout.of((1, 12, 13), text_before=5), "hilbert", BLOCK)
    for call in calls:
        order = blocking.indices()
        q, k = (x[:, :, order].double() for x in (call.q, call.k))
        whole = (q @ k.mT * call.scale).softmax(-1)
        pad = -whole.shape[-1] % 16
        whole = torch.nn.functional.pad(whole, (0, pad, 0, pad))
        mass = whole.unflatten(3, (-1, 16)).unflatten(2, (-1, 16)).sum((3, 5))
        share, competing = spread(call)
        # prefix tokens fall in the first block
        assert not competing[..., 0].any()
        assert not competing[:, :, 0].any()
        mass = mass[..., 1:, 1:]
        expected = mass / mass.sum(-1, keepdim=True)
        assert torch.allclose(share[..., 1:, 1:].double(), expected, atol=1e-5)


def test_fewer_directions_start_as_a_projection():
    found = start(3, 8, 4, torch.Generator().manual_seed(0))
    assert found.shape == (2, 3, 24, 4)
    projection = found[0, 1, :8]
    assert torch.allclose(projection.mT @ projection, 2 * torch.eye(4), atol=1e-5)
    assert not found[:, :, 8:].any()
    with pytest.raises(ValueError, match="from 1 to the 8"):
        start(3, 8, 9, torch.Generator())
