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
    ColumnMass,
    Connectivity,
    Joined,
    Pooled,
    PooledMass,
    Residual,
    SubBlock,
    Threshold,
    estimator_from_dict,
    mass,
)
from accel.layout import Layout
from accel.pattern import Band, FirstFrames, Identity, Window, known_mask
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
    PooledMass(0.4),
    PooledMass(0.2, least=0.3),
    PooledMass(0.4, similarity=0.1),
    Threshold(0.5),
    Threshold(0.5, variance="exact"),
    SubBlock(0.3),
    SubBlock(0.3, q_cells=2, kv_cells=8),
    Residual(0.3),
    ColumnMass(0.3, queries=20),
    ColumnMass(0.3, queries=500),
    Joined(PooledMass(0.3), Window(1, 1, 1)),
    Connectivity.of(torch.randn(2, 4, 36, 5, generator=torch.Generator().manual_seed(7)), 0.3),
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
    [
        BlockMassTopK(1.0),
        AdaptiveBlockMass(1.0),
        Antidiagonal(1.0),
        Pooled(1.0),
        PooledMass(1.0),
        PooledMass(0.1, least=1.0),
        PooledMass(0.1, similarity=1.0),
        Threshold(-1000.0),
        SubBlock(1.0),
        Residual(1.0),
        ColumnMass(1.0),
        Joined(Pooled(0.1), Window()),
    ],
    ids=lambda e: e.name,
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


@pytest.mark.parametrize(
    "estimator",
    # a pattern knows the tokens' places, and so do rows that are evenly spaced
    [e for e in ALL if e.kind != "joined" and getattr(e, "queries", 500) == 500],
    ids=lambda e: e.name,
)
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
            x[:, :, length:] = torch.nan
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


@pytest.mark.parametrize("estimator", **BY_NAME)
def test_all_that_is_made_lies_beside_q(estimator):
    """Whatever torch's default device is: else nothing would run on an accelerator."""
    q, k, v = tensors()
    expected = estimator.select(q, k, v, blocking=BLOCKING, kv_length=90).keep
    with torch.device("meta"):
        found = estimator.select(q, k, v, blocking=BLOCKING, kv_length=90).keep
    assert torch.equal(found, expected)


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
        ({"kind": "pooled_mass", "tau": 2}, "tau"),
        ({"kind": "pooled_mass", "tau": 0.5, "least": 1.5}, "least is a fraction"),
        ({"kind": "pooled_mass", "tau": 0.5, "similarity": 1.5}, "similarity is in [-1, 1]"),
        ({"kind": "threshold", "tau": float("inf")}, "tau is a number of standard deviations"),
        ({"kind": "threshold", "variance": "row"}, "threshold"),
        ({"kind": "sub_block", "keep": 0.5, "q_cells": 0}, "q_cells is a number of cells"),
        ({"kind": "residual", "keep": 0}, "keep"),
        ({"kind": "column_mass", "keep": 0.5, "queries": 0}, "queries is a number of rows"),
        ({"kind": "joined", "estimator": {"kind": "poold"}}, "did you mean 'pooled'"),
        ({"kind": "joined", "estimator": {"kind": "pooled", "keep": 0.5}}, "pattern"),
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
    with pytest.raises(ValueError, match="cannot be cut in 4 x 3 cells"):
        SubBlock(0.5, kv_cells=3).select(q, k, v, blocking=BLOCKING)
    with pytest.raises(ValueError, match="cannot be cut in 3 x 4 cells"):
        Joined(SubBlock(0.5, q_cells=3), Window()).check_block((16, 8))


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


def block_parts(x, size, blocking=BLOCKING):
    """The valid tokens of every block of one head and batch element, in order."""
    return [part for part in x[: blocking.layout.valid_length].split(size) if len(part)]


@pytest.mark.parametrize("similarity", [None, 0.12])
def test_pooled_mass_equals_a_naive_loop(similarity):
    """The last block is ragged; the text of this layout stands at both ends of it."""
    tau, least = 0.6, 0.2
    q, k, v = tensors()
    q, k = q + 0.4, k + 0.2  # so that some blocks are alike and some are not
    found = PooledMass(tau, least, similarity).select(q, k, v, blocking=BLOCKING).keep
    queries, keys = ordered(BLOCKING, q, k)
    text, odd = BLOCKING.text_blocks()[1], [0, 0]
    for b in range(3):
        for h in range(4):
            columns = block_parts(keys[b, h // 2], 8)
            alike = [True] * 16
            if similarity is not None:
                for j, part in enumerate(columns):
                    unit = part / part.norm(dim=1, keepdim=True)
                    alike[j] = float((unit @ unit.T).mean()) > similarity
            ranked = [j for j in range(16) if alike[j] and not text[j]]
            for i, rows in enumerate(block_parts(queries[b, h], 16)):
                if BLOCKING.text_blocks()[0][i]:
                    continue
                unit = rows / rows.norm(dim=1, keepdim=True)
                if similarity is not None and float((unit @ unit.T).mean()) <= similarity:
                    assert found[b, h, i].all()
                    odd[0] += 1
                    continue
                weight = torch.stack(
                    [
                        len(columns[j]) * (rows.mean(0) @ columns[j].mean(0) / 12**0.5).exp()
                        for j in ranked
                    ]
                )
                best = sorted(zip((-weight / weight.sum()).tolist(), ranked, strict=True))
                expected, held = set(), 0.0
                for share, j in best:
                    if held >= tau and len(expected) >= -(-len(ranked) // 5):
                        break
                    expected.add(j)
                    held -= share
                expected |= {j for j in range(16) if text[j] or not alike[j]}
                odd[1] += alike.count(False)
                assert set(found[b, h, i].nonzero().flatten().tolist()) == expected
    assert all(odd) == (similarity is not None)


def test_blocks_of_one_direction_are_alike():
    """A block whose tokens point one way is judged by its mean, however long they are."""
    layout = Layout.of((1, 8, 8))
    blocking = Blocking(layout, "thw", (16, 8))
    q, k, v = tensors(layout, batch=1, heads=1, kv_heads=1)
    q[:] = torch.eye(12)[0] * torch.rand(1, 1, 64, 1) + 0.01
    k[:, :, :40] = q[:, :, :40]
    keep = PooledMass(0.1, similarity=0.6).select(q, k, v, blocking=blocking).keep[0, 0]
    assert keep[:, 5:].all()  # random keys are always kept
    assert (keep[:, :5].sum(-1) == 1).all()  # and of the others one holds a tenth


@pytest.mark.parametrize("variance", ["diag", "exact"])
@pytest.mark.parametrize("block", [(16, 8), (8, 8), (8, 16)])
def test_threshold_equals_a_naive_loop(variance, block):
    tau = 0.7
    blocking = Blocking(LAYOUT, "hilbert", block)
    q, k, v = tensors()
    found = Threshold(tau, variance).select(q, k, v, blocking=blocking).keep
    queries, keys = ordered(blocking, q, k)
    text = blocking.text_blocks()
    visual = [j for j in range(blocking.kv_blocks) if not text[1][j]]
    for b in range(3):
        for h in range(4):
            columns = torch.stack([x.mean(0) for x in block_parts(keys[b, h // 2], block[1])])
            for i, rows in enumerate(block_parts(queries[b, h], block[0])):
                if text[0][i]:
                    continue
                mean = rows.mean(0) * 12**-0.5
                spread = columns[visual].T.cov(correction=0)
                if variance == "diag":
                    spread = spread.diag().diag()
                scores = columns @ mean
                bound = scores[visual].mean() + tau * (mean @ spread @ mean + 1e-6) ** 0.5
                first, last = i * block[0], (i + 1) * block[0]
                near = [
                    j * block[1] <= last and (j + 1) * block[1] >= first
                    for j in range(len(columns))
                ]
                if block == (8, 8):
                    assert near == [abs(i - j) <= 1 for j in range(len(columns))]
                expected = (scores > bound) | torch.tensor(near) | text[1]
                assert torch.equal(found[b, h, i], expected)


def test_a_threshold_gives_rows_budgets_of_their_own():
    """About 16% of the blocks of a normal row are a standard deviation above its mean."""
    layout = Layout.of((1, 32, 64))
    blocking = Blocking(layout, "thw", (8, 8))
    q, k, v = tensors(layout, heads=2)
    keep = Threshold(1.0).select(q, k, v, blocking=blocking).keep
    assert 0.14 < keep.float().mean() < 0.2  # and the neighbours
    assert len(keep.sum(-1).unique()) > 5
    nothing = Threshold(1000.0).select(q, k, v, blocking=blocking).keep
    assert nothing.sum(-1).unique().tolist() == [2, 3]


@pytest.mark.parametrize("cells", [(4, 4), (1, 2), (2, 1)])
def test_sub_block_equals_a_naive_loop(cells):
    """The last cells of the sequence are ragged or empty: 122 valid tokens of 128."""
    q, k, v = tensors()
    found = SubBlock(0.4, *cells).select(q, k, v, blocking=BLOCKING).keep
    queries, keys = ordered(BLOCKING, q, k)
    scores = torch.zeros(3, 4, 8, 16, dtype=torch.float64)
    for b in range(3):
        for h in range(4):
            for i, rows in enumerate(block_parts(queries[b, h], 16)):
                for j, columns in enumerate(block_parts(keys[b, h // 2], 8)):
                    scores[b, h, i, j] = sum(
                        len(x) * len(y) * (x.mean(0) @ y.mean(0) / 12**0.5).exp()
                        for x in rows.split(16 // cells[0])
                        for y in columns.split(8 // cells[1])
                    ).log()
    assert torch.equal(found, top_blocks(scores, 0.4, BLOCKING))


def test_one_cell_is_the_product_of_means():
    q, k, v = tensors(VISUAL_ONLY.layout)
    layout = Layout.of((5, 8, 4))  # of whole blocks: no weights
    blocking = Blocking(layout, "hwt", (16, 8))
    q, k, v = tensors(layout)
    one = SubBlock(0.3, 1, 1).select(q, k, v, blocking=blocking).keep
    assert torch.equal(one, Pooled(0.3, value_bias=False).select(q, k, v, blocking=blocking).keep)
    more = SubBlock(0.3, 4, 4).select(q, k, v, blocking=blocking)
    mass = brute_mass(q, k, blocking)
    assert recall_of(mass, more.keep).mean() > recall_of(mass, one).mean()


def test_residual_equals_a_naive_loop():
    q, k, v = tensors()
    found = Residual(0.4).select(q, k, v, blocking=BLOCKING).keep
    queries, keys = ordered(BLOCKING, q, k)
    worth = torch.zeros(3, 4, 8, 16, dtype=torch.float64)
    for b in range(3):
        for h in range(4):
            for i, rows in enumerate(block_parts(queries[b, h], 16)):
                mean = rows.mean(0) / 12**0.5
                for j, columns in enumerate(block_parts(keys[b, h // 2], 8)):
                    wrong = ((columns @ mean).exp() - (columns.mean(0) @ mean).exp()).abs()
                    worth[b, h, i, j] = wrong.sum() / len(columns)
    assert torch.equal(found, top_blocks(worth, 0.4, BLOCKING))


def test_residual_leaves_blocks_to_a_mean_that_says_it_all():
    """The heaviest blocks are of equal keys: no error to mend, though all the mass lies there."""
    layout = Layout.of((1, 8, 8))
    blocking = Blocking(layout, "thw", (16, 8))
    q, k, v = tensors(layout, heads=2, kv_heads=1)
    q[:] = q[:, :, :1]
    k[:, :, :24] = q[:, :1, :1] * 2
    keep = Residual(0.6).select(q, k, v, blocking=blocking).keep
    assert not keep[..., :3].any()
    assert SubBlock(0.3).select(q, k, v, blocking=blocking).keep[:, 0, :, :3].all()


@pytest.mark.parametrize(("queries", "rows"), [(20, range(0, 122)), (500, range(122)), (1, [0])])
def test_column_mass_equals_the_columns_of_the_map(queries, rows):
    q, k, v = tensors()
    found = ColumnMass(0.4, queries).select(q, k, v, blocking=BLOCKING).keep
    if queries == 20:
        rows = [121 * i // 19 for i in range(20)]
    keys = k.repeat_interleave(2, 1)[:, :, :122].double()
    map = (q[:, :, list(rows)].double() @ keys.mT * 12**-0.5).softmax(-1).sum(2)
    mass = torch.nn.functional.pad(map, (0, 4))[..., BLOCKING.indices()]
    mass = torch.nn.functional.pad(mass, (0, 2)).unflatten(2, (16, 8)).sum(3)
    scores = mass[:, :, None].expand(-1, -1, 8, -1)
    assert torch.equal(found, top_blocks(scores, 0.4, BLOCKING))


def test_column_mass_finds_a_planted_line():
    """Every query looks at one row of every frame; in the order `htw` it is one line."""
    grid = (4, 6, 8)
    layout = Layout.of(grid)
    q, k, v = tensors(layout, heads=2, kv_heads=1)
    q[..., 0], k[..., 0] = 5.0, 0.0
    k[:, :, layout.coordinates()[:, 1] == 4, 0] = 5.0
    blocking = Blocking(layout, "htw", (16, 8))
    keep = ColumnMass(4 / 24).select(q, k, v, blocking=blocking).keep
    assert torch.equal(keep, (torch.arange(24) // 4 == 4).expand_as(keep))


def test_joined_is_the_union_and_makes_its_pattern_once():
    q, k, v = tensors()
    one, near, known = BlockMassTopK(0.2), Window(1, 1, 1), {}
    found = Joined(one, near).select(q, k, v, blocking=BLOCKING, patterns=known)
    alone = one.select(q, k, v, blocking=BLOCKING)
    mask = near.mask(BLOCKING)
    assert torch.equal(found.keep, alone.keep | mask)
    assert torch.equal(found.lse, alone.lse)
    assert found.recall is None
    assert [x.tolist() for x in known.values()] == [mask.tolist()]
    known[next(iter(known))] = torch.zeros_like(mask)
    again = Joined(one, near).select(q, k, v, blocking=BLOCKING, patterns=known)
    assert torch.equal(again.keep, alone.keep)
    assert known_mask(near, BLOCKING, q.device, known) is next(iter(known.values()))


def test_what_cannot_be_joined_is_refused():
    with pytest.raises(ValueError, match="keeps blocks"):
        Joined(Pooled(0.2), Identity())
    with pytest.raises(ValueError, match="not itself joined"):
        Joined(Joined(Pooled(0.2), Window()), Band(0.1))


def test_what_costs_the_same_has_one_name():
    near = Joined(Pooled(0.2), FirstFrames(1))
    assert near.work == Pooled(0.4).work
    names = {e.work for e in ALL}
    assert {"pooled_mass", "pooled_mass/similarity", "sub_block/4x4", "sub_block/2x8"} <= names
    assert {"column_mass/20", "column_mass/500", "threshold", "residual"} <= names


def test_a_keep_is_told_where_it_is_one():
    told = {e.kind: getattr(e, "keep", None) for e in ALL}
    assert {kind for kind, keep in told.items() if keep is None} == {
        "antidiagonal",
        "pooled_mass",
        "threshold",
        "joined",
    }


@pytest.mark.parametrize("every", [None, 4])
def test_shares_of_one_mass_are_weighed_once(every, monkeypatch):
    """Selections that share scores are those made alone, and the mass is streamed once."""
    q, k, v = (torch.randn(2, 3, 210, 16) for _ in range(3))
    blocking = Blocking(Layout.of((5, 6, 7)), "hwt", (32, 16))
    alone = {
        keep: BlockMassTopK(keep, every=every).select(q, k, v, blocking=blocking).keep
        for keep in (0.1, 0.3, 0.8)
    }
    calls = []
    own = mass.block_mass

    def counted(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    monkeypatch.setattr(mass, "block_mass", counted)
    scores = {}
    for keep, wanted in alone.items():
        chosen = BlockMassTopK(keep, every=every)
        found = chosen.select(q, k, v, blocking=blocking, scores=scores)
        assert torch.equal(found.keep, wanted)
    assert len(calls) == 1
