"""Sparsity and incoherence of attention maps, and the orders that are chosen by them."""

import pytest
import torch

from accel.blocking import Blocking
from accel.layout import Layout
from accel.map_statistics import best_orders, map_statistics
from accel.profile import Profile

HEADS, KV_HEADS, DIM = 4, 2, 8


def by_hand(q, k, blocking):
    """All rows, entry by entry, from the whole map."""
    valid, (rows, columns) = blocking.layout.valid_length, blocking.block
    order = blocking.indices()
    order = torch.arange(blocking.layout.length) if order is None else order
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    shares = (q[0, :, :valid] @ k[0, :, :valid].mT * q.shape[3] ** -0.5).softmax(-1)
    shares = shares[:, order[:valid]][..., order[:valid]]
    empty, spread = [], []
    for i in range(0, valid, rows):
        for j in range(0, valid, columns):
            block = shares[:, i : i + rows, j : j + columns].flatten(1)
            empty.append(((block < 1e-3).float().mean(1) >= 0.9).float())
            spread.append(block.amax(1) / block.mean(1))
    return torch.stack(empty).mean(0), torch.stack(spread).mean(0)


@pytest.mark.parametrize("order", ["thw", "wht"])
@pytest.mark.parametrize(
    "layout", [Layout.of((3, 5, 7)), Layout.of((3, 5, 7), text_before=6, padding=13)]
)
def test_all_rows_give_what_the_whole_map_has(order, layout):
    generator = torch.Generator().manual_seed(0)
    q, k = (
        torch.randn(1, n, layout.length, DIM, generator=generator) * 3 for n in (HEADS, KV_HEADS)
    )
    blocking = Blocking(layout, order, (16, 8))
    found = map_statistics(q, k, blocking, rows=layout.length)
    expected = by_hand(q, k, blocking)
    assert 0 < expected[0].mean() < 1
    torch.testing.assert_close(found, expected)


def test_fewer_rows_are_whole_blocks_of_them():
    layout = Layout.of((4, 4, 4))
    q, k = torch.zeros(2, 1, HEADS, 64, DIM)
    # queries of the first and last block of rows look at one key, the others at all
    k[..., 0, 0] = 50.0
    q[:, :, :8, 0] = q[:, :, 56:, 0] = 50.0
    sparsity, incoherence = map_statistics(q, k, Blocking(layout, "thw", (8, 8)), rows=16)
    assert torch.equal(sparsity, torch.full((HEADS,), 7 / 8))
    assert (incoherence > 0).all()


def profile_of(sparsities, incoherences):
    profile = Profile(orders=("thw", "hwt", "wth"))
    for band, (sparsity, incoherence) in enumerate(zip(sparsities, incoherences, strict=True)):
        tables = {"sparsities": torch.tensor(sparsity), "incoherences": torch.tensor(incoherence)}
        profile.add(("a", band), **tables)
    return profile


# [orders, heads], in two bands: the first head is sparse by hwt, the second coherent by wth
SPARSITIES = [[[0.1, 0.5], [0.8, 0.5], [0.2, 0.5]], [[0.3, 0.5], [0.6, 0.5], [0.4, 0.5]]]
INCOHERENCES = [[[9.0, 9.0], [9.0, 8.0], [9.0, 3.0]], [[9.0, 9.0], [9.0, 8.0], [9.0, 5.0]]]


@pytest.mark.parametrize(
    ("weight", "orders"), [(0.5, ("hwt", "wth")), (1.0, ("hwt", "thw")), (0.0, ("thw", "wth"))]
)
def test_the_order_is_that_of_a_sparse_and_coherent_map(weight, orders):
    """More sparsity is better: its complement is what is weighed."""
    assert best_orders(profile_of(SPARSITIES, INCOHERENCES), weight) == {"a": orders}


def test_bands_decide_together():
    profile = profile_of(
        [[[0.9], [0.0], [0.0]], [[0.0], [0.5], [0.0]]], [[[1.0], [1.0], [1.0]]] * 2
    )
    assert best_orders(profile, 1.0) == {"a": ("thw",)}
