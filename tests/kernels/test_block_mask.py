"""The mask type: lists and dense form are one thing, and wrong lists are refused."""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention

from accel.kernels.block_mask import BlockMask

GEOMETRY = {"block": (32, 16), "q_length": 63, "kv_length": 111}  # 2 x 7 blocks


def random_keep(generator, *shape, keep=0.4):
    return torch.rand(*shape, generator=generator) < keep


@settings(derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 999),
    batch=st.integers(0, 3),
    heads=st.integers(1, 4),
    lengths=st.tuples(st.integers(1, 99), st.integers(1, 99)),
    block=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    keep=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_dense_round_trip(seed, batch, heads, lengths, block, keep):
    blocks = [-(-n // b) for n, b in zip(lengths, block, strict=True)]
    shape = (*([batch] if batch else []), heads, *blocks)
    dense = random_keep(torch.Generator().manual_seed(seed), *shape, keep=keep)
    mask = BlockMask.from_dense(dense, block=block, q_length=lengths[0], kv_length=lengths[1])
    assert (mask.batch, mask.heads) == (batch or 1, heads)
    assert (mask.to_dense() == dense).all()
    assert mask.to_dense().shape == (batch or 1, heads, *blocks)
    assert mask.keep == pytest.approx(dense.float().mean().item())
    per_head = dense.reshape(-1, heads, blocks[0] * blocks[1]).float().mean((0, 2))
    torch.testing.assert_close(mask.keep_per_head(), per_head)


def test_lists_are_sorted_and_padding_is_valid(generator):
    mask = BlockMask.from_dense(random_keep(generator, 6, 2, 7), **GEOMETRY)
    assert mask.indices.shape[3] == mask.counts.max()
    assert mask.indices.min() >= 0
    assert mask.indices.max() < 7
    for count, row in zip(mask.counts.flatten(), mask.indices.flatten(0, 2), strict=True):
        assert (row[:count].diff() > 0).all()


def test_lists_are_trimmed_to_a_width(generator):
    mask = BlockMask.from_dense(random_keep(generator, 6, 2, 7), **GEOMETRY)
    wide = torch.nn.functional.pad(mask.indices, (0, 7 - mask.indices.shape[3]))
    wide = dataclasses.replace(mask, indices=wide)
    width = int(mask.counts.max())
    trimmed = wide.trimmed(width)
    assert torch.equal(trimmed.indices, mask.indices)
    assert torch.equal(trimmed.to_dense(), mask.to_dense())
    assert trimmed.indices.untyped_storage().nbytes() == 4 * trimmed.indices.numel()
    assert trimmed.trimmed(width) is trimmed
    assert wide.trimmed(7) is wide


@pytest.mark.gpu
def test_lists_on_an_accelerator_are_trimmed_too(generator):
    keep = random_keep(generator, 6, 2, 7).cuda()
    mask = BlockMask.from_dense(keep, **GEOMETRY)
    assert mask.indices.shape[3] == 7
    width = int(mask.counts.max())
    assert torch.equal(mask.trimmed(width).to_dense()[0], keep)


def test_full():
    mask = BlockMask.full(3, **GEOMETRY)
    assert mask.to_dense().all()
    assert mask.keep == 1
    assert (mask.q_blocks, mask.kv_blocks) == (2, 7)


def test_to_the_same_device_is_itself():
    mask = BlockMask.full(3, **GEOMETRY)
    assert mask.to("cpu") is mask
    moved = mask.to("meta")
    assert moved.device.type == "meta"
    assert moved.block == mask.block


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_agrees(batch, generator):
    keep = random_keep(generator, batch, 3, 2, 7)
    keep[..., 0] = True  # an empty row is NaN in eager FlexAttention
    flex = BlockMask.from_dense(keep, **GEOMETRY).to_flex()
    assert flex.shape == (batch, 3, 63, 111)
    assert (flex.to_dense() == keep).all()
    q, k, v = (torch.randn(2, 3, n, 16, generator=generator) for n in (63, 111, 111))
    tokens = keep.repeat_interleave(32, 2)[:, :, :63].repeat_interleave(16, 3)[..., :111]
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=tokens)
    torch.testing.assert_close(flex_attention(q, k, v, block_mask=flex), dense)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": [[[1, 3]]]}, "counts must lie in 0..2 .*got 1..3"),
        ({"counts": [[[1, -1]]]}, "counts must lie in 0..2 .*got -1..1"),
        ({"indices": [[[[0, 7], [1, 2]]]]}, "0..6 .*got 0..7"),
        ({"indices": [[[[0, 1], [2, 1]]]]}, "strictly ascend"),
        ({"indices": [[[[0, 1], [2, 2]]]]}, "strictly ascend"),
        ({"counts": [[[1, 2, 1]]]}, r"\[batch, heads, 2\] for 63 queries"),
        ({"block": (0, 16)}, "two positive sizes"),
        ({"q_length": 0}, "at least 1 token"),
    ],
)
def test_refuses(change, message):
    good = {"counts": [[[1, 2]]], "indices": [[[[0, 5], [1, 2]]]]}
    values = GEOMETRY | good | change
    for name in ("counts", "indices"):
        values[name] = torch.tensor(values[name], dtype=torch.int32)
    if change.get("counts", [[[0, 0]]])[0][0].__len__() == 3:
        values["indices"] = torch.zeros(1, 1, 3, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        BlockMask(**values)


def test_from_dense_refuses_another_geometry():
    with pytest.raises(ValueError, match=r"bool \[heads, 2, 7\].*63 queries and 111 keys"):
        BlockMask.from_dense(torch.ones(3, 2, 6, dtype=torch.bool), **GEOMETRY)


def test_rows_are_numbered_by_heads_and_longest_first():
    counts = torch.tensor([[[2, 3], [3, 0]], [[1, 3], [2, 2]]], dtype=torch.int32)
    indices = torch.arange(7, dtype=torch.int32).expand(2, 2, 2, 7).contiguous()
    mask = BlockMask(counts=counts, indices=indices, **GEOMETRY)
    # 5 blocks in the first head, 4 in the third, as in the fourth, 3 in the second
    assert mask.longest_first.tolist() == [1, 0, 5, 4, 6, 7, 2, 3]
    assert mask.longest_first.dtype == torch.int32
    again = dataclasses.replace(mask, counts=counts.flip(0))
    assert again.longest_first.tolist() == [5, 4, 1, 0, 2, 3, 6, 7]
