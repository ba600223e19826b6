"""Layouts: where grids, text and padding sit."""

import pytest
import torch

from accel.blocking import Blocking
from accel.layout import Layout, Segment

LAYOUT = Layout.of((5, 7, 3), text_before=11, text_after=6, padding=4)


def test_of_places_text_grid_text_padding():
    assert [(s.kind, s.start, s.stop) for s in LAYOUT.segments] == [
        ("text", 0, 11),
        ("grid", 11, 116),
        ("text", 116, 122),
        ("pad", 122, 126),
    ]
    assert (LAYOUT.length, LAYOUT.valid_length, LAYOUT.text_tokens) == (126, 122, 17)
    assert LAYOUT.grid == (5, 7, 3)


def test_several_grids():
    layout = Layout.of([(1, 4, 6), (2, 3, 5)], text_before=3)
    assert layout.grids == ((1, 4, 6), (2, 3, 5))
    assert layout.grid == (1, 4, 6)
    index = layout.grid_index()
    assert index.tolist() == [-1] * 3 + [0] * 24 + [1] * 30


def test_lists_from_json_become_a_hashable_value():
    assert Layout.of([5, 7, 3], text_before=2) == Layout.of((5, 7, 3), text_before=2)
    assert len({LAYOUT, Layout.of([[5, 7, 3]], text_before=11, text_after=6, padding=4)}) == 1


def test_text_alone_has_no_grid():
    layout = Layout.of(text_before=9, padding=2)
    assert (layout.grids, layout.length, layout.valid_length) == ((), 11, 9)
    with pytest.raises(ValueError, match="no grid"):
        _ = layout.grid


def test_coordinates_are_t_h_w_with_columns_fastest():
    coords = LAYOUT.coordinates()
    expected = [[t, h, w] for t in range(5) for h in range(7) for w in range(3)]
    assert coords.dtype == torch.int32
    assert coords[11:116].tolist() == expected
    assert (torch.cat([coords[:11], coords[116:]]) == -1).all()


def test_with_grid_keeps_text_and_padding():
    assert LAYOUT.with_grid((2, 4, 6)) == Layout.of(
        (2, 4, 6), text_before=11, text_after=6, padding=4
    )
    several = Layout.of([(1, 4, 6), (2, 3, 5)], text_after=3)
    assert several.with_grid((1, 8, 2)).grids == ((1, 8, 2), (2, 3, 5))
    assert several.with_grid([(1, 8, 2), (1, 1, 3)]).length == 22
    with pytest.raises(ValueError, match="2 grids, got 1"):
        several.with_grid([(1, 8, 2)])


@pytest.mark.parametrize(
    "grid", [(5, 7), (5, 0, 3), (5, 7.0, 3), [(5, 7, 3), (1, 2)], (True, 2, 3)]
)
def test_bad_grids_are_named(grid):
    with pytest.raises(ValueError, match="three whole numbers"):
        Layout.of(grid)


def test_bad_segments_are_named():
    text = Segment("text", 0, 4)
    with pytest.raises(ValueError, match="starts at token 6, but the one before it ends at 4"):
        Layout((text, Segment("text", 6, 1)))
    with pytest.raises(ValueError, match="makes 105 tokens, not 104"):
        Segment("grid", 0, 104, (5, 7, 3))
    with pytest.raises(ValueError, match="exactly grid segments"):
        Segment("text", 0, 1, (1, 1, 1))
    with pytest.raises(ValueError, match="length >= 1"):
        Segment("text", 0, 0)
    with pytest.raises(ValueError, match="at least one segment"):
        Layout.of()
    with pytest.raises(ValueError, match="nothing to attend to"):
        Layout.of(padding=3)
    with pytest.raises(ValueError, match="text_after"):
        Layout.of((1, 1, 1), text_after=-1)


def test_padding_inside_is_cut_out_before_anything_is_computed():
    layout = Layout.join([("text", 4), ("pad", 2), (1, 3, 5), ("reference", 7), ("pad", 1)])
    assert layout.padded_inside
    assert layout.valid().tolist() == [True] * 4 + [False] * 2 + [True] * 22 + [False]
    assert layout.without_padding() == Layout.join([("text", 4), (1, 3, 5), ("reference", 7)])
    assert not layout.without_padding().padded_inside
    assert not Layout.of((1, 3, 5), padding=2).padded_inside
    assert Layout.of((1, 3, 5), padding=2).without_padding() == Layout.of((1, 3, 5))
    with pytest.raises(ValueError, match="cut it out"):
        Blocking(layout)


def test_reference_images_are_kept_as_text_is():
    layout = Layout.join([("text", 16), (1, 8, 8), ("reference", 32)])
    q_kept, kv_kept = Blocking(layout, block=(16, 32)).text_blocks()
    assert q_kept.tolist() == [True, False, False, False, False, True, True]
    assert kv_kept.tolist() == [True, False, True, True]  # a block that is shared counts
    assert layout.text_tokens == 16
    assert layout.grids == ((1, 8, 8),)
