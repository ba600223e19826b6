"""Windows of tiles: what keeps sliding tile attention from cutting blocks."""

import pytest
import torch

from accel.blocking import Blocking
from accel.choice import Choice
from accel.layout import Layout
from accel.pattern_tiles import TileWindow

GRID, TILE = (6, 8, 15), (2, 2, 3)  # 3 x 4 x 5 tiles
TILED = "tile(2,2,3)"


def tiles_of(window, grid=GRID, tile=TILE):
    """Kept tiles of every tile: [tiles, tiles], by the rule said tile by tile."""
    counts = [-(-size // side) for size, side in zip(grid, tile, strict=True)]
    places = [torch.arange(n) for n in counts]
    at = torch.stack(torch.meshgrid(*places, indexing="ij"), -1).reshape(-1, 3)
    keep = torch.ones(len(at), len(at), dtype=torch.bool)
    for axis, (n, wide) in enumerate(zip(counts, window, strict=True)):
        for q in range(len(at)):
            first = min(max(int(at[q, axis]) - wide // 2, 0), n - wide)
            keep[q] &= (at[:, axis] >= first) & (at[:, axis] < first + wide)
    return keep


@pytest.mark.parametrize("window", [(1, 3, 5), (3, 1, 2), (2, 4, 1), (1, 1, 1)])
def test_every_tile_sees_whole_tiles_the_same_number_everywhere(window):
    keep = TileWindow(TILE, window).mask(Blocking(Layout.of(GRID), TILED, (12, 12)))
    assert torch.equal(keep, tiles_of(window))
    assert keep.sum(1).unique().tolist() == [window[0] * window[1] * window[2]]


def test_fractions_are_of_the_tiles_of_an_axis_and_none_is_all():
    blocking = Blocking(Layout.of(GRID), TILED, (12, 12))
    for window, counts in (((1 / 3, 0.5, 0.1), (1, 2, 1)), ((None, 0.9, 1.0), (3, 4, 5))):
        assert torch.equal(TileWindow(TILE, window).mask(blocking), tiles_of(counts))


def test_a_window_wider_than_the_grid_is_all_of_it():
    blocking = Blocking(Layout.of((3, 5, 7), text_before=5), TILED, (16, 8))
    assert TileWindow(TILE, (9, 9, 9)).mask(blocking).all()


def test_ragged_tiles_at_the_far_edge_are_tiles():
    window = TileWindow((2, 2, 3), (1, 1, 1))
    (t, h, w), *_ = window.terms((3, 5, 7))
    assert t.tolist() == [[True, True, False], [True, True, False], [False, False, True]]
    assert (h.sum(1).tolist(), w.sum(1).tolist()) == ([2, 2, 2, 2, 1], [3, 3, 3, 3, 3, 3, 1])


def test_it_survives_a_plan():
    choice = Choice(TileWindow(TILE, (0.5, None, 3)), order=TILED)
    data = choice.to_dict()
    data["select"] = {k: list(x) if isinstance(x, tuple) else x for k, x in data["select"].items()}
    assert Choice.from_dict(data) == choice
    assert TileWindow(TILE, (1.0, 1, 1)).window == (None, 1, 1)


@pytest.mark.parametrize("window", [(0, 1, 1), (1, 1.5, 1), (1, 1, 0.0), (True, 1, 1)])
def test_windows_that_are_none_are_refused(window):
    with pytest.raises(ValueError, match="window is"):
        TileWindow(TILE, window)
