"""Every dense attention is softmax(q kT / sqrt(dim)) v, and what is expected to be fastest too."""

import sys
from types import SimpleNamespace

import pytest
import torch

from accel import dense
from accel.dense import dense_attentions, usual_dense

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ROWS = 300  # more than the rows of one chunk, and no multiple of them


def attention(q, k, v):
    q, k, v = (x.double() for x in (q, k, v))
    return (q @ k.mT * q.shape[3] ** -0.5).softmax(-1) @ v


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_agree(device, dtype, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(3, ROWS, 2, 64, generator=generator).to(device, dtype).transpose(1, 2)
        for _ in range(3)
    )
    truth = attention(q, k, v)
    monkeypatch.setattr(dense, "has_bf16", lambda _: True)
    found = dense_attentions(torch.device(device), dtype)
    ran = 0
    for attend in (usual_dense, *found.values()):
        try:
            out = attend(q, k, v)
        except RuntimeError:
            # one that is not made for this dtype or card
            continue
        ran += 1
        error = float((out.double() - truth).norm() / truth.norm())
        assert error < (1e-6 if dtype == torch.float32 else 8e-3)
    assert ran >= 2
    assert device == "cuda" or ran == 1 + len(found)


@pytest.mark.parametrize("able", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_plain_products_take_part_where_a_processor_multiplies_bf16(able, dtype, monkeypatch):
    monkeypatch.setattr(dense, "has_bf16", lambda _: able)
    found = dense_attentions(torch.device("cpu"), dtype)
    assert ("matmul" in found) == (able and dtype == torch.bfloat16)


def tokens_first(q, k, v):
    """Attention as packages beside torch have it: [batch, tokens, heads, dim]."""
    assert q.shape == (3, ROWS, 2, 64)
    return attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


@pytest.mark.parametrize("pair", [True, False])
def test_packages_take_part_where_they_are_installed(pair, monkeypatch):
    flash = (lambda *qkv: (tokens_first(*qkv), None)) if pair else tokens_first
    modules = {
        "flash_attn_interface": SimpleNamespace(flash_attn_func=flash),
        "xformers": SimpleNamespace(),
        "xformers.ops": SimpleNamespace(memory_efficient_attention=tokens_first),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(dense, "find_spec", modules.get)
    found = dense_attentions(torch.device("cuda"), torch.float16)
    assert list(found) == [*dense.SDPA, "flash-attn-3", "xformers"]
    q, k, v = torch.randn(3, 3, 2, ROWS, 64).double()
    for name in ("flash-attn-3", "xformers"):
        torch.testing.assert_close(found[name](q, k, v), attention(q, k, v))


def test_packages_that_are_not_installed_are_left_out(monkeypatch):
    monkeypatch.setattr(dense, "find_spec", lambda _: None)
    assert list(dense_attentions(torch.device("cuda"), torch.float16)) == list(dense.SDPA)
