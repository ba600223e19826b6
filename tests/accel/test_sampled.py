"""Sampled rows: against the float64 reference of the kernels, row by row."""

import pytest
import torch

from accel.blocking import Blocking
from accel.kernels.block_mask import BlockMask
from accel.kernels.reference import sparse_attention_reference
from accel.layout import Layout
from accel.sampled import SampledRows, evenly_spaced

LAYOUT = Layout.of((5, 7, 3), text_before=11, text_after=6, padding=4)
BATCH, HEADS, KV_HEADS, DIM, BLOCK = 3, 4, 2, 12, (16, 8)


def tensors():
    generator = torch.Generator().manual_seed(0)
    shapes = [(BATCH, n, LAYOUT.length, DIM) for n in (HEADS, KV_HEADS, KV_HEADS)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def blocks_of(blocking, batch=BATCH, seed=1):
    """Random ones; in one row of the second head nothing is kept."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, HEADS, blocking.q_blocks, blocking.kv_blocks)
    keep = torch.rand(shape, generator=generator) < 0.4
    keep[:, 1, 3] = False
    return keep


def reference(q, k, v, keep, blocking, rest):
    tokens = q.shape[2]
    mask = BlockMask.from_dense(keep, block=blocking.block, q_length=tokens, kv_length=tokens)
    length = blocking.layout.valid_length
    return sparse_attention_reference(
        q, k, v, mask, rest=rest, order=blocking.indices(), kv_length=length
    )


@pytest.mark.parametrize("rest", ["drop", "mean", "taylor"])
@pytest.mark.parametrize("order", ["thw", "hilbert"])
@pytest.mark.parametrize("batch", [1, BATCH])
def test_outputs_are_those_of_the_kernels(rest, order, batch):
    q, k, v = tensors()
    blocking = Blocking(LAYOUT, order, BLOCK)
    keep = blocks_of(blocking, batch)
    some = SampledRows.of(q, k, v, layout=LAYOUT, rows=23)
    found = some.output(keep, blocking, rest)
    expected = reference(q, k, v, keep, blocking, rest)[:, :, some.rows]
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=1e-5)
    if rest == "drop":
        assert (found[:, 1] == 0).all(-1).any()


def test_exact_is_dense_attention_and_values_are_the_rows_own():
    q, k, v = tensors()
    some = SampledRows.of(q, k, v, layout=LAYOUT, rows=torch.tensor([40, 2, 99]), scale=0.7)
    valid = LAYOUT.valid_length
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    dense = (q[:, :, [40, 2, 99]] @ k[:, :, :valid].mT * 0.7).softmax(-1) @ v[:, :, :valid]
    torch.testing.assert_close(some.exact, dense)
    assert torch.equal(some.values, v[:, :, [40, 2, 99]])


def test_recall_is_the_kept_share_of_each_row():
    q, k, v = tensors()
    blocking = Blocking(LAYOUT, "hwt", BLOCK)
    keep = blocks_of(blocking)
    some = SampledRows.of(q, k, v, layout=LAYOUT, rows=17)
    found = some.recall(keep, blocking)
    weights = (q @ k.repeat_interleave(2, 1)[:, :, : LAYOUT.valid_length].mT * DIM**-0.5).softmax(
        -1
    )
    place = blocking.indices().argsort()
    tokens = keep[:, :, place // 16][..., place[: LAYOUT.valid_length] // 8]
    expected = (weights * tokens).sum(-1)[:, :, some.rows].mean(-1)
    torch.testing.assert_close(found, expected)


def test_padding_may_hold_anything():
    """That of the layout, and that of a call whose elements have lengths of their own."""
    q, k, v = tensors()
    blocking = Blocking(LAYOUT, "hwt", BLOCK)
    keep, lengths = blocks_of(blocking), torch.tensor([126, 90, 70])
    rows = torch.arange(60)
    some = SampledRows.of(q, k, v, layout=LAYOUT, rows=rows, lengths=lengths)
    for b, length in enumerate((122, 90, 70)):
        for x in (q, k, v):
            x[b, :, length:] = torch.nan
        alone = SampledRows.of(
            *(x[b : b + 1] for x in (q, k, v)),
            layout=LAYOUT,
            rows=rows,
            lengths=lengths[b : b + 1],
        )
        for rest in ("drop", "mean", "taylor"):
            expected = some.output(keep, blocking, rest)[b]
            found = alone.output(keep[b : b + 1], blocking, rest)[0]
            torch.testing.assert_close(found, expected)
        torch.testing.assert_close(alone.exact[0], some.exact[b])
        recall = alone.recall(keep[b : b + 1], blocking)[0]
        torch.testing.assert_close(recall, some.recall(keep, blocking)[b])


def test_half_precision_is_computed_in_fp32():
    q, k, v = (x.bfloat16() for x in tensors())
    some = SampledRows.of(q, k, v, layout=LAYOUT)
    same = SampledRows.of(q.float(), k.float(), v.float(), layout=LAYOUT)
    assert torch.equal(some.exact, same.exact)
    assert some.exact.dtype == torch.float32


def test_rows_are_evenly_spaced_and_valid():
    assert evenly_spaced(4, 10).tolist() == [0, 3, 6, 9]
    assert evenly_spaced(9, 3).tolist() == [0, 1, 2]
    rows = SampledRows.of(*tensors(), layout=LAYOUT, rows=5).rows
    assert rows.tolist() == [0, 30, 60, 90, 121]
