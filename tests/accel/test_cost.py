import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accel.choice import DENSE, Choice
from accel.cost import (
    KEEPS,
    CostTable,
    Shape,
    dense_price,
    dense_speedup,
    fastest_dense,
    keep_of,
    measure,
    price,
)
from accel.estimators import Antidiagonal, BlockMassTopK, Pooled
from accel.geometry import Geometry, Site
from accel.kernels.arguments import RESTS
from accel.layout import Layout
from accel.pattern import Full, Skip, Window
from accel.plan import Plan
from accel.schedule import Schedule

LAYOUT = Layout.of((4, 8, 8))
SHAPE = Shape(256, 2, 16, "float32", "cpu", (32, 32))
NAMES = tuple(f"{rest}/{order}" for rest in RESTS for order in ("natural", "ordered"))
TABLE = CostTable(
    shape=SHAPE,
    dense_ms=2.0,
    sparse={
        name: tuple(extra + keep for keep in KEEPS)
        for name, extra in zip(NAMES, (0.05, 0.1, 0.15, 0.2, 0.25, 0.3), strict=True)
    },
    select={"block_mass": 2.0},
    dense={"full": 1.05, "half": 0.8},
)
GEOMETRY = Geometry("M", (Site("a", 2, 16), Site("b", 2, 16)))


def plan(*choices, sites=("a", "b"), **schedule):
    schedule = Schedule(**{"dense_start": 0.0, **schedule})
    heads = choices * 2 if len(choices) == 1 else choices
    bands = {s: (heads,) * schedule.n_bands for s in sites}
    return Plan.of("p", GEOMETRY, bands, schedule=schedule, block=(32, 32))


def priced(plan, share=0.5, steps=10):
    return price(plan, {"full": TABLE}, layout=LAYOUT, steps=steps, share=share).expected


class TestTable:
    @pytest.mark.parametrize("name", NAMES)
    def test_measured_keeps_are_exact(self, name):
        rest, order = name.split("/")
        for keep, value in zip(KEEPS, TABLE.sparse[name], strict=True):
            assert TABLE.price(keep, rest, order == "ordered") == pytest.approx(value, rel=1e-12)

    @given(st.floats(1e-6, 1.0), st.floats(1e-6, 1.0))
    def test_prices_between_are_between(self, one, other):
        low, high = sorted((one, other))
        prices = [TABLE.price(keep, "drop", False) for keep in (low, high)]
        assert prices[0] <= prices[1] + 1e-12
        assert TABLE.sparse["drop/natural"][0] <= prices[0]
        assert prices[1] <= TABLE.sparse["drop/natural"][-1] + 1e-12

    def test_between_two_keeps_it_is_linear(self):
        assert TABLE.price(0.15, "drop", False) == pytest.approx(0.2)

    def test_below_the_least_keep_it_is_flat(self):
        assert TABLE.price(0.001, "mean", True) == TABLE.sparse["mean/ordered"][0]

    def test_a_table_survives_its_file(self, tmp_path):
        TABLE.save(tmp_path / "table.json")
        assert CostTable.load(tmp_path / "table.json") == TABLE


class TestPrice:
    def test_a_dense_plan_gains_nothing(self):
        expected = priced(plan(DENSE))
        assert expected["speedup"] == 1.0
        assert expected["attention_ratio"] == {"a": [1.0], "b": [1.0]}

    def test_amdahl_by_hand(self):
        # keep 0.35 at 0.05 + 0.35, in 8 of 10 steps, in one of two sites
        pattern = Choice(BlockMassTopK(keep=0.35))
        expected = priced(plan(pattern, sites=("a",), dense_start=0.2), share=0.6)
        # one look of price 2 on 8 steps
        ratio = 0.40 + 2.0 / 8
        assert expected["attention_ratio"]["a"] == pytest.approx([ratio])
        mean = 0.2 * 1.0 + 0.8 * (ratio + 1.0) / 2
        assert expected["speedup"] == pytest.approx(1 / (1 - 0.6 * (1 - mean)))

    def test_heads_add_up(self):
        near = Choice(Window(t=0), order="hwt", rest="mean")
        keep = keep_of(near, LAYOUT, (32, 32))
        # beside a sparse head the dense one runs in the kernel too
        ratio = (TABLE.price(1.0, "drop", False) + TABLE.price(keep, "mean", True)) / 2
        assert priced(plan(DENSE, near))["attention_ratio"]["b"] == pytest.approx([ratio])

    @pytest.mark.parametrize("full", [0.6, 0.97])
    def test_dense_calls_go_where_they_are_fastest(self, full):
        prices = (*TABLE.sparse["drop/natural"][:-1], full)
        table = replace(TABLE, sparse={**TABLE.sparse, "drop/natural": prices})
        half = plan(Choice(Skip()), sites=("a",), dense_start=0.5)
        tables = {"full": table}
        made = price(fastest_dense(half, tables), tables, layout=LAYOUT, steps=10, share=0.5)
        dense = full if full < 0.95 else 1.0
        assert made.dense == ("kernel" if full < 0.95 else "host")
        assert made.dense_ratio("a") == dense == dense_price(table)
        # site b always, site a for the first five steps
        assert made.expected["speedup"] == pytest.approx(1 / (1 - 0.5 * (1 - 0.75 * dense)))

    def test_every_site_has_the_prices_of_its_precision(self):
        cheap = {name: tuple(p / 2 for p in prices) for name, prices in TABLE.sparse.items()}
        tables = {"full": TABLE, "half": replace(TABLE, sparse=cheap)}
        mixed = replace(plan(Choice(Pooled(keep=0.35))), precision={"b": "half"}, dense="kernel")
        expected = price(mixed, tables, layout=LAYOUT, steps=10, share=0.5).expected
        assert expected["attention_ratio"] == {"a": [pytest.approx(0.4)], "b": [pytest.approx(0.2)]}
        assert expected["dense_ratio"] == {"full": 1.05, "half": 0.525}
        assert dense_speedup(expected, "half") == pytest.approx(1 / (1 - 0.5 * 0.475))
        assert dense_speedup(expected, "int8") is None

    def test_sites_without_a_precision_are_priced_in_full(self):
        cheap = {name: tuple(p / 2 for p in prices) for name, prices in TABLE.sparse.items()}
        tables = {"full": TABLE, "half": replace(TABLE, sparse=cheap)}
        some = plan(Choice(Pooled(keep=0.35)), sites=("a",), dense_start=0.5)
        # a in half, b, which runs dense, in full: that is no faster by the kernel here
        mixed = replace(some, precision={"a": "half"})
        assert mixed.precisions == ("half", "full")
        assert fastest_dense(mixed, tables).dense == "host"
        kernel = replace(mixed, dense="kernel")
        expected = price(kernel, tables, layout=LAYOUT, steps=10, share=0.5).expected
        a, b = (0.525 + 0.2) / 2, 1.05
        assert expected["speedup"] == pytest.approx(1 / (1 - 0.5 * (1 - (a + b) / 2)))
        everywhere = replace(kernel, precision={"a": "half", "b": "half"})
        assert everywhere.precisions == ("half",)
        price(everywhere, {"half": tables["half"]}, layout=LAYOUT, steps=10, share=0.5)

    def test_skipped_heads_are_free(self):
        assert priced(plan(Choice(Skip())))["attention_ratio"]["a"] == [0.0]
        assert priced(plan(Choice(Skip(), rest="mean")))["attention_ratio"]["a"] == pytest.approx(
            [0.2]
        )

    def test_every_refresh_is_paid(self):
        choice = Choice(BlockMassTopK(keep=0.35))
        once, thrice = (
            priced(plan(choice, refresh=points))["attention_ratio"]["a"][0]
            for points in ((), (0.3, 0.6))
        )
        assert thrice - once == pytest.approx(2 * 2.0 / 10)

    def test_a_site_dearer_than_dense_counts_as_dense(self):
        # two steps: a look costs as much as a dense call in each
        expected = priced(plan(Choice(BlockMassTopK(keep=0.35))), steps=2)
        assert expected["attention_ratio"]["a"][0] > 1
        assert expected["speedup"] == 1.0

    def test_a_band_that_no_step_falls_in_costs_its_attention_alone(self):
        ratios = priced(plan(Choice(BlockMassTopK(keep=0.35)), bands=(0.99,)))["attention_ratio"]
        assert ratios["a"][1] == pytest.approx(0.4)

    def test_what_only_the_call_can_tell_is_not_priced(self):
        unknown = plan(Choice(Antidiagonal(tau=0.9)))
        assert price(unknown, {"full": TABLE}, layout=LAYOUT, steps=10, share=0.5) is unknown

    def test_what_was_expected_before_stays(self):
        before = plan(DENSE)
        expected = {"psnr_db": 40.0}
        before = Plan(**{**{f: getattr(before, f) for f in before.__slots__}, "expected": expected})
        assert priced(before)["psnr_db"] == 40.0

    @pytest.mark.parametrize(
        ("choice", "keep"),
        [(DENSE, 1.0), (Choice(Skip()), 0.0), (Choice(Pooled(keep=0.3)), 0.3)],
        ids=["full", "skip", "share"],
    )
    def test_what_a_choice_keeps(self, choice, keep):
        assert keep_of(choice, LAYOUT, (32, 32)) == keep
        assert Choice(Full()) == DENSE


class TestMeasure:
    def test_every_price_is_measured(self):
        seen = []

        def progress(jobs):
            for job in jobs:
                seen.append(job[0])
                yield job

        estimators = (BlockMassTopK(keep=0.3), Pooled(keep=0.3))
        table = measure(SHAPE, estimators=estimators, layout=LAYOUT, rounds=1, progress=progress)
        assert set(table.sparse) == set(NAMES)
        assert all(len(prices) == len(KEEPS) for prices in table.sparse.values())
        assert set(table.select) == {"block_mass", "pooled"}
        assert table.dense_ms > 0
        assert set(table.dense) == {"full", "half"}
        assert len(seen) == len(NAMES) * len(KEEPS) + 2 + 2

    def test_estimators_need_a_layout(self):
        with pytest.raises(ValueError, match=re.escape("estimators are timed on a layout")):
            measure(SHAPE, estimators=(Pooled(keep=0.3),), rounds=1)

    @pytest.mark.gpu
    def test_on_a_gpu(self):
        shape = Shape(256, 2, 64, "bfloat16", "cuda", (64, 64))
        assert measure(shape, rounds=1).dense_ms > 0
