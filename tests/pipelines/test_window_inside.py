"""Attention of a Swin by accel's kernel, which runs on a GPU; here by its plain path."""

import pytest
import torch
from windowed import falling, gathering, images, pruned, windowed

from accel.pipelines import window_hosts


@pytest.fixture
def calls(monkeypatch):
    """How often the kernel's way is taken, from now on wherever it can be."""
    taken, own = [], window_hosts.fused

    def spy(attn, x, masks, kind):
        taken.append(masks is not None)
        return own(attn, x, masks, kind)

    def may(attn, x):
        return hasattr(attn, "relative_position_bias_table") and attn.qkv.bias is not None

    monkeypatch.setattr(window_hosts, "runs_fused", may)
    monkeypatch.setattr(window_hosts, "fused", spy)
    return taken


@pytest.mark.parametrize("name", ["swin", "swin any size"])
@pytest.mark.parametrize("keeps", ["all", "falling"])
@torch.no_grad()
def test_the_kernels_way_is_the_hosts(name, keeps, calls, monkeypatch):
    model, size = windowed(name), (64, 80) if name == "swin" else (72, 104)
    x = images(name, size=size)
    gathering(model) if keeps == "all" else pruned(model, falling(model))
    found = model(x)
    assert len(calls) == 8
    assert {True, False} == set(calls), "blocks with masks and without"
    monkeypatch.setattr(window_hosts, "runs_fused", lambda *_: False)
    expected = model(x)
    assert len(calls) == 8
    assert float((found - expected).norm() / expected.norm()) < 2e-6


def test_here_the_host_computes(calls, monkeypatch):
    monkeypatch.undo()
    model = pruned(windowed("swin"), 0.5)
    assert not window_hosts.runs_fused(model.layers[0].blocks[0].attn, torch.zeros(2, 16, 16))
