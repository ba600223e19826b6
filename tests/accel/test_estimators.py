"""Estimators: against float64 brute force and naive loops, and the rules they all share."""

import json
import re
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accel.blocking import Blocking
from accel.estimators import (
    AdaptiveBlockMass,
    Antidiagonal,
    BlockMassTopK,
    Pooled,
    estimator_from_dict,
)
from accel.layout import Layout
from accel.ranking import recall_of, top_blocks, top_mass

LAYOUT = Layout.of((5, 7, 3), text_before=11, text_after=6, padding=4)
BLOCKING = Blocking(LAYOUT, "hilbert", (16, 8))
VISUAL_ONLY = Blocking(Layout.of((5, 7, 3)), "hwt", (16, 8))
ALL = [
    BlockMassTopK(0.3),
    BlockMassTopK(0.3, by_grid=True),
    BlockMassTopK(0.3, every=4),
    AdaptiveBlockMass(0.3, recall_target=0.5),
    Antidiagonal(0.6, stride=4),
    Pooled(0.3),
    Pooled(0.3, value_bias=False),
]
BY_NAME = {"argvalues": ALL, "ids": lambda estimator: estimator.name}


def tensors(layout=LAYOUT, batch=3, heads=4, kv_heads=2, dim=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, n, layout.length, dim) for n in (heads, kv_heads, kv_heads)]
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    # heads of different sharpness, so that recalls differ
    return q * torch.linspace(0.5, 3, heads)[:, None, None], k, v


def ordered(blocking, *xs):
    order = blocking.indices()
    return [x.double() if order is None else x[:, :, order].double() for x in xs]


def brute_mass(q, k, blocking):
    """Softmax over the valid keys, summed by blocks, in float64."""
    valid = blocking.layout.valid_length
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    q, k = ordered(blocking, q, k)
    weight = torch.softmax(q[:, :, :valid] @ k[:, :, :valid].mT * q.shape[-1] ** -0.5, dim=-1)
    q_block, kv_block = blocking.block
    mass = torch.zeros(*q.shape[:2], blocking.q_blocks, blocking.kv_blocks, dtype=torch.float64)
    for i in range(blocking.q_blocks):
        for j in range(blocking.kv_blocks):
            part = weight[:, :, i * q_block : (i + 1) * q_block, j * kv_block : (j + 1) * kv_block]
            mass[:, :, i, j] = part.sum((2, 3))
    return mass


# --- what holds for all --------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", **BY_NAME)
@pytest.mark.parametrize("blocking", [BLOCKING, VISUAL_ONLY], ids=["joint", "visual"])
def test_text_padding_and_rows(estimator, blocking):
    keep = estimator.select(*tensors(blocking.layout), blocking=blocking).keep
    assert keep.shape == (3, 4, blocking.q_blocks, blocking.kv_blocks)
    assert torch.equal(keep, blocking.force(keep))
    assert keep.any(-1).all()
    assert not keep.all()


@pytest.mark.parametrize("blocking", [BLOCKING, VISUAL_ONLY], ids=["joint", "visual"])
@pytest.mark.parametrize(
    "estimator",
    [BlockMassTopK(1.0), AdaptiveBlockMass(1.0), Antidiagonal(1.0), Pooled(1.0)],
    ids=lambda e: e.kind,
)
def test_keep_one_keeps_all(estimator, blocking):
    found = estimator.select(*tensors(blocking.layout), blocking=blocking)
    assert torch.equal(found.keep, blocking.force(torch.ones_like(found.keep)))
    if found.recall is not None:
        torch.testing.assert_close(found.recall, torch.ones(3, 4))


@pytest.mark.parametrize("estimator", **BY_NAME)
def test_batch_elements_do_not_meet(estimator):
    q, k, v = tensors()
    turned = torch.tensor([2, 0, 1])
    keep = estimator.select(q, k, v, blocking=BLOCKING).keep
    again = estimator.select(q[turned], k[turned], v[turned], blocking=BLOCKING).keep
    assert torch.equal(again, keep[turned])


@pytest.mark.parametrize("estimator", **BY_NAME)
def test_grouped_heads_equal_repeated_ones(estimator):
    q, k, v = tensors()
    keep = estimator.select(q, k, v, blocking=BLOCKING).keep
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    assert torch.equal(estimator.select(q, k, v, blocking=BLOCKING).keep, keep)


@pytest.mark.parametrize("estimator", **BY_NAME)
def test_an_order_is_a_permutation_beforehand(estimator):
    q, k, v = tensors()
    order = BLOCKING.indices()
    natural = Blocking(LAYOUT, "thw", BLOCKING.block)
    keep = estimator.select(q, k, v, blocking=BLOCKING).keep
    again = estimator.select(*(x[:, :, order] for x in (q, k, v)), blocking=natural).keep
    assert torch.equal(keep, again)


@pytest.mark.parametrize("estimator", **BY_NAME)
def test_padding_is_not_looked_at(estimator):
    """Neither the layout's nor this call's; each element as if it were alone at its length."""
    q, k, v = tensors()
    lengths = torch.tensor([126, 118, 40])
    found = estimator.select(q, k, v, blocking=BLOCKING, kv_length=lengths)
    for b, length in enumerate(lengths.clamp(max=LAYOUT.valid_length).tolist()):
        spoiled = [x[b : b + 1].clone() for x in (q, k, v)]
        for x in spoiled:
            x[:, :, length:] = 1e3
        alone = estimator.select(*spoiled, blocking=BLOCKING, kv_length=length)
        assert torch.equal(found.keep[b : b + 1], alone.keep)
    order = BLOCKING.indices()
    held = torch.zeros(16, dtype=torch.bool)
    held[torch.arange(126)[order < 40] // 8] = True
    assert not found.keep[2][..., ~held].any()


@pytest.mark.parametrize("estimator", **BY_NAME)
def test_half_precision_selects_by_fp32_scores(estimator):
    q, k, v = (x.bfloat16() for x in tensors())
    half = estimator.select(q, k, v, blocking=BLOCKING).keep
    full = estimator.select(q.float(), k.float(), v.float(), blocking=BLOCKING).keep
    assert torch.equal(half, full)


@pytest.mark.parametrize("estimator", [*ALL, BlockMassTopK(1), Pooled(1)], ids=lambda e: e.name)
def test_json_round_trip(estimator):
    again = estimator_from_dict(json.loads(json.dumps(estimator.to_dict())))
    assert again == estimator
    assert hash(again) == hash(estimator)
    assert again.name == estimator.name


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"kind": "poold", "keep": 0.5}, "did you mean 'pooled'"),
        ({"kind": "pooled", "kep": 0.5}, "did you mean 'keep'"),
        ({"kind": "pooled"}, "keep"),
        ({"kind": "pooled", "keep": 0.0}, "(0, 1]"),
        ({"kind": "block_mass", "keep": 1.5}, "(0, 1]"),
        ({"kind": "block_mass", "keep": "0.5"}, "keep"),
        ({"kind": "block_mass", "keep": 0.5, "by_grid": 1}, "by_grid"),
        ({"kind": "block_mass", "keep": 0.5, "every": 1}, "every is a number of rows"),
        ({"kind": "block_mass", "keep": 0.5, "every": 2.0}, "every"),
        ({"kind": "adaptive_block_mass", "keep": 0.5, "recall_target": 0}, "recall_target"),
        ({"kind": "antidiagonal", "tau": 0}, "tau"),
        ({"kind": "antidiagonal", "tau": 0.9, "stride": 0}, "stride"),
        ({"keep": 0.5}, "object with a 'kind'"),
    ],
)
def test_bad_estimators_are_refused(data, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        estimator_from_dict(data)


def test_bad_calls_are_refused():
    q, k, v = tensors()
    with pytest.raises(ValueError, match="the layout has 105 tokens"):
        Pooled(0.5).select(q, k, v, blocking=VISUAL_ONLY)
    with pytest.raises(ValueError, match="must divide the heads"):
        Pooled(0.5).select(q[:, :3], k, v, blocking=BLOCKING)
    with pytest.raises(ValueError, match="kv_length must lie in"):
        Pooled(0.5).select(q, k, v, blocking=BLOCKING, kv_length=127)
    with pytest.raises(ValueError, match="not a multiple of the stride 5"):
        Antidiagonal(0.5, stride=5).select(q, k, v, blocking=BLOCKING)


# --- block mass ----------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.1, 0.35, 0.8])
@pytest.mark.parametrize("blocking", [BLOCKING, VISUAL_ONLY], ids=["joint", "visual"])
def test_block_mass_equals_brute_force(keep, blocking):
    q, k, v = tensors(blocking.layout)
    mass = brute_mass(q, k, blocking)
    expected = top_blocks(mass, keep, blocking)
    found = BlockMassTopK(keep).select(q, k, v, blocking=blocking)
    assert torch.equal(found.keep, expected)
    share = (mass * expected).sum((2, 3)) / mass.sum((2, 3))
    torch.testing.assert_close(found.recall.double(), share, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("order", ["thw", "wth"])
def test_block_mass_of_some_rows(order):
    """One of four rows of each block, from its first on, wherever the order puts it."""
    blocking = Blocking(VISUAL_ONLY.layout, order, VISUAL_ONLY.block)
    q, k, v = tensors(blocking.layout)
    ids = blocking.indices()
    rows = torch.arange(q.shape[2]) if ids is None else ids
    logits = q[:, :, rows] @ k.repeat_interleave(2, 1)[:, :, rows].mT * q.shape[3] ** -0.5
    weights = torch.nn.functional.pad(
        logits.softmax(-1)[:, :, ::4],
        (0, -q.shape[2] % blocking.block[1], 0, -len(rows[::4]) % (blocking.block[0] // 4)),
    )
    weights = weights.unflatten(3, (-1, blocking.block[1])).sum(4)
    mass = weights.unflatten(2, (-1, blocking.block[0] // 4)).sum(3)
    found = BlockMassTopK(0.3, every=4).select(q, k, v, blocking=blocking)
    assert torch.equal(found.keep, top_blocks(mass, 0.3, blocking))
    assert found.lse is None


def test_block_mass_looks_at_all_rows_where_there_is_padding():
    q, k, v = tensors()
    some, all_rows = (
        BlockMassTopK(0.3, every=every).select(q, k, v, blocking=BLOCKING) for every in (4, None)
    )
    assert torch.equal(some.keep, all_rows.keep)
    assert torch.equal(some.lse, all_rows.lse)


def test_rows_that_do_not_divide_the_block_are_refused():
    q, k, v = tensors(VISUAL_ONLY.layout)
    with pytest.raises(ValueError, match="every=3 does not divide"):
        BlockMassTopK(0.3, every=3).select(q, k, v, blocking=VISUAL_ONLY)


def test_block_mass_recalls_more_than_chance():
    q, k, v = tensors()
    found = BlockMassTopK(0.3).select(q, k, v, blocking=BLOCKING)
    mass = brute_mass(q, k, BLOCKING)
    generator = torch.Generator().manual_seed(5)
    for _ in range(5):
        random = top_blocks(torch.rand(found.keep.shape, generator=generator), 0.3, BLOCKING)
        assert torch.equal(random.sum(-1), found.keep.sum(-1))
        assert (found.recall >= recall_of(mass, random)).all()


def test_grids_ranked_apart_keep_their_share():
    layout = Layout.of([(1, 4, 12), (1, 4, 20)])
    blocking = Blocking(layout, "thw", (8, 8))
    q, k, v = tensors(layout)
    k[:, :, :48] *= 3  # the first grid draws the mass
    together = BlockMassTopK(0.5).select(q, k, v, blocking=blocking).keep
    apart = BlockMassTopK(0.5, by_grid=True).select(q, k, v, blocking=blocking).keep
    assert (apart[..., :6].sum(-1) == 3).all()
    assert (apart[..., 6:].sum(-1) == 5).all()
    assert together[..., :6].sum() > apart[..., :6].sum()


@pytest.mark.parametrize("estimator", [BlockMassTopK(0.3), AdaptiveBlockMass(0.3, 0.5)])
def test_a_cached_lse_is_reused(estimator):
    q, k, v = tensors()
    first = estimator.select(q, k, v, blocking=BLOCKING)
    k = k.repeat_interleave(2, dim=1)
    logits = q @ k[:, :, : LAYOUT.valid_length].mT * q.shape[-1] ** -0.5
    valid = slice(None, LAYOUT.valid_length)
    expected = logits.logsumexp(-1)[..., valid]
    torch.testing.assert_close(first.lse[..., valid], expected, rtol=1e-5, atol=1e-5)
    again = estimator.select(q, k, v.repeat_interleave(2, dim=1), blocking=BLOCKING, lse=first.lse)
    assert torch.equal(again.keep, first.keep)
    # the rows that the cache says are heavier weigh less: the cache is read
    shifted = estimator.select(
        q, k, v.repeat_interleave(2, dim=1), blocking=BLOCKING, lse=first.lse + 5 * torch.rand(126)
    )
    assert not torch.equal(shifted.recall, first.recall)


@settings(max_examples=12)
@given(
    st.sampled_from([0.05, 0.2, 0.3, 0.6, 0.7, 0.9]),
    st.sampled_from([0.2, 0.5, 0.8, 1.0]),
    st.sampled_from([1, 2, 4, 6]),
)
def test_adaptive_keeps_the_mean(keep, target, heads):
    q, k, v = tensors(heads=heads, kv_heads=1, batch=2)
    base = BlockMassTopK(keep).select(q, k, v, blocking=BLOCKING)
    found = AdaptiveBlockMass(keep, target).select(q, k, v, blocking=BLOCKING)
    counts, base_counts = found.keep.sum(-1), base.keep.sum(-1)
    assert torch.equal(counts.sum(1), base_counts.sum(1))
    # rows of a head keep equally many visual blocks
    inner = found.keep[:, :, ~BLOCKING.text_blocks()[0]].sum(-1)
    assert (inner == inner[..., :1]).all()


def test_adaptive_moves_from_sharp_heads_to_flat_ones():
    q, k, v = tensors()
    base = BlockMassTopK(0.4).select(q, k, v, blocking=BLOCKING)
    target = float(base.recall.median())
    found = AdaptiveBlockMass(0.4, target).select(q, k, v, blocking=BLOCKING)
    rows = ~BLOCKING.text_blocks()[0]
    text = int(BLOCKING.text_blocks()[1].sum())
    for b in range(3):
        easy = min(int((base.recall[b] > target).sum()), 2)
        by_recall = base.recall[b].argsort(descending=True)
        visual = found.keep[b, :, rows][:, 0].sum(-1) - text
        base_visual = int(base.keep[b, 0, rows][0].sum()) - text
        step = base_visual // 2
        assert (visual[by_recall[:easy]] == base_visual - step).all()
        assert (visual[by_recall[4 - easy :]] == base_visual + step).all()
    none_easy = AdaptiveBlockMass(0.4, 1.0).select(q, k, v, blocking=BLOCKING)
    assert torch.equal(none_easy.keep, base.keep)


# --- antidiagonal and pooled ---------------------------------------------------------------------


@pytest.mark.parametrize("stride", [4, 8])
def test_antidiagonal_equals_a_naive_loop(stride):
    tau = 0.55
    q, k, v = tensors(batch=2, heads=2, kv_heads=1)
    found = Antidiagonal(tau, stride).select(q, k, v, blocking=BLOCKING).keep
    queries, keys = ordered(BLOCKING, q, k)
    n = LAYOUT.valid_length
    starts = range(0, n, stride)
    for b in range(2):
        for h in range(2):
            mass = torch.zeros(8, 16, dtype=torch.float64)
            for a in starts:
                rows = [a + i % min(stride, n - a) for i in range(stride)]
                logits = []
                for c in starts:
                    columns = [c + i % min(stride, n - c) for i in range(stride)]
                    score = sum(
                        queries[b, h, rows[stride - 1 - i]] @ keys[b, 0, columns[i]]
                        for i in range(stride)
                    )
                    logits.append(score / stride / 12**0.5)
                sizes = torch.tensor([min(stride, n - c) / stride for c in starts])
                weight = torch.stack(logits).exp() * sizes
                for c, w in zip(starts, weight / weight.sum(), strict=True):
                    mass[a // 16, c // 8] += w * min(stride, n - a) / stride
            expected = top_mass(mass[None, None].float(), tau, BLOCKING)
            assert torch.equal(found[b, h], expected[0, 0])


def test_antidiagonal_grows_with_tau():
    q, k, v = tensors()
    masks = [Antidiagonal(t, 4).select(q, k, v, blocking=BLOCKING).keep for t in (0.3, 0.6, 0.9, 1)]
    for small, large in pairwise(masks):
        assert not (small & ~large).any()


def test_antidiagonal_does_not_depend_on_the_chunk(monkeypatch):
    q, k, v = tensors()
    whole = Antidiagonal(0.6, 4).select(q, k, v, blocking=BLOCKING).keep
    monkeypatch.setattr("accel.kernels.antidiagonal.CHUNK_LOGITS", 1)
    assert torch.equal(Antidiagonal(0.6, 4).select(q, k, v, blocking=BLOCKING).keep, whole)


@pytest.mark.parametrize("value_bias", [False, True])
def test_pooled_equals_a_naive_loop(value_bias):
    q, k, v = tensors()
    found = Pooled(0.4, value_bias).select(q, k, v, blocking=BLOCKING).keep
    queries, keys, values = (x[:, :, : LAYOUT.valid_length] for x in ordered(BLOCKING, q, k, v))
    scores = torch.zeros(3, 4, 8, 16, dtype=torch.float64)
    for h in range(4):
        means = torch.stack([part.mean(1) for part in queries[:, h].split(16, dim=1)], dim=1)
        for j in range(16):
            part = slice(j * 8, (j + 1) * 8)
            key, value = keys[:, h // 2, part], values[:, h // 2, part]
            score = (means * key.mean(1, keepdim=True)).sum(-1) * 12**-0.5
            if value_bias:
                slope = (key - key.mean(1, keepdim=True)).mT @ value
                score = score + (slope.flatten(1).norm(dim=1) + 1e-5).log()[:, None]
            scores[:, h, :, j] = score
    assert torch.equal(found, top_blocks(scores, 0.4, BLOCKING))


def test_pooled_finds_planted_blocks():
    """Every query block is drawn to one key block; half-size tails are no handicap."""
    layout = Layout.of((3, 4, 7))
    blocking = Blocking(layout, "hwt", (12, 12))
    generator = torch.Generator().manual_seed(2)
    marks = torch.nn.functional.one_hot(torch.arange(84) // 12, 12).float() * 6
    q = k = torch.empty(1, 1, 84, 12)
    k[0, 0, blocking.indices()] = marks
    v = torch.randn(1, 1, 84, 12, generator=generator)
    found = Pooled(0.1, value_bias=False).select(q, k, v, blocking=blocking)
    assert torch.equal(found.keep[0, 0], torch.eye(7, dtype=torch.bool))
