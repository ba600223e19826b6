import pytest
import torch
from bench_cases import CASE

from accel.pipelines.bench import inputs as bench_inputs
from accel.pipelines.bench.inputs import inputs_of, per_head_order, random_mask, token_pairs

CPU = torch.device("cpu")
BLOCK = (64, 16)
BYTES = 3 * 2 * 301 * 3 * 40 * 4


@pytest.mark.parametrize(
    ("cache", "free", "copies"),
    [
        (0, 100 * BYTES, 2),
        (3 * BYTES, 100 * BYTES, 4),
        (3 * BYTES + 1, 100 * BYTES, 5),
        (10**9, 10**12, 16),
        (10 * BYTES, 20 * BYTES, 5),
        (10 * BYTES, BYTES, 2),
    ],
    ids=["least", "whole", "more", "most", "memory", "little"],
)
def test_copies_outgrow_the_cache_but_not_the_memory(cache, free, copies, monkeypatch):
    monkeypatch.setattr(bench_inputs, "_cache_bytes", lambda _: cache)
    monkeypatch.setattr(bench_inputs, "_free_bytes", lambda _: free)
    found = inputs_of(CASE, CPU)
    assert len(found) == copies
    assert all(x.shape == (2, 3, 301, 40) and x.stride(3) == 1 for some in found for x in some)
    assert not torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[1][2], inputs_of(CASE, CPU)[1][2])


def test_this_device_has_a_cache_and_memory():
    assert 1 << 16 <= bench_inputs._cache_bytes(CPU) < 1 << 33
    assert bench_inputs._free_bytes(CPU) > 1 << 20


def test_every_head_has_an_order_of_its_own():
    order = per_head_order(CASE, CPU)
    assert torch.equal(order.sort(-1).values, torch.arange(301).expand(3, -1))
    assert len(order.unique(dim=0)) == 3


class TestMask:
    @pytest.mark.parametrize(("keep", "count"), [(1.0, 19), (0.5, 10), (0.1, 2), (0.001, 1)])
    def test_uniform_rows_keep_equally_many(self, keep, count):
        mask = random_mask(CASE, BLOCK, keep, "uniform", CPU)
        assert (mask.counts == count).all()
        assert mask.counts.shape == (1, 3, 5)

    def test_uneven_rows_keep_their_share_of_it(self):
        mask = random_mask(CASE, BLOCK, 0.5, "uneven", CPU)
        assert mask.counts.min() >= round(0.4 * 0.5 * 19)
        assert mask.counts.max() <= round(1.6 * 0.5 * 19)
        assert len(mask.counts.unique()) > 4
        assert mask.indices.shape[3] == mask.counts.max()

    def test_heads_and_rows_keep_different_blocks(self):
        keep = random_mask(CASE, BLOCK, 0.5, "uniform", CPU).to_dense().flatten(0, 2)
        assert len(keep.unique(dim=0)) == len(keep)

    @pytest.mark.parametrize("block", [(64, 16), (16, 64), (128, 301)])
    @pytest.mark.parametrize("rows", ["uniform", "uneven"])
    def test_pairs_are_those_of_tokens(self, block, rows):
        mask = random_mask(CASE, block, 0.4, rows, CPU)
        tokens = mask.to_dense().repeat_interleave(block[0], 2).repeat_interleave(block[1], 3)
        assert token_pairs(mask) == int(tokens[:, :, :301, :301].sum())
