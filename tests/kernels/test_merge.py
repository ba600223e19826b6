"""Merging: the attention over a union of key sets, from that over each."""

import pytest
import torch
from paths import take

from accel.kernels.attention import sparse_attention
from accel.kernels.block_mask import BlockMask
from accel.kernels.estimator_reference import merge_reference
from accel.kernels.merge import merge as operation


@pytest.fixture(params=["torch", "triton"])
def merge(request, monkeypatch):
    """Merging, in every way it is computed."""
    path = take(request.param, monkeypatch)
    return lambda parts: path.run(operation, parts)


def parts_of(count, generator, shape=(3, 2, 75, 72), dtype=torch.float32):
    """Parts of very different weights; rows empty in some parts, rows empty in all of them."""
    parts = []
    for _ in range(count):
        out = torch.randn(shape, generator=generator).to(dtype)
        lse = torch.randn(shape[:3], generator=generator) * 20
        lse[torch.rand(lse.shape, generator=generator) < 0.3] = -torch.inf
        lse[:, :, ::7] = -torch.inf
        parts.append((out, lse))
    return parts


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_matches_reference(merge, count, dtype, generator):
    parts = parts_of(count, generator, dtype=dtype)
    out, lse = merge(parts)
    truth, exact = merge_reference(parts)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    # the one rounding is the last
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), truth, atol=2e-6, rtol=max(step, 2e-6))
    torch.testing.assert_close(lse.double(), exact, atol=1e-5, rtol=1e-6)
    assert (out[:, :, ::7] == 0).all()
    assert lse[:, :, ::7].isneginf().all()


def test_large_weights_do_not_overflow(merge, generator):
    parts = [(out, lse + 300) for out, lse in parts_of(2, generator)]
    lower = merge([(out, lse - 300) for out, lse in parts])
    out, lse = merge(parts)
    torch.testing.assert_close(out, lower[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(lse, lower[1] + 300)


def test_equals_attention_over_all_keys(merge, generator):
    q = torch.randn(2, 4, 50, 24, generator=generator)
    k, v = (torch.randn(2, 2, 96, 24, generator=generator) for _ in range(2))
    owner = torch.randint(3, (4, 4, 6), generator=generator)
    sizes = {"block": (16, 16), "q_length": 50, "kv_length": 96}
    masks = [BlockMask.from_dense(owner == i, **sizes) for i in range(3)]
    parts = [sparse_attention(q, k, v, m, return_lse=True, backend="cpu") for m in masks]
    full = BlockMask.full(4, **sizes)
    expected = sparse_attention(q, k, v, full, return_lse=True, backend="cpu")
    for x, y in zip(merge(parts), expected, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


def test_what_an_empty_row_holds_does_not_matter(merge, generator):
    parts = parts_of(3, generator)
    expected = merge(parts)
    for out, lse in parts:
        out[lse.isneginf()] = torch.nan
    for x, y in zip(merge(parts), expected, strict=True):
        assert torch.equal(x, y)


def test_strided_parts(merge, generator):
    parts = parts_of(2, generator)
    expected = merge(parts)
    (first, first_lse), (second, second_lse) = parts
    strided = [
        (first.transpose(1, 2).contiguous().transpose(1, 2), first_lse.mT.contiguous().mT),
        (second.mT.contiguous().mT, second_lse),
    ]
    for x, y in zip(merge(strided), expected, strict=True):
        assert torch.equal(x, y)
        assert x.is_contiguous()


def test_refuses(generator):
    (out, lse), other = parts_of(2, generator)
    with pytest.raises(ValueError, match="at least one part"):
        operation([])
    # where shapes are checked, a TypeError comes first
    with pytest.raises((ValueError, TypeError), match="part"):
        operation([(out, lse), (other[0][:, :1], other[1][:, :1])])
    with pytest.raises(ValueError, match="share dtype and device"):
        operation([(out, lse), (other[0].half(), other[1])])
    with pytest.raises(NotImplementedError, match="no_grad"):
        operation([(out.requires_grad_(), lse)])
