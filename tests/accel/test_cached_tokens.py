"""Which tokens a cache holds, and what is seen of them, against plain loops in float64."""

from math import ceil, inf

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accel.cached_tokens import SiteTokens, choose_tokens, host_attention
from accel.kernels.attention import sparse_attention
from accel.kernels.block_mask import BlockMask
from accel.layout import Layout
from accel.text_step import TextStep
from accel.token_cache import TokenCache

DIM = 5


def whole_step(tokens, block, live, valid=None):
    return TextStep((Layout.of((1, 1, tokens)),), block, live, valid=valid, fills=True)


def fed_step(step, fed):
    return TextStep(step.layouts, step.block, step.live, fed, step.valid)


def chosen_by(cache, step, q, k):
    """Of every sample and key head the places outside `live`, ascending, by a loop over tokens."""
    group = q.shape[1] // k.shape[1]
    rows = []
    for b in range(len(k)):
        valid = range(k.shape[2]) if step.valid is None else step.valid[b].nonzero()[:, 0].tolist()
        able = [i for i in valid if not step.live[0] <= i < step.live[1]]
        scores = []
        for h in range(k.shape[1]):
            heads = q[b, h * group : (h + 1) * group, step.block[0] : step.block[1]].double()
            mean = heads.mean((0, 1))
            scores.append({i: float(mean @ k[b, h, i].double()) for i in able})
        if not cache.by_head:
            means = {i: sum(s[i] for s in scores) / len(scores) for i in able}
            scores = [means] * len(scores)
        row = []
        for own in scores:
            near = cache.pool // 2
            pooled = {
                i: max(own[j] for j in range(i - near, i + near + 1) if j in own) for i in able
            }
            # written as whole hundredths of the tokens, which floating point does not round
            count = max(1, ceil(round(cache.keep * 100) * len(able) / 100)) if able else 0
            best = sorted(able, key=lambda i: (-pooled[i], i))[:count]
            row.append(sorted(best))
        rows.append(row)
    return rows


@st.composite
def calls(draw):
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tokens, heads = draw(st.integers(1, 24)), draw(st.integers(1, 3))
    group = draw(st.integers(1, 3))
    a, b = sorted(draw(st.tuples(*[st.integers(0, tokens)] * 2)))
    live = (a, b) if a < b else (0, tokens)
    block = (live[0], draw(st.integers(live[0] + 1, live[1])))
    valid = None
    if draw(st.booleans()):
        padding = torch.tensor([draw(st.integers(0, live[0])) for _ in range(3)])
        valid = torch.arange(tokens) >= padding[:, None]
    # whole numbers: ties are exact, and a mean over heads is not rounded differently
    q = torch.randint(-3, 4, (3, heads * group, tokens, DIM), generator=g).float()
    k = torch.randint(-3, 4, (3, heads, tokens, DIM), generator=g).float()
    cache = TokenCache(
        keep=draw(st.integers(1, 100)) / 100,
        pool=draw(st.sampled_from([1, 3, 7])),
        by_head=draw(st.booleans()),
    )
    return cache, whole_step(tokens, block, live, valid), q, k


def listed(places, counts, heads):
    """The choice of each sample and key head, as lists."""
    rows = []
    for b in range(len(places)):
        n = places.shape[2] if counts is None else int(counts[b])
        rows.append([places[b, min(h, places.shape[1] - 1), :n].tolist() for h in range(heads)])
    return rows


@settings(max_examples=300)
@given(calls())
def test_the_choice_of_tokens(call):
    cache, step, q, k = call
    found = listed(*choose_tokens(cache, step, q, k), k.shape[1])
    expected = chosen_by(cache, step, q, k)
    assert found == expected or _differ_by_ties(cache, step, q, k, found, expected)


def _differ_by_ties(cache, step, q, k, found, expected):
    """Rounding may tell apart what is equal: then as many tokens of the same scores are chosen."""
    group = q.shape[1] // k.shape[1]
    mean = q[:, :, slice(*step.block)].double().mean(2)
    mean = mean.view(len(q), -1, group, DIM).mean(2)
    score = torch.einsum("bhd,bhnd->bhn", mean, k.double())
    if not cache.by_head:
        score = score.mean(1, keepdim=True).expand_as(score)
    able = torch.ones(len(k), k.shape[2], dtype=torch.bool)
    able[:, slice(*step.live)] = False
    able = able if step.valid is None else able & step.valid
    score = score.masked_fill(~able[:, None], -inf)
    score = torch.nn.functional.max_pool1d(score, cache.pool, 1, cache.pool // 2)
    for b, (row, meant) in enumerate(zip(found, expected, strict=True)):
        for h, (x, y) in enumerate(zip(row, meant, strict=True)):
            assert x == sorted(set(x))
            assert able[b, x].all()
            assert torch.allclose(score[b, h, x].sort().values, score[b, h, y].sort().values)
    return True


@pytest.mark.parametrize(
    ("keep", "outside", "held"),
    [
        (0.1, 10, 1),
        (0.3, 10, 3),
        (0.7, 10, 7),
        (0.07, 100, 7),
        (0.29, 100, 29),
        (0.57, 100, 57),
        (0.5, 7, 4),
        (0.01, 3, 1),
        (1.0, 3, 3),
        (0.5, 0, 0),
        (1.0, 0, 0),
    ],
)
def test_how_many_are_held(keep, outside, held):
    """As many as arithmetic without rounding says."""
    x = torch.randn(1, 1, outside + 4, DIM)
    step = whole_step(outside + 4, (outside, outside + 4), (outside, outside + 4))
    places, counts = choose_tokens(TokenCache(keep=keep), step, x, x)
    assert (places.shape[2], counts) == (held, None)


def test_samples_without_tokens_outside_hold_none():
    x = torch.randn(2, 1, 8, DIM)
    valid = torch.arange(8) >= torch.tensor([[4], [1]])
    step = whole_step(8, (4, 8), (4, 8), valid)
    for keep in (0.5, 1.0):
        places, counts = choose_tokens(TokenCache(keep=keep), step, x, x)
        assert counts.tolist() == [0, 2 if keep < 1 else 3]
        assert places[1, 0, : int(counts[1])].min() >= 1


def softmax_over(q, k, v):
    """q [heads, tokens, dim] over the keys of its group, in float64."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(len(q) // len(k), 0) for x in (k, v))
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


def attention(q, k, v, lengths, *, valid=None, return_lse=False):
    """As the calls of a session are made, in the precision of q."""
    if not return_lse:
        return host_attention(q, k, v, lengths, valid=valid)
    mask = BlockMask.full(q.shape[1], block=(16, 16), q_length=q.shape[2], kv_length=k.shape[2])
    return sparse_attention(q, k, v, mask, kv_length=lengths, return_lse=True)


@st.composite
def fed_calls(draw):
    """A whole call, and which tokens are fed after it: one row for all, or one for each sample."""
    cache, step, q, k = draw(calls())
    live, g = step.live, torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    if draw(st.booleans()):
        a, b = sorted(draw(st.tuples(*[st.integers(*live)] * 2)))
        fed = torch.arange(a, b if b > a else a + 1)[None]
        fed = fed.clamp(max=live[1] - 1)
    else:
        n = draw(st.integers(1, live[1] - live[0]))
        rows = []
        for _ in range(3):
            own = draw(st.integers(1, n))
            row = torch.randperm(live[1] - live[0], generator=g)[:own].sort().values + live[0]
            rows.append(torch.cat([row, row[-1:].expand(n - own)]))
        fed = torch.stack(rows)
    return cache, step, q, k, fed, g


def anew(x, fed, g):
    """Rows of x [batch, heads, tokens, dim] as a fed call has them: a place has the same twice."""
    fresh = torch.randn(x.shape, generator=g, dtype=x.dtype)
    index = fed.expand(len(x), -1)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    return fresh.gather(2, index)


@settings(max_examples=200)
@given(fed_calls())
def test_fed_tokens_see_the_live_ones_and_the_chosen(call):
    """Repeated places are counted once; what was fed before stays as it was fed."""
    cache, step, q, k, fed, g = call
    k, v = (k + 0.25).double(), torch.randn(k.shape, generator=g, dtype=torch.float64)
    q = q.double()
    places, counts = choose_tokens(cache, step, q, k)
    chosen = listed(places, counts, k.shape[1])
    held = SiteTokens.filled(cache, step, q, k, v, attention)
    keys, values = k.clone(), v.clone()
    for _ in range(2):
        new_q, new_k, new_v = (anew(x, fed, g) for x in (q, k, v))
        out = held.attend(fed_step(step, fed), new_q, new_k, new_v, attention)
        rows = fed.expand(3, -1)
        group = q.shape[1] // k.shape[1]
        for b in range(3):
            keys[b, :, rows[b]], values[b, :, rows[b]] = new_k[b], new_v[b]
            for h in range(k.shape[1]):
                seen = [*range(*step.live), *chosen[b][h]]
                some = slice(h * group, (h + 1) * group)
                want = softmax_over(
                    new_q[b, some], keys[b, h : h + 1, seen], values[b, h : h + 1, seen]
                )
                assert torch.allclose(out[b, some], want, atol=1e-12)


@pytest.mark.parametrize("keep", [1.0, 0.4])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("by_head", [False, True])
def test_frozen_is_exact_where_nothing_changed(keep, padded, by_head):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 6, 40, 16), torch.randn(3, 2, 40, 16), torch.randn(3, 2, 40, 16)
    valid = torch.arange(40) >= torch.tensor([[0], [11], [20]]) if padded else None
    step = whole_step(40, (20, 29), (20, 29), valid)
    cache = TokenCache(external="frozen", keep=keep, by_head=by_head)
    held = SiteTokens.filled(cache, step, q, k, v, attention)
    block = slice(20, 29)
    fed = fed_step(step, torch.arange(20, 29)[None])
    out = held.attend(fed, q[:, :, block], k[:, :, block], v[:, :, block], attention)
    chosen = listed(*choose_tokens(cache, step, q, k), 2)
    for b in range(3):
        for h in range(2):
            seen = [*range(20, 29), *chosen[b][h]]
            some = slice(3 * h, 3 * h + 3)
            want = softmax_over(q[b, some, block], k[b, h : h + 1, seen], v[b, h : h + 1, seen])
            assert torch.allclose(out[b, some].double(), want, atol=2e-6)
    # the outer part stays, whatever is fed
    more = held.attend(fed, q[:, :, block], 9 * k[:, :, block], v[:, :, block], attention)
    assert not torch.allclose(more, out, atol=1e-2)
    again = held.attend(fed, q[:, :, block], k[:, :, block], v[:, :, block], attention)
    assert torch.equal(again, out)


@pytest.mark.parametrize("padding", [None, [4, 1, 0]])
def test_frozen_with_nothing_outside(padding):
    """The only block, after an empty prompt: of some samples, or of all."""
    torch.manual_seed(0)
    tokens, start = (6, 0) if padding is None else (10, 4)
    q, k, v = (torch.randn(3, 2, tokens, 16) for _ in range(3))
    valid = None if padding is None else torch.arange(10) >= torch.tensor(padding)[:, None]
    step = whole_step(tokens, (start, tokens), (start, tokens), valid)
    held = SiteTokens.filled(TokenCache(external="frozen"), step, q, k, v, attention)
    block = slice(start, tokens)
    fed = fed_step(step, torch.arange(start, tokens)[None])
    out = held.attend(fed, q[:, :, block], k[:, :, block], v[:, :, block], attention)
    for b in range(3):
        seen = slice(0 if padding is None else padding[b], tokens)
        want = softmax_over(q[b, :, block], k[b, :, seen], v[b, :, seen])
        assert torch.allclose(out[b].double(), want, atol=2e-6)


def test_the_whole_call_is_not_kept_alive():
    """What is held is copied: neither is the call's memory kept, nor is it written to."""
    q = k = v = torch.randn(1, 2, 30, 8)
    before = k.clone()
    step = whole_step(30, (10, 20), (10, 20))
    held = SiteTokens.filled(TokenCache(keep=0.5), step, q, k, v, attention)
    assert held.n_bytes == 2 * 4 * 2 * 20 * 8
    assert held.keep == pytest.approx(20 / 30)
    new = torch.randn(1, 2, 10, 8)
    held.attend(fed_step(step, torch.arange(10, 20)[None]), new, new, new, attention)
    assert torch.equal(k, before)


class TestHostAttention:
    def test_lengths_and_valid_keys(self):
        torch.manual_seed(0)
        q, k, v = (torch.randn(3, n, 7, 8, dtype=torch.float64) for n in (4, 2, 2))
        lengths = torch.tensor([7, 2, 5])
        valid = torch.rand(3, 7) < 0.7
        valid[:, 0] = True
        for n, some in ((lengths, None), (None, valid), (lengths, valid), (None, None)):
            out = host_attention(q, k, v, n, valid=some)
            for b in range(3):
                seen = torch.ones(7, dtype=torch.bool) if some is None else some[b]
                seen = seen & (torch.arange(7) < (7 if n is None else n[b]))
                assert torch.allclose(out[b], softmax_over(q[b], k[b, :, seen], v[b, :, seen]))


class TestASequenceThatGrows:
    """Blocks are fed one after another, each longer than what is held."""

    def test_it_is_attention_to_all_so_far(self):
        torch.manual_seed(0)
        k, v = (torch.randn(2, 2, 16, 8, dtype=torch.float64) for _ in range(2))
        q = torch.randn(2, 4, 16, 8, dtype=torch.float64)
        step = whole_step(8, (4, 8), (0, 8))
        first = [x[:, :, :8] for x in (q, k, v)]
        held = SiteTokens.filled(TokenCache(), step, *first, attention)
        real = torch.arange(16) >= torch.tensor([[0], [3]])
        for stop in (8, 12, 12, 16):
            places = torch.arange(stop - 4, stop)
            keys = real[:, :stop]
            fed = TextStep(step.layouts, (stop - 4, stop), (0, stop), places[None], keys=keys)
            out = held.attend(fed, q[:, :, places], k[:, :, places], v[:, :, places], attention)
            for b, start in enumerate((0, 3)):
                want = softmax_over(q[b, :, places], k[b, :, start:stop], v[b, :, start:stop])
                assert torch.allclose(out[b], want)
        assert held.n_bytes == 2 * 8 * 2 * 2 * 16 * 8
