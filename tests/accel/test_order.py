"""Orders: permutations of the visual tokens, exact both ways."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accel.layout import Layout
from accel.order import Order, inverse, order_indices, parse_order, reorder

NAMES = [
    "thw",
    "twh",
    "htw",
    "hwt",
    "wth",
    "wht",
    "tile(2,4,4)",
    "tile(3,1,2)",
    "hilbert",
    "morton",
]
LAYOUT = Layout.of((5, 7, 3), text_before=11, text_after=6, padding=4)
GRIDS = st.tuples(*[st.integers(1, 6)] * 3)


@settings(max_examples=40)
@given(st.lists(GRIDS, min_size=1, max_size=2), st.sampled_from(NAMES), st.integers(0, 5))
def test_every_order_permutes_each_grid_in_its_own_span(grids, name, text):
    layout = Layout.of(grids, text_before=text, text_after=3, padding=2)
    indices = order_indices(name, layout)
    for segment in layout.segments:
        span = indices[segment.start : segment.stop]
        natural = torch.arange(segment.start, segment.stop)
        if segment.kind == "grid":
            span = span.sort().values
        torch.testing.assert_close(span, natural, rtol=0, atol=0)
    back = inverse(indices)
    torch.testing.assert_close(indices[back], torch.arange(layout.length), rtol=0, atol=0)
    torch.testing.assert_close(back[indices], torch.arange(layout.length), rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_reorder_round_trip_is_exact(name, dtype):
    x = torch.randn(2, 3, LAYOUT.length, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    apply, restore = reorder(name, LAYOUT)
    assert torch.equal(restore(apply(x)), x)
    assert torch.equal(apply(restore(x)), x)
    assert torch.equal(apply(x), x[..., order_indices(name, LAYOUT), :])
    assert torch.equal(apply(x[0, 0]), apply(x)[0, 0])


def test_reorder_checks_the_length():
    apply, _ = reorder("hwt", LAYOUT)
    with pytest.raises(ValueError, match="126 tokens"):
        apply(torch.zeros(125, 2))


@pytest.mark.parametrize("name", NAMES[:6])
def test_axis_orders_are_the_permuted_volume(name):
    volume = torch.arange(105).reshape(5, 7, 3)
    expected = volume.permute(["thw".index(axis) for axis in name]).reshape(-1)
    assert torch.equal(order_indices(name, Layout.of((5, 7, 3))), expected)


@pytest.mark.parametrize(("grid", "tile"), [((5, 7, 3), (2, 4, 4)), ((4, 6, 9), (3, 2, 4))])
def test_tiles_are_compact_with_ragged_edges(grid, tile):
    volume = torch.arange(grid[0] * grid[1] * grid[2]).reshape(grid)
    pieces = [
        volume[t : t + tile[0], h : h + tile[1], w : w + tile[2]].reshape(-1)
        for t in range(0, grid[0], tile[0])
        for h in range(0, grid[1], tile[1])
        for w in range(0, grid[2], tile[2])
    ]
    got = order_indices("tile({},{},{})".format(*tile), Layout.of(grid))
    assert torch.equal(got, torch.cat(pieces))


@pytest.mark.parametrize("grid", [(2, 2, 2), (4, 4, 4), (8, 8, 8), (1, 8, 8), (4, 1, 4), (1, 1, 8)])
def test_hilbert_takes_unit_steps_on_powers_of_two(grid):
    layout = Layout.of(grid)
    path = layout.coordinates()[order_indices("hilbert", layout)]
    assert (path.diff(dim=0).abs().sum(1) == 1).all()


def test_hilbert_keeps_blocks_together():
    """Runs of 64 tokens span a smaller box than in natural order, on a grid without symmetry."""
    layout = Layout.of((5, 12, 17))

    def extent(name):
        path = layout.coordinates()[order_indices(name, layout)][: 1020 // 60 * 60]
        runs = path.reshape(-1, 60, 3)
        return (runs.amax(1) - runs.amin(1)).sum(1).float().mean()

    assert extent("hilbert") < 0.75 * extent("thw")


def test_morton_order_of_a_small_cube():
    path = Layout.of((2, 2, 4)).coordinates()[order_indices("morton", Layout.of((2, 2, 4)))]
    first = [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1], [1, 0, 0], [1, 0, 1], [1, 1, 0], [1, 1, 1]]
    assert path[:8].tolist() == first
    assert path[8:, 2].min() == 2


@pytest.mark.parametrize("name", NAMES)
def test_names_round_trip(name):
    assert parse_order(name).name == name
    assert len({parse_order(name), parse_order(name)}) == 1
    assert parse_order(name).is_natural == (name == "thw")


def test_natural_orders_hand_the_tensor_back():
    x = torch.zeros(126, 2)
    for name in ("thw", "tile(1,1,1)"):
        apply, restore = reorder(name, LAYOUT)
        assert apply(x) is x
        assert restore(x) is x
    assert parse_order("tile( 2, 4,4 )") == Order("tile", (2, 4, 4))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("hilbrt", "'hilbert'"),
        ("thww", "'thw'"),
        ("tile(2,4)", "tile"),
        ("tile", "tile"),
        ("", "Known"),
    ],
)
def test_unknown_orders_name_the_nearest(name, hint):
    with pytest.raises(ValueError, match="unknown order") as error:
        parse_order(name)
    assert hint in str(error.value)
    assert "morton" in str(error.value)


def test_bad_orders():
    with pytest.raises(ValueError, match="at least 1"):
        parse_order("tile(2,0,4)")
    with pytest.raises(ValueError, match="exactly tile orders"):
        Order("hwt", (1, 2, 3))
    with pytest.raises(ValueError, match="did you mean 'morton'"):
        Order("mortn")
