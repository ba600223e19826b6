"""Patterns: block masks equal a brute-force reduction of the families' token rules."""

import json
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accel import pattern as patterns
from accel.blocking import Blocking
from accel.layout import Layout
from accel.pattern import (
    Band,
    FirstFrames,
    Full,
    Identity,
    MultiDiagonal,
    Radial,
    Share,
    Skip,
    Stripe,
    Window,
    pattern_from_dict,
)
from accel.pattern_union import Union

LAYOUT = Layout.of((5, 7, 3), text_before=11, text_after=6, padding=4)
SEVERAL = Layout.of([(3, 5, 2), (1, 6, 4)], text_before=7, text_after=2, padding=9)
EXAMPLES = [
    Full(),
    Skip(),
    Identity(),
    Share(),
    Share(of="branch"),
    Band(0.07),
    Band(0),
    Band(0.5),
    Window(),
    Window(1, 2, 1),
    Window(0, 0, 0),
    Window(t=0.2, h=0.3, w=None),
    MultiDiagonal(),
    MultiDiagonal(t=2, h=1, w=1),
    Stripe(),
    Stripe(start=1, length=2, every=3),
    Stripe(axis="h", start=0.5, length=0.2),
    Stripe(axis="w", start=99, length=None),
    FirstFrames(2),
    Radial(),
    Radial(decay=0.1, first_frame_sink=True),
    Radial(decay=0.02),
    Union((Window(0, 1, 1), FirstFrames(1))),
    Union((Band(0.02), Union((MultiDiagonal(), Stripe(start=2))))),
]


def half(extent, size):
    if extent is None:
        return size
    return math.floor(extent * size + 0.5) if isinstance(extent, float) else extent


def allows(pattern, q, k, grid, apart):
    """The token rule, pair by pair, from the families' definitions.

    apart: how far the two lie from each other in the order.
    """
    dt, dh, dw = (abs(a - b) for a, b in zip(q, k, strict=True))
    if isinstance(pattern, Full):
        return True
    if isinstance(pattern, Band):
        return apart <= math.floor(pattern.width * math.prod(grid) + 0.5)
    if isinstance(pattern, Window | MultiDiagonal):
        extents = (pattern.t, pattern.h, pattern.w)
        return all(d <= half(e, n) for d, e, n in zip((dt, dh, dw), extents, grid, strict=True))
    if isinstance(pattern, FirstFrames):
        return k[0] < pattern.n
    if isinstance(pattern, Stripe):
        axis = "thw".index(pattern.axis)
        size, place = grid[axis], k[axis]
        start = pattern.start
        start = math.floor(start * size) if isinstance(start, float) else min(start, size - 1)
        length = max(1, half(pattern.length, size))
        every = max(1, half(pattern.every, size))
        starts = range(start, size, every)
        starts = starts if pattern.every is not None else [start]
        return any(s <= place < s + length for s in starts)
    if isinstance(pattern, Radial):
        _, rows, columns = grid
        if dt <= 1 or (pattern.first_frame_sink and k[0] == 0):
            return True
        width = pattern.decay * rows * columns * 0.5 ** math.floor(math.log2(dt))
        if width < 1 and dt % math.ceil(1 / width):
            return False
        if width >= columns:
            return dh <= width // columns
        return dh == 0 and (dw + 1 <= width or dw == 0)
    return any(allows(part, q, k, grid, apart) for part in pattern.parts)


def brute_force(pattern, blocking):
    """Any valid pair of a block; text rows and columns; no padding; token by token."""
    layout = blocking.layout
    if isinstance(pattern, Skip):
        return torch.zeros(blocking.q_blocks, blocking.kv_blocks, dtype=torch.bool)
    kinds = [s.kind for s in layout.segments for _ in range(s.length)]
    owner = layout.grid_index().tolist()
    coords = [tuple(c) for c in layout.coordinates().tolist()]
    order = blocking.indices()
    order = range(layout.length) if order is None else order.tolist()
    rows = [[False] * blocking.kv_blocks for _ in range(blocking.q_blocks)]
    for i, q in enumerate(order):
        row = rows[i // blocking.block[0]]
        for j, k in enumerate(order):
            column = j // blocking.block[1]
            if row[column] or "pad" in (kinds[q], kinds[k]):
                continue
            if "text" in (kinds[q], kinds[k]) or owner[q] != owner[k]:
                row[column] = True
            else:
                grid = layout.grids[owner[q]]
                row[column] = allows(pattern, coords[q], coords[k], grid, abs(i - j))
    keep = torch.tensor(rows)
    # a text token forces its block even against keys of its own kind alone
    for row in range(blocking.q_blocks):
        for column in range(blocking.kv_blocks):
            q_kinds = {kinds[t] for t in order[row * blocking.block[0] :][: blocking.block[0]]}
            k_kinds = {kinds[t] for t in order[column * blocking.block[1] :][: blocking.block[1]]}
            if {"pad"} not in (q_kinds, k_kinds) and "text" in q_kinds | k_kinds:
                assert keep[row, column]
    return keep


@pytest.mark.parametrize("pattern", EXAMPLES, ids=lambda p: p.name)
@pytest.mark.parametrize(("layout", "order"), [(LAYOUT, "hilbert"), (SEVERAL, "hwt")])
def test_mask_is_any_pair_of_the_block(pattern, layout, order):
    blocking = Blocking(layout, order, (16, 8))
    assert torch.equal(pattern.mask(blocking), brute_force(pattern, blocking))


@settings(max_examples=25)
@given(
    st.sampled_from(EXAMPLES),
    st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(1, 5)),
    st.tuples(st.integers(0, 4), st.integers(0, 9)),
    st.sampled_from(["thw", "wht", "tile(2,2,3)", "morton"]),
    st.sampled_from([(1, 1), (5, 3), (4, 16)]),
)
def test_mask_on_any_layout(pattern, grid, text_and_padding, order, block):
    text, padding = text_and_padding
    layout = Layout.of(grid, text_before=text, padding=padding)
    blocking = Blocking(layout, order, block)
    mask = pattern.mask(blocking)
    if layout.length <= 60:
        assert torch.equal(mask, brute_force(pattern, blocking))
    rows = mask.any(-1)
    nothing = isinstance(pattern, Skip)
    expected = torch.zeros_like(rows) if nothing else ~blocking.pad_blocks()[0]
    assert torch.equal(rows, expected)


@settings(max_examples=25)
@given(
    st.tuples(*[st.integers(0, 4)] * 3),
    st.tuples(*[st.integers(0, 2)] * 3),
    st.sampled_from(["thw", "hwt", "hilbert"]),
)
def test_masks_grow_with_the_window(size, more, order):
    blocking = Blocking(LAYOUT, order, (8, 4))
    small = Window(*size).mask(blocking)
    large = Window(*(a + b for a, b in zip(size, more, strict=True))).mask(blocking)
    assert not (small & ~large).any()
    spatial = MultiDiagonal(h=size[1], w=size[2]).mask(blocking)
    assert not (small & ~spatial).any()


def test_radial_grows_with_decay():
    blocking = Blocking(Layout.of((17, 6, 5)), "thw", (10, 6))
    masks = [Radial(decay).mask(blocking) for decay in (0.01, 0.1, 0.5, 1.0, 3.0)]
    for small, large in pairwise(masks):
        assert not (small & ~large).any()
    assert masks[0].float().mean() < 0.3 < masks[-1].float().mean()


def test_radial_keeps_full_neighbours_and_halves():
    """One block per row of the image: the kept rows per frame distance, read off the mask."""
    blocking = Blocking(Layout.of((9, 16, 4)), "thw", (4, 4))
    kept = Radial().mask(blocking).view(9, 16, 9, 16)[0, 8].sum(-1)
    assert kept.tolist() == [16, 16, 16, 16, 9, 9, 9, 9, 5]


@pytest.mark.parametrize("decay", [0.1, 0.2, 0.5, 1.0])
def test_radial_is_as_wide_as_published(decay):
    """Tokens kept of each frame by one in the middle, beside |k - l| + 1 <= width (equation 3)."""
    rows, columns = 9, 15
    blocking = Blocking(Layout.of((33, rows, columns)), "thw", (1, 1))
    size, middle = rows * columns, rows * columns // 2
    kept = Radial(decay).mask(blocking)[middle].view(33, size).sum(-1)
    for r in range(2, 33):
        width = decay * size / 2 ** int(math.log2(r))
        published = sum(abs(middle - place) + 1 <= width for place in range(size))
        if width >= columns:
            assert abs(kept[r] - published) <= columns
        elif width >= 1:
            assert kept[r] == min(published, columns)
        else:
            assert kept[r] == (r % math.ceil(1 / width) == 0)


def test_one_pattern_serves_every_grid():
    for pattern in EXAMPLES:
        for grid in [(5, 7, 3), (2, 9, 4), (1, 6, 11)]:
            blocking = Blocking(LAYOUT.with_grid(grid), "hwt", (16, 8))
            assert pattern.mask(blocking).shape == (blocking.q_blocks, blocking.kv_blocks)
    whole = Window(0.5, 0.5, 0.5)
    density = [
        whole.mask(Blocking(Layout.of(grid), "thw", (1, 1))).float().mean()
        for grid in [(4, 6, 8), (8, 6, 12)]
    ]
    assert abs(density[0] - density[1]) < 0.1


def test_masks_do_not_depend_on_the_chunk(monkeypatch):
    blocking = Blocking(SEVERAL, "hilbert", (16, 8))
    whole = [pattern.mask(blocking) for pattern in EXAMPLES]
    monkeypatch.setattr(patterns, "CHUNK_ELEMENTS", 1)
    for pattern, expected in zip(EXAMPLES, whole, strict=True):
        assert torch.equal(pattern.mask(blocking), expected)


def test_other_grids_are_seen_in_full():
    blocking = Blocking(Layout.of([(2, 3, 4), (1, 6, 2)]), "thw", (12, 6))
    mask = Window(0, 0, 0).mask(blocking)
    assert mask[:2, 4:].all()
    assert mask[2, :4].all()
    assert not mask[0, 2:4].any()


@pytest.mark.parametrize("pattern", EXAMPLES, ids=lambda p: p.name)
def test_json_round_trip(pattern):
    again = pattern_from_dict(json.loads(json.dumps(pattern.to_dict())))
    assert again == pattern
    assert hash(again) == hash(pattern)
    assert again.name == pattern.name


def test_names():
    assert Window(2, 3, 3).name == "window(t=2,h=3,w=3)"
    assert Window(h=0.25).name == "window(h=0.25)"
    assert Full().name == "full"
    assert Union((Full(), FirstFrames(2))).name == "union(full,first_frames(n=2))"
    assert pattern_from_dict({"kind": "sink", "n": 3}) == FirstFrames(3)
    assert [p.name for p in (Identity(), Share(), Band(0.25))] == [
        "identity",
        "share(of=step)",
        "band(width=0.25)",
    ]


def test_a_band_follows_the_order():
    """In `hwt` the band of one token to each side joins frames at the same place."""
    grid = (3, 4, 2)
    natural, by_place = (
        Band(1 / 24).mask(Blocking(Layout.of(grid), order, (1, 1))) for order in ("thw", "hwt")
    )
    assert torch.equal(natural, by_place)
    assert natural.sum(-1).tolist() == [2] + [3] * 22 + [2]
    order = Blocking(Layout.of(grid), "hwt", (1, 1)).indices()
    tokens = torch.zeros(24, 24, dtype=torch.bool)
    tokens[order[:, None], order] = by_place
    first, place = tokens[0].nonzero().flatten().tolist(), Layout.of(grid).coordinates()
    assert place[first].tolist() == [[0, 0, 0], [1, 0, 0]]


def test_a_union_may_hold_a_band():
    blocking = Blocking(LAYOUT, "hilbert", (16, 8))
    parts = Band(0.05), FirstFrames(1)
    together = Union(parts).mask(blocking)
    assert torch.equal(together, parts[0].mask(blocking) | parts[1].mask(blocking))
    assert not torch.equal(together, parts[0].mask(blocking))
    assert not torch.equal(together, parts[1].mask(blocking))


def test_a_mask_is_made_once_for_a_pattern_a_blocking_and_a_device():
    known, device = {}, torch.device("cpu")
    blocking = Blocking(LAYOUT, "hilbert", (16, 8))
    first = patterns.known_mask(Window(1, 1, 1), blocking, device, known)
    assert torch.equal(first, Window(1, 1, 1).mask(blocking))
    assert patterns.known_mask(Window(1, 1, 1), blocking, device, known) is first
    for other in (Blocking(LAYOUT, "thw", (16, 8)), Blocking(LAYOUT, "hilbert", (8, 8))):
        made = patterns.known_mask(Window(1, 1, 1), other, device, known)
        assert torch.equal(made, Window(1, 1, 1).mask(other))
    assert len(known) == 3


def test_a_whole_axis_is_not_one_unit():
    assert Window(1, 1, 1) != Window(1.0, 1.0, 1.0)
    assert Window(1.0, 1.0, 1.0) == Window()
    assert Stripe(length=1.0) == Stripe(length=None) != Stripe(length=1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"kind": "windw"}, "did you mean 'window'"),
        ({"kind": "window", "hh": 3}, "window has no 'hh'; did you mean 'h'"),
        ({"kind": "radial", "decy": 0.5}, "did you mean 'decay'"),
        ({"kind": "full", "n": 1}, "full has no 'n'"),
        ({"kind": "window", "t": "2"}, "window"),
        ({"kind": "window", "t": True}, "grid units"),
        ({"kind": "window", "t": -1}, "at least 0"),
        ({"kind": "window", "t": 1.5}, "fraction"),
        ({"kind": "stripe", "every": 0}, "at least 1"),
        ({"kind": "stripe", "start": 1.0}, "fraction in"),
        ({"kind": "stripe", "axis": "x"}, "stripe"),
        ({"kind": "first_frames", "n": 0}, "at least 1"),
        ({"kind": "radial", "decay": 0}, "positive"),
        ({"kind": "radial", "first_frame_sink": 1}, "radial"),
        ({"kind": "band"}, "width"),
        ({"kind": "band", "width": 1.5}, "fraction of the sequence"),
        ({"kind": "band", "width": -0.1}, "fraction of the sequence"),
        ({"kind": "band", "width": True}, "fraction of the sequence"),
        ({"kind": "share", "of": "steps"}, "share"),
        ({"kind": "identity", "of": "step"}, "identity has no 'of'"),
        ({"kind": "union", "parts": [{"kind": "share"}, {"kind": "full"}]}, "leave skip out"),
        ({"kind": "union"}, "parts"),
        ({"kind": "union", "parts": []}, "at least one"),
        ({"kind": "union", "parts": [{"kind": "skip"}]}, "leave skip out"),
        ({"kind": "union", "parts": [{"kind": "windo"}]}, "did you mean 'window'"),
        ({"kind": "union", "parts": "full"}, "union"),
        ({"kind": ["full"]}, "object with a 'kind'"),
        ({"t": 3}, "object with a 'kind'"),
        ("full", "full"),
    ],
)
def test_bad_patterns_are_refused(data, message):
    with pytest.raises((ValueError, TypeError)) as error:
        pattern_from_dict(data)
    assert message in str(error.value)


def test_kinds_are_registered_once():
    with pytest.raises(ValueError, match="registered already, for Window"):
        patterns.register(patterns.PATTERNS, "window")(Window)
