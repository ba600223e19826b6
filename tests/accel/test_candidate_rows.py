"""Candidates by block sums: what `SampledRows` has for each of them alone."""

import pytest
import torch

from accel.blocking import Blocking
from accel.candidate_rows import RowBlocks, candidate_outputs
from accel.layout import Layout
from accel.order import inverse
from accel.sampled import SampledRows

LAYOUT = Layout.of((5, 7, 3), text_before=11, text_after=6, padding=9)
BATCH, HEADS, KV_HEADS, DIM, BLOCK = 3, 4, 2, 12, (16, 2)  # 63 key blocks: two groups, padding
RESTS = ("drop", "taylor", "mean", "drop", "taylor")


@pytest.mark.parametrize("order", ["thw", "wth"])
def test_outputs_and_recalls_are_those_of_every_candidate_alone(order):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(BATCH, heads, LAYOUT.length, DIM, generator=generator)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    blocking = Blocking(LAYOUT, order, BLOCK)
    shape = (len(RESTS), HEADS, blocking.q_blocks, blocking.kv_blocks)
    keep = torch.rand(shape, generator=generator) < 0.4
    keep[:, 1, 3] = False
    keep[4, 2] = True
    keep[1, :, :, 5] = True
    some = SampledRows.of(q, k, v, layout=LAYOUT, rows=23)
    indices = blocking.indices()
    place = some.rows if indices is None else inverse(indices)[some.rows]
    masks = [RowBlocks.of(mask, place // BLOCK[0]) for mask in keep]
    outputs, recalls = candidate_outputs(some, blocking, masks, RESTS)
    first = SampledRows.of(q[:1], k[:1], v[:1], layout=LAYOUT, rows=23)
    for mask, rest, output, recall in zip(keep, RESTS, outputs, recalls, strict=True):
        expected = first.output(mask[None], blocking, rest)[0]
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(recall, first.recall(mask[None], blocking)[0])
    assert (outputs[0, 1] == 0).all(-1).any()  # a row without keys
    torch.testing.assert_close(masks[0].keep, keep[0].float().mean((1, 2)))
