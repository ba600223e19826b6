"""Blocks of a layout: what is text, what is padding, what is forced."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accel.blocking import Blocking
from accel.layout import Layout

LAYOUT = Layout.of((5, 7, 3), text_before=11, text_after=6, padding=4)


def cut(tokens, size):
    return [tokens[i : i + size] for i in range(0, len(tokens), size)]


@settings(max_examples=50)
@given(
    st.tuples(*[st.integers(1, 4)] * 3),
    st.tuples(*[st.integers(0, 13)] * 3),
    st.tuples(st.integers(1, 17), st.integers(1, 17)),
)
def test_text_and_padding_blocks_by_token(grid, counts, block):
    before, after, padding = counts
    layout = Layout.of(grid, text_before=before, text_after=after, padding=padding)
    blocking = Blocking(layout, "morton", block)
    visual = grid[0] * grid[1] * grid[2]
    kinds = ["text"] * before + ["grid"] * visual + ["text"] * after + ["pad"] * padding
    for side in (0, 1):
        parts = cut(kinds, block[side])
        assert blocking.text_blocks()[side].tolist() == ["text" in part for part in parts]
        assert blocking.pad_blocks()[side].tolist() == [set(part) == {"pad"} for part in parts]
    assert blocking.q_blocks == len(cut(kinds, block[0]))
    assert blocking.kv_blocks == len(cut(kinds, block[1]))


def test_force_adds_text_and_clears_padding():
    blocking = Blocking(
        Layout.of((2, 5, 3), text_before=5, text_after=2, padding=20), "thw", (8, 4)
    )
    kept = blocking.force(torch.zeros(2, 3, blocking.q_blocks, blocking.kv_blocks).bool())
    text_rows, text_columns = [0, 4], [0, 1, 8, 9]
    for row in range(blocking.q_blocks):
        for column in range(blocking.kv_blocks):
            inside = row < 5 and column < 10
            expected = inside and (row in text_rows or column in text_columns)
            assert (kept[..., row, column] == expected).all()
    full = blocking.force(torch.ones(blocking.q_blocks, blocking.kv_blocks).bool())
    assert full[:5, :10].all()
    assert full.sum() == 50


def test_force_is_idempotent_and_checks_its_shape():
    blocking = Blocking(LAYOUT, "hilbert", (16, 8))
    generator = torch.Generator().manual_seed(3)
    keep = torch.rand(8, 16, generator=generator) < 0.2
    assert torch.equal(blocking.force(blocking.force(keep)), blocking.force(keep))
    with pytest.raises(ValueError, match="8 x 16 blocks"):
        blocking.force(keep[:, :15])


def test_grid_blocks_tell_grids_apart():
    layout = Layout.of([(1, 3, 4), (1, 2, 5)], text_before=4, padding=6)
    blocking = Blocking(layout, "thw", (4, 4))
    assert blocking.grid_blocks().tolist() == [-1, 0, 0, 0, 1, 1, 1, -1]


def test_indices_are_none_when_natural():
    assert Blocking(LAYOUT, "thw", (16, 8)).indices() is None
    assert sorted(Blocking(LAYOUT, "hwt", (16, 8)).indices().tolist()) == list(range(126))


def test_blockings_are_values():
    spellings = ("tile(2, 4,4)", "tile(2,4,4)")
    assert len({Blocking(LAYOUT, order, (16, 8)) for order in spellings}) == 1


def test_bad_blockings():
    with pytest.raises(ValueError, match="did you mean 'hilbert'"):
        Blocking(LAYOUT, "hilberd", (16, 8))
    with pytest.raises(ValueError, match=r"q_block, kv_block.*\(16, 0\)"):
        Blocking(LAYOUT, "thw", (16, 0))
    for block in [(16,), (16, 8.0), 16]:
        with pytest.raises((TypeError, ValueError)):
            Blocking(LAYOUT, "thw", block)
