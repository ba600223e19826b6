import re
from dataclasses import replace

import pytest
import torch

from accel import cost_measure
from accel.cost_measure import knots, measure, random_mask
from accel.cost_table import KEEPS, Shape
from accel.estimators import BlockMassTopK, Pooled
from accel.kernels.arguments import RESTS
from accel.layout import Layout
from accel.origin import Origin

LAYOUT = Layout.of((4, 8, 8))
SHAPE = Shape(256, 2, 16, "float32", "cpu", (32, 32))
NAMES = {f"{rest}/{order}" for rest in RESTS for order in ("natural", "ordered")}
ESTIMATORS = (BlockMassTopK(keep=0.3), Pooled(keep=0.3))


def test_keeps_are_those_of_whole_blocks():
    # of 8 blocks a row: 0.02 is one, and so are 0.05 and 0.1
    assert knots(SHAPE) == (1 / 8, 2 / 8, 3 / 8, 4 / 8, 5 / 8, 6 / 8, 1.0)
    assert knots(replace(SHAPE, tokens=100 * 32)) == KEEPS
    assert 8 <= len(KEEPS) <= 16


@pytest.mark.parametrize("keep", [0.1, 0.5, 1.0])
def test_random_masks_keep_what_they_should(keep):
    mask = random_mask(SHAPE, keep, torch.Generator().manual_seed(0))
    assert (mask.counts == max(1, round(keep * 8))).all()
    assert mask.heads == 2


def test_every_price_is_measured():
    seen = []

    def progress(groups):
        for group in groups:
            seen.append(group[0])
            yield group

    origin = Origin("x", {"torch": "1"}, "2")
    table = measure(
        SHAPE,
        estimators=ESTIMATORS,
        layout=LAYOUT,
        rounds=2,
        origin=origin,
        progress=progress,
    )
    assert set(table.sparse) == NAMES
    assert table.keeps == knots(SHAPE)
    assert set(table.select) == {"block_mass", "pooled"}
    assert set(table.again) == {"block_mass"}  # the other finds no log-sum-exp
    assert set(table.dense) == {"full", "half"}
    assert len(seen) == len(NAMES) + 2 + 2
    assert (table.origin, table.source, table.shape) == (origin, "measured", SHAPE)
    prices = [table.dense_ms, table.mask, table.recall, table.term]
    prices += [p for row in table.sparse.values() for p in row]
    prices += [*table.select.values(), *table.again.values(), *table.dense.values()]
    assert all(0 < p.low <= p.value <= p.high for p in prices)


def test_a_batch_and_half_precision():
    shape = replace(SHAPE, tokens=60, batch=3, dtype="bfloat16", precision="half")
    layout = Layout.of((3, 4, 5))
    table = measure(shape, estimators=ESTIMATORS, layout=layout, rounds=1)
    assert table.shape.batch == 3
    assert table.mask.value > 0


def test_only_what_is_new_is_measured(monkeypatch):
    table = measure(SHAPE, estimators=ESTIMATORS[1:], layout=LAYOUT, rounds=1)
    monkeypatch.setattr(cost_measure, "_kernel", None)
    more = measure(SHAPE, estimators=ESTIMATORS[:1], layout=LAYOUT, rounds=1, known=table)
    assert set(more.select) == {"block_mass", "pooled"}
    assert more.select["pooled"] == table.select["pooled"]
    assert set(more.again) == {"block_mass"}
    assert more.sparse == table.sparse


def test_prices_are_ratios_to_dense_of_the_same_round(monkeypatch):
    """A machine that is busy in some rounds shifts both."""

    def in_turns(jobs, device, *, rounds):
        slow = [1.0, 7.0, 3.0]
        assert rounds == 3
        return {name: [s * (1 if name == "dense" else 0.25) for s in slow] for name in jobs}

    monkeypatch.setattr(cost_measure, "in_turns", in_turns)
    table = measure(SHAPE, layout=LAYOUT, rounds=3)
    assert {tuple(p) for row in table.sparse.values() for p in row} == {(0.25, 0.25, 0.25)}
    assert table.dense_ms == pytest.approx((3000.0, 1000.0, 7000.0))
    assert table.recall.value == 0.25


@pytest.mark.parametrize(("other", "calls"), [(1.1, 1), (1.5, 2)])
def test_prices_that_spread_are_measured_again(monkeypatch, other, calls):
    turns = []

    def in_turns(jobs, device, *, rounds):
        turns.append(tuple(jobs))
        return {name: [1.0] * 2 if name == "dense" else [1.0, other] for name in jobs}

    monkeypatch.setattr(cost_measure, "in_turns", in_turns)
    table = measure(SHAPE, layout=LAYOUT, rounds=2)
    assert len(turns) == calls * (len(NAMES) + 2)
    assert table.recall.value == pytest.approx((1 + other) / 2)


def test_estimators_need_a_layout():
    with pytest.raises(ValueError, match=re.escape("estimators are timed on a layout")):
        measure(SHAPE, estimators=ESTIMATORS, rounds=1)


def test_without_a_layout_masks_are_free():
    table = measure(SHAPE, rounds=1)
    assert (table.mask.value, table.recall.value, table.term.value) == (0, 0, 0)


@pytest.mark.gpu
def test_on_a_gpu():
    shape = Shape(256, 2, 64, "bfloat16", "cuda", (64, 64))
    table = measure(shape, estimators=ESTIMATORS, layout=LAYOUT, rounds=1)
    assert table.dense_ms.value > 0
