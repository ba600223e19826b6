"""Which slots each call feeds, and what it says of them."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accel.layout import Layout
from accel.pipelines.token_feed import TokenFeed
from accel.token_cache import FEEDS, TokenCache

CPU = torch.device("cpu")
PROMPT = 5
BLOCKS = [(5, 9), (9, 13), (13, 16)]


def feed_of(cache, blocks=BLOCKS, real=None, shift=False, steps=None):
    settings = {"prompt": blocks[0][0], "blocks": blocks, "real": real, "shift": shift}
    return TokenFeed(cache, **settings, steps=steps, device=CPU)


def masked_of(*rows, length=11):
    """Which generated tokens were masked before the last step, [samples, generated]."""
    out = torch.zeros(len(rows), length, dtype=torch.bool)
    for row, places in zip(out, rows, strict=True):
        row[list(places)] = True
    return out


ALL = masked_of(range(11))


def slots_of(cache, calls, **settings):
    """For every call (block, calls of it before): the slots that are fed, None for a whole call."""
    feed, found = feed_of(cache, **settings), []
    for index, turn in calls:
        fed = feed.next(index, turn, ALL)
        found.append(None if fed.step.fed is None else fed.slots[0].tolist())
    return found


def turns(*steps):
    """Calls of a run whose blocks take so many steps."""
    return [(index, turn) for index, n in enumerate(steps) for turn in range(n)]


def r(start, stop):
    return list(range(start, stop))


THREE = turns(3, 2, 2)
CASES = {
    "none": (None, THREE, [None] * 7),
    "refreshed always": (TokenCache(refresh=1), THREE, [None] * 7),
    "block": (
        TokenCache(),
        THREE,
        [None, r(5, 9), r(5, 9), None, r(9, 13), None, r(13, 16)],
    ),
    "suffix": (
        TokenCache(feed="suffix"),
        THREE,
        [None, r(5, 16), r(5, 16), None, r(9, 16), None, r(13, 16)],
    ),
    "generated": (
        TokenCache(feed="generated", blocks=None),
        THREE,
        [None, *[r(5, 16)] * 6],
    ),
    "a delay": (TokenCache(delay=1), THREE, [None, None, r(5, 9), None, None, None, None]),
    "a refresh": (
        TokenCache(refresh=2),
        turns(5, 1),
        [None, r(5, 9), None, r(5, 9), r(5, 9), None],
    ),
    "delay and refresh": (
        TokenCache(delay=1, refresh=3),
        turns(6),
        [None, None, r(5, 9), None, None, None],
    ),
    # the first call of a block in a group also feeds the block before it
    "groups of two": (
        TokenCache(blocks=2),
        THREE,
        [None, r(5, 9), r(5, 9), r(5, 13), r(9, 13), None, r(13, 16)],
    ),
    "one group": (
        TokenCache(blocks=None),
        THREE,
        [None, r(5, 9), r(5, 9), r(5, 13), r(9, 13), r(9, 16), r(13, 16)],
    ),
    "one group, suffix": (
        TokenCache(feed="suffix", blocks=None),
        THREE,
        [None, r(5, 16), r(5, 16), r(5, 16), r(9, 16), r(9, 16), r(13, 16)],
    ),
    "a group refreshed at a block's start": (
        TokenCache(blocks=None, refresh=3),
        THREE,
        [None, r(5, 9), r(5, 9), r(5, 13), r(9, 13), r(9, 16), None],
    ),
    "blocks of one step": (TokenCache(), turns(1, 1, 1), [None] * 3),
    "one group, blocks of one step": (
        TokenCache(blocks=None),
        turns(1, 1, 1),
        [None, r(5, 13), r(9, 16)],
    ),
    # a window's last place is the last slot
    "a window": (
        TokenCache(feed="suffix", window=2),
        THREE,
        [None, [*r(5, 11), 15], [*r(5, 11), 15], None, [*r(9, 15), 15], None, r(13, 16)],
    ),
    "no window": (
        TokenCache(feed="suffix", window=0),
        THREE,
        [None, [*r(5, 9), 15], [*r(5, 9), 15], None, [*r(9, 13), 15], None, r(13, 16)],
    ),
    "a window of a group": (
        TokenCache(feed="generated", window=1, blocks=2),
        THREE,
        [None, *[[*r(5, 14), 15]] * 4, None, r(5, 16)],
    ),
}


@pytest.mark.parametrize(("cache", "calls", "expected"), CASES.values(), ids=CASES)
def test_which_slots_are_fed(cache, calls, expected):
    assert slots_of(cache, calls) == expected
    # logits of a token stand before it: one slot more, at the start
    shifted = [None if fed is None else [fed[0] - 1, *fed] for fed in expected]
    assert slots_of(cache, calls, shift=True) == shifted


def test_shifted_logits_after_an_empty_prompt():
    """Nothing stands before the first token; before those of other blocks the block before does."""
    blocks = [(0, 4), (4, 7)]
    feed = feed_of(TokenCache(), blocks=blocks, shift=True)
    masked = masked_of(range(7), length=7)
    found = [feed.next(index, turn, masked) for index, turn in turns(2, 2)]
    assert [fed.step.block for fed in found] == [(0, 4), (0, 4), (3, 7), (3, 7)]
    assert [fed.slots[0].tolist() for fed in found] == [r(0, 7), r(0, 4), r(0, 7), r(3, 7)]


class TestUndecided:
    """Feeds what was masked before the last step, of every sample, filled up with its last one."""

    CACHE = TokenCache(feed="undecided", delay=1, refresh=4, blocks=None)

    def calls(self, rows, shift=False, real=None):
        feed = feed_of(self.CACHE, [(5, 16)], shift=shift, real=real)
        found = []
        for turn, masked in enumerate(rows):
            fed = feed.next(0, turn, masked)
            found.append(None if fed.step.fed is None else fed.slots.tolist())
            assert fed.step.fed is None or fed.rows is None
        return found

    def test_slots(self):
        rows = [
            ALL.expand(2, -1),
            ALL.expand(2, -1),
            masked_of(r(0, 11), r(1, 11)),
            masked_of([0, 2, 10], [1]),
            ALL.expand(2, -1),
            masked_of([], [1, 2]),
            masked_of([4], [4]),
        ]
        assert self.calls(rows) == [
            None,
            None,
            [r(5, 16), [*r(6, 16), 15]],
            [[5, 7, 15], [6, 6, 6]],
            None,
            # a sample that is done feeds its first
            [[5, 5], [6, 7]],
            [[9], [9]],
        ]

    def test_shifted(self):
        """What stands before an undecided token is fed as well."""
        rows = [ALL.expand(2, -1)] * 2 + [masked_of([0, 1, 4], [10])]
        assert self.calls(rows, shift=True)[2] == [[4, 5, 6, 8, 9], [14, 15, 15, 15, 15]]


class TestStep:
    """What a call says to accel."""

    def test_places_of_a_window(self):
        """Places count the tokens that are computed at all; the last of them is the last slot."""
        feed = feed_of(TokenCache(feed="suffix", window=2))
        whole, fed = feed.next(0, 0, ALL), feed.next(0, 1, ALL)
        assert whole.slots.tolist() == [[*r(0, 11), 15]]
        assert whole.step.layouts == (Layout.join([(1, 1, 5), (1, 1, 7)]),)
        assert fed.step.fed.tolist() == [r(5, 12)]
        assert fed.step.live == (5, 12)
        assert (fed.rows, whole.rows) == ((0, 4), (5, 9))

    @pytest.mark.parametrize(
        ("cache", "live"),
        [
            (TokenCache(), [(5, 9), (9, 13), (13, 16)]),
            (TokenCache(blocks=2), [(5, 13), (5, 13), (13, 16)]),
            (TokenCache(blocks=None), [(5, 16)] * 3),
            (TokenCache(feed="suffix"), [(5, 16), (9, 16), (13, 16)]),
            (TokenCache(feed="generated"), [(5, 16)] * 3),
            (TokenCache(feed="undecided"), [(5, 16)] * 3),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("shift", [False, True])
    def test_what_may_be_fed_again(self, cache, live, shift):
        feed = feed_of(cache, shift=shift)
        found = [feed.next(index, turn, ALL).step for index, turn in THREE if turn == 0]
        assert [step.live for step in found] == [(a - shift, b) for a, b in live]
        assert [step.block for step in found] == [(a - shift, b) for a, b in BLOCKS]

    def test_whole_calls_fill_a_cache_that_is_used(self):
        feed = feed_of(TokenCache(delay=1, refresh=2))
        found = [feed.next(0, turn, ALL).step for turn in range(4)]
        assert [step.fills for step in found] == [True, True, True, False]
        for cache in (None, TokenCache(refresh=1)):
            without = feed_of(cache)
            assert not any(without.next(0, turn, ALL).step.fills for turn in range(3))

    def test_steps_are_those_that_the_quota_asks_for(self):
        """What other samples of a batch still need does not move the whole calls of a group."""
        cache = TokenCache(blocks=None, refresh=6)
        calls = [turns(1, 4, 2), turns(4, 4, 2)]
        wholes = []
        for of in calls:
            found = slots_of(cache, of)
            wholes.append({at for at, slots in zip(of, found, strict=True) if slots is None})
        assert wholes[0] == wholes[1] == {(0, 0), (1, 2)}
        assert slots_of(cache, turns(3, 3, 1), steps=[2, 2, 3])[3:] == [
            *(r(5, 13), r(9, 13), r(9, 13)),
            r(9, 16),
        ]

    def test_padding_is_told(self):
        real = torch.arange(16) >= torch.tensor([[0], [2], [5]])
        whole = feed_of(TokenCache(), real=real).next(0, 0, ALL.expand(3, -1))
        assert torch.equal(whole.step.valid, real)
        assert [layout.valid().tolist() for layout in whole.step.layouts] == real.tolist()
        assert whole.step.layouts == (
            Layout.join([(1, 1, 5), (1, 1, 11)]),
            Layout.join([("pad", 2), (1, 1, 3), (1, 1, 11)]),
            Layout.join([("pad", 5), (1, 1, 11)]),
        )

    def test_padding_of_a_window(self):
        real = torch.arange(16) >= torch.tensor([[0], [2]])
        feed = feed_of(TokenCache(feed="suffix", window=1), real=real)
        step = feed.next(0, 0, ALL.expand(2, -1)).step
        assert torch.equal(step.valid, real[:, [*r(0, 10), 15]])


@st.composite
def runs(draw):
    cache = TokenCache(
        feed=draw(st.sampled_from(FEEDS)),
        delay=draw(st.integers(0, 2)),
        refresh=draw(st.none() | st.integers(1, 4)),
        blocks=draw(st.none() | st.integers(1, 3)),
        window=draw(st.none() | st.integers(0, 6)),
    )
    prompt, edges = draw(st.integers(0, 6)), [draw(st.integers(0, 6))]
    edges[0] = prompt
    for _ in range(draw(st.integers(1, 4))):
        edges.append(edges[-1] + draw(st.integers(1, 5)))
    blocks = list(pairwise(edges))
    return cache, blocks, draw(st.booleans()), draw(st.randoms())


@settings(max_examples=150)
@given(runs())
def test_whatever_is_decided_has_logits_and_whatever_changed_is_fed(run):
    """A run by a random commit: open tokens have their logits, and a token that was committed is
    computed once more before it counts as known.
    """
    cache, blocks, shift, random = run
    feed = feed_of(cache, blocks=blocks, shift=shift)
    prompt, length = blocks[0][0], blocks[-1][1]
    masked = torch.ones(1, length, dtype=torch.bool)
    masked[:, :prompt] = False
    before = masked.clone()
    stale = set()  # committed since the model saw them last
    for index, (start, stop) in enumerate(blocks):
        turn = 0
        while masked[0, start:stop].any():
            fed = feed.next(index, turn, before[:, prompt:])
            slots = fed.slots[0].tolist()
            whole = fed.step.fed is None
            open_ = [i for i in range(start, stop) if masked[0, i]]
            wanted = {max(i - shift, 0) for i in open_}
            assert wanted <= set(slots)
            if fed.rows is not None:
                read = slots[fed.rows[0] : fed.rows[1]]
                assert read == list(range(max(start - shift, 0), stop))
            if whole:
                assert slots[: len(slots) - 1] == list(range(len(slots) - 1))
                assert slots[-1] == length - 1
                stale.clear()
            else:
                assert all(fed.step.live[0] <= p < fed.step.live[1] for p in fed.step.fed[0])
                # once more, before it is known for good
                assert stale <= set(slots)
                stale.clear()
            before = masked.clone()
            picked = random.sample(open_, random.randint(1, len(open_)))
            masked[0, picked] = False
            stale.update(picked)
            turn += 1
