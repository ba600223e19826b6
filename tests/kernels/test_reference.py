"""The references against torch's own dense attention and against each other."""

import pytest
import torch
import torch.nn.functional as F

from accel.kernels.block_mask import BlockMask
from accel.kernels.reference import block_mass_reference, sparse_attention_reference


@pytest.fixture
def tensors(generator):
    return [
        torch.randn(2, heads, n, 20, generator=generator) for heads, n in ((6, 63), *[(2, 111)] * 2)
    ]


@pytest.fixture
def keep(generator):
    keep = torch.rand(2, 6, 2, 7, generator=generator) < 0.5
    keep[..., 0] = True
    return keep


def mask_of(keep):
    return BlockMask.from_dense(keep, block=(32, 16), q_length=63, kv_length=111)


def dense(q, k, v, tokens=None):
    q, k, v = (x.double() for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=tokens, enable_gqa=True)


def tokens_of(keep):
    return keep.repeat_interleave(32, 2)[:, :, :63].repeat_interleave(16, 3)[..., :111]


def test_full_mask_is_sdpa(tensors):
    full = mask_of(torch.ones(6, 2, 7, dtype=torch.bool))
    torch.testing.assert_close(sparse_attention_reference(*tensors, full), dense(*tensors))


def test_mask_is_sdpa_with_a_token_mask(tensors, keep):
    out = sparse_attention_reference(*tensors, mask_of(keep))
    torch.testing.assert_close(out, dense(*tensors, tokens_of(keep)))


def test_padding_is_sdpa_with_a_token_mask(tensors, keep):
    lengths = torch.tensor([111, 16])
    valid = (torch.arange(111) < lengths[:, None])[:, None, None]
    out = sparse_attention_reference(*tensors, mask_of(keep), kv_length=lengths)
    torch.testing.assert_close(out, dense(*tensors, tokens_of(keep) & valid))


def test_mean_is_sdpa_on_extended_keys(tensors, keep):
    q, k, v = tensors
    sizes = torch.tensor([16] * 6 + [15])
    pooled = [torch.stack([x.mean(2) for x in y.double().split(16, 2)], 2) for y in (k, v)]
    extended = [torch.cat([x.double(), y], 2) for x, y in zip((k, v), pooled, strict=True)]
    bias = torch.cat(
        [
            tokens_of(keep).double().log(),
            torch.where(keep, 0, sizes).log().repeat_interleave(32, 2)[:, :, :63].double(),
        ],
        3,
    )
    out, lse = sparse_attention_reference(*tensors, mask_of(keep), rest="mean", return_lse=True)
    torch.testing.assert_close(out, dense(q, *extended, bias), atol=1e-6, rtol=1e-6)
    logits = q.double() @ extended[0].repeat_interleave(3, 1).mT / 20**0.5 + bias
    torch.testing.assert_close(lse, logits.logsumexp(3), atol=1e-6, rtol=1e-6)


def test_empty_row(tensors, keep):
    keep[0, 2, 1] = False
    out, lse = sparse_attention_reference(*tensors, mask_of(keep), return_lse=True)
    assert (out[0, 2, 32:] == 0).all()
    assert (lse[0, 2, 32:] == -torch.inf).all()
    assert out.isfinite().all()


def test_order_is_a_permutation_of_everything(generator, tensors):
    q = tensors[0]
    k, v = (x[:, :, :63] for x in tensors[1:])
    order = torch.stack([torch.randperm(63, generator=generator) for _ in range(6)])
    mask = BlockMask.from_dense(
        torch.rand(6, 2, 4, generator=generator) < 0.6, block=(32, 16), q_length=63, kv_length=63
    )
    out, lse = sparse_attention_reference(q, k, v, mask, order=order, return_lse=True)
    for h in range(6):
        one = BlockMask.from_dense(
            mask.to_dense()[0, h : h + 1], block=(32, 16), q_length=63, kv_length=63
        )
        parts = (q[:, h : h + 1], k[:, h // 3 : h // 3 + 1], v[:, h // 3 : h // 3 + 1])
        moved = sparse_attention_reference(
            *(x[:, :, order[h]] for x in parts), one, return_lse=True
        )
        torch.testing.assert_close(out[:, h, order[h]], moved[0][:, 0])
        torch.testing.assert_close(lse[:, h, order[h]], moved[1][:, 0])


def test_block_mass_is_the_block_sums_of_softmax(tensors):
    q, k, _ = tensors
    mass, lse = block_mass_reference(q, k, block=(32, 16))
    logits = q.double() @ k.double().repeat_interleave(3, 1).mT / 20**0.5
    weights = F.pad(logits.softmax(3), (0, 1, 0, 1)).view(2, 6, 2, 32, 7, 16)
    torch.testing.assert_close(mass, weights.sum((3, 5)))
    torch.testing.assert_close(lse, logits.logsumexp(3))
