"""Block sets: exact where they were made, resampled elsewhere."""

import base64
import re

import pytest
import torch

from accel.blocking import Blocking
from accel.choice import Choice
from accel.errors import PlanError
from accel.layout import Layout
from accel.pattern import Window, pattern_from_dict
from accel.pattern_blocks import Blocks
from accel.pattern_union import Union

GRID, BLOCK = (3, 5, 7), (32, 16)
LAYOUTS = {
    "grid": Layout.of(GRID),
    "text before": Layout.of(GRID, text_before=11),
    "text around": Layout.of(GRID, text_before=33, text_after=5, padding=40),
    "two grids": Layout.of([GRID, (1, 4, 6)], text_before=3),
}


def random_map(blocking, seed=0, keep=0.4):
    generator = torch.Generator().manual_seed(seed)
    shape = blocking.q_blocks, blocking.kv_blocks
    return torch.rand(shape, generator=generator) < keep


@pytest.mark.parametrize("order", ["thw", "hwt", "tile(2,2,4)", "hilbert"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_where_it_was_made_it_is_the_map_itself(layout, order):
    blocking = Blocking(layout, order, BLOCK)
    keep = random_map(blocking)
    # whatever keeps its own rows alive
    place = torch.arange(blocking.q_blocks) * BLOCK[0] // BLOCK[1]
    keep[torch.arange(blocking.q_blocks), place] = True
    found = Blocks.of(keep, blocking)
    mask = found.mask(blocking)
    first = layout.segments[[s.kind for s in layout.segments].index("grid")]
    rows, columns = (slice(first.start // n, -(-first.stop // n)) for n in BLOCK)
    inside = blocking.force(keep)[rows, columns]
    own = mask[rows, columns]
    if len(layout.grids) == 1:
        assert torch.equal(own, inside)
    assert (own | ~inside).all()
    assert torch.equal(Blocks.of(mask, blocking).mask(blocking), mask)


def by_hand(found, blocking):
    """The rule, block by block, on a sequence that is one grid."""

    def middle(block, size):
        return (block * size + min((block + 1) * size, blocking.layout.length) - 1) // 2

    def source(side, block):
        size = blocking.block[side]
        token = natural[middle(block, size)]
        t, h, w = blocking.layout.grid
        at = (token // (h * w), token // w % h, token % w)
        there = [(2 * x + 1) * m // (2 * n) for x, n, m in zip(at, (t, h, w), GRID, strict=True)]
        wanted = (there[0] * GRID[1] + there[1]) * GRID[2] + there[2]
        return places.index(wanted) // found.block[side]

    natural = blocking.indices().tolist()
    places = Blocking(Layout.of(GRID), found.order, BLOCK).indices().tolist()
    keep = torch.zeros(blocking.q_blocks, blocking.kv_blocks, dtype=torch.bool)
    from_columns = [source(1, j) for j in range(blocking.kv_blocks)]
    for i in range(blocking.q_blocks):
        from_row = source(0, i)
        for j, from_column in enumerate(from_columns):
            bit = from_row * found.shape[1] + from_column
            keep[i, j] = bool(found.bits[bit // 8] >> (7 - bit % 8) & 1)
        if not keep[i].any():
            keep[i, middle(i, blocking.block[0]) // blocking.block[1]] = True
    return keep


@pytest.mark.parametrize(
    ("grid", "block"),
    [(GRID, (16, 32)), ((6, 10, 14), BLOCK), ((2, 4, 9), BLOCK), ((4, 3, 5), (64, 16))],
    ids=str,
)
def test_elsewhere_blocks_are_those_of_their_middle_tokens(grid, block):
    made = Blocking(Layout.of(GRID), "hwt", BLOCK)
    found = Blocks.of(random_map(made, keep=0.2), made)
    blocking = Blocking(Layout.of(grid), "hwt", block)
    assert torch.equal(found.mask(blocking), by_hand(found, blocking))


def test_a_diagonal_of_frames_stays_one_at_more_frames():
    made = Blocking(Layout.of((4, 4, 8)), "thw", (32, 32))  # a block is a frame
    found = Blocks.of(Window(t=0).mask(made), made)
    mask = found.mask(Blocking(Layout.of((8, 4, 8)), "thw", (32, 32)))
    pairs = torch.eye(4, dtype=torch.bool).repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(mask, pairs)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_no_row_is_empty_and_text_is_kept(layout):
    made = Blocking(Layout.of(GRID), "thw", BLOCK)
    found = Blocks.of(torch.zeros(made.q_blocks, made.kv_blocks, dtype=torch.bool), made)
    blocking = Blocking(layout, "thw", BLOCK)
    mask = found.mask(blocking)
    q_pad, _ = blocking.pad_blocks()
    assert torch.equal(mask.any(1), ~q_pad)
    _, kv_text = blocking.text_blocks()
    assert mask[:, kv_text][~q_pad].all()
    assert torch.equal(mask, blocking.force(mask))


def test_it_is_a_value():
    blocking = Blocking(LAYOUTS["text before"], "hwt", BLOCK)
    one, same, other = (Blocks.of(random_map(blocking, seed), blocking) for seed in (0, 0, 1))
    assert one == same != other
    assert len({one, same, other}) == 2
    assert pattern_from_dict(one.to_dict()) == one
    assert Choice.from_dict(Choice(one, order="hwt").to_dict()).select == one
    kept = random_map(blocking)[11 // 32 :, 11 // 16 :].float().mean()
    assert one.name == f"blocks(3x5x7,keep={kept:.3f})"
    assert "bits" not in repr(one)


def good(**changes):
    rows, columns = -(-105 // 32), -(-105 // 16)
    bits = base64.b64encode(bytes(-(-rows * columns // 8))).decode()
    return {"kind": "blocks", "grid": [*GRID], "block": [*BLOCK], "bits": bits, **changes}


BAD = {
    "too few bits": ({"bits": "AAAA"}, "a map of 4 x 7 blocks has 4 bytes, got 3"),
    "no base64": ({"bits": "!!!!"}, "bits are no base64"),
    "bits a number": ({"bits": 0}, "bits is a text, got 0"),
    "bits a list": ({"bits": [0, 0, 0, 0]}, "bits is a text"),
    "no bits": ({"bits": None}, "bits is a text"),
    "a large grid": ({"grid": [4096, 4096, 1]}, "a map has at most 4194304 tokens"),
    "no grid": ({"grid": [0, 1, 1]}, "a grid is (t, h, w)"),
    "a large block": ({"block": [2048, 16]}, "block is two sizes from 1 to 1024"),
    "a block a number": ({"block": 16}, "block is two sizes from 1 to 1024, got 16"),
    "unknown order": ({"order": "hwtt"}, "unknown order 'hwtt'"),
    "order a number": ({"order": 3}, "order is a text, got 3"),
    "start below 0": ({"start": -1}, "start is a number of tokens"),
    "start a switch": ({"start": True}, "start is a number of tokens"),
    "unknown": ({"strat": 0}, "did you mean 'start'"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_what_is_refused(change, message):
    assert pattern_from_dict(good()).shape == (4, 7)
    with pytest.raises(PlanError, match=re.escape(message)) as caught:
        Choice.from_dict({"select": good(**change)})
    assert len(str(caught.value)) < 1000


def test_a_choice_has_the_order_of_its_blocks():
    found = pattern_from_dict(good(order="hwt"))
    assert Choice(found, order="hwt").select is found
    for select in (found, Union((Window(t=0), Union((found,))))):
        with pytest.raises(PlanError, match="found in order 'hwt'; give it that order"):
            Choice(select)
    with pytest.raises(ValueError, match="found in order 'hwt' are none of order 'thw'"):
        found.mask(Blocking(Layout.of(GRID), "thw", BLOCK))


def test_what_no_map_can_be_made_of():
    blocking = Blocking(Layout.of(text_after=40), "thw", BLOCK)
    with pytest.raises(ValueError, match="this layout has none"):
        Blocks.of(random_map(blocking), blocking)
    with pytest.raises(ValueError, match="this blocking has 2 x 3 blocks"):
        Blocks.of(torch.ones(2, 2, dtype=torch.bool), blocking)
