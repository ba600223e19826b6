import math
from dataclasses import replace

import pytest
from cost_cases import BLOCK, GEOMETRY, KEEPS, LAYOUT, TABLE, baseline, plan

from accel.choice import DENSE, Alternatives, Choice
from accel.cost import (
    Price,
    cost_sentence,
    dense_price,
    dense_speedup,
    fastest_dense,
    keep_of,
    looks_price,
    predict,
    price,
    select_price,
)
from accel.cost_calibration import Calibration
from accel.errors import AccelError
from accel.estimators import Antidiagonal, BlockMassTopK, Pooled
from accel.layout import Layout
from accel.pattern import Band, Full, Identity, Share, Skip, Stripe, Window
from accel.pattern_union import Union
from accel.plan import Plan
from accel.schedule import Schedule

# 3 of the 8 blocks of a row
MASS = Choice(BlockMassTopK(keep=0.375))
POOLED = Choice(Pooled(keep=0.375))
# what 0.375 costs, and the rest of the seconds of a generation: outside, steps, attention
PRICE = 0.05 + 0.375
TABLES = {"full": TABLE}
P = Price.known
FREE = {"block_mass": P(0.0), "pooled": P(0.0)}
CHEAP = {name: tuple(P(p.value / 2) for p in row) for name, row in TABLE.sparse.items()}


def with_row(name, prices):
    return replace(TABLE, sparse={**TABLE.sparse, name: tuple(map(P, prices))})


def priced(plan, share=0.5, tables=None, **more):
    steps, keeps = more.pop("steps", None), more.pop("keeps", None)
    base = baseline(share, **more)
    return price(plan, tables or TABLES, base, steps=steps, keeps=keeps).expected


class TestKeep:
    @pytest.mark.parametrize(
        ("choice", "keep"),
        [
            (DENSE, 1.0),
            (Choice(Skip()), 0.0),
            (Choice(Identity()), 0.0),
            (Choice(Share()), 0.0),
            # of 8 blocks 2.4 are asked for
            (Choice(Pooled(keep=0.3)), 3 / 8),
            (Choice(Pooled(keep=0.25)), 2 / 8),
        ],
        ids=["full", "skip", "identity", "share", "whole blocks", "a quarter"],
    )
    def test_what_a_choice_keeps(self, choice, keep):
        assert keep_of(choice, LAYOUT, BLOCK) == keep
        assert Choice(Full()) == DENSE

    def test_text_comes_on_top(self):
        layout = Layout.of((4, 8, 8), text_after=64)
        # 2 of 8 visual blocks and 2 of text in 8 rows, everything in 2
        expected = (8 * (2 + 2) + 2 * 10) / 100
        assert keep_of(Choice(Pooled(keep=0.25)), layout, BLOCK) == pytest.approx(expected)

    def test_what_only_the_call_can_tell(self):
        assert keep_of(Choice(Antidiagonal(tau=0.9)), LAYOUT, BLOCK) is None

    def test_alternatives_that_keep_about_the_same(self):
        one, other = Choice(Band(width=0.25)), Choice(Band(width=0.25), order="hwt")
        both = Choice(Alternatives((one, other)))
        keep = keep_of(one, LAYOUT, BLOCK)
        assert keep_of(both, LAYOUT, BLOCK) == pytest.approx(keep)
        wide = Choice(Alternatives((one, Choice(Band(width=1.0)))))
        assert keep_of(wide, LAYOUT, BLOCK) is None


class TestSeconds:
    def test_a_dense_plan_takes_what_dense_takes(self):
        expected = priced(plan(DENSE))
        assert expected["seconds"] == expected["dense_seconds"] == pytest.approx(40.0)
        assert expected["speedup"] == 1.0
        assert expected["attention_ratio"] == {"a": [1.0], "b": [1.0]}

    def test_by_hand(self):
        # in 8 of 10 steps, in one of two sites, with a quarter of the attention
        made = plan(MASS, sites=("a",), dense_start=0.2)
        expected = priced(made, share=0.6)
        ratio = PRICE + 2.0 / 8
        assert expected["attention_ratio"] == {"a": pytest.approx([ratio])}
        a, b = 40 * 0.6 / 4, 3 * 40 * 0.6 / 4
        seconds = 5 + (35 - a - b) + b + a * (0.2 + 0.8 * ratio)
        assert expected["seconds"] == pytest.approx(seconds)
        assert expected["speedup"] == pytest.approx(40 / seconds)
        assert expected["attention_share"] == pytest.approx(0.6)
        assert predict(made, TABLES, baseline(0.6)) == pytest.approx(seconds)

    def test_more_steps_do_not_take_more_outside_of_them(self):
        expected = priced(plan(DENSE), steps=30)
        assert expected["seconds"] == pytest.approx(5 + 3 * 35)
        assert expected["attention_share"] == pytest.approx(3 * 20 / 110)
        assert expected["steps"] == 30
        # without a timed denoiser all of it is in the steps
        assert priced(plan(DENSE), steps=30, denoiser=None)["seconds"] == pytest.approx(120)

    def test_heads_add_up(self):
        near = Choice(Window(t=0), rest="mean")
        keep = keep_of(near, LAYOUT, BLOCK)
        # beside a sparse head the dense one runs in the kernel too
        ratio = (1.0 + 0.05 + keep + 0.15) / 2
        assert priced(plan(DENSE, near))["attention_ratio"]["b"] == pytest.approx([ratio])

    def test_an_order_is_paid_by_all_heads(self):
        turned = Choice(Window(t=0), order="hwt")
        keeps = [keep_of(c, LAYOUT, BLOCK) for c in (MASS, turned)]
        ratio = sum(0.1 + keep for keep in keeps) / 2
        expected = priced(plan(MASS, turned), tables={"full": replace(TABLE, select=FREE)})
        assert expected["attention_ratio"]["a"] == pytest.approx([ratio])

    def test_alternatives_are_paid_with_the_order_of_an_option(self):
        options = (Choice(Band(width=0.25)), Choice(Band(width=0.25), order="hwt", rest="mean"))
        either = Choice(Alternatives(options))
        keep = keep_of(either, LAYOUT, BLOCK)
        ratio = keep + (0.1 + 0.2) / 2
        table = replace(TABLE, select={either.select.work: P(0.0)})
        found = priced(plan(either), tables={"full": table})
        assert found["attention_ratio"]["a"] == pytest.approx([ratio])

    def test_heads_without_blocks_are_free(self):
        for select in (Skip(), Identity()):
            assert priced(plan(Choice(select)))["attention_ratio"]["a"] == [0.0]
        means = priced(plan(Choice(Skip(), rest="mean")))["attention_ratio"]["a"]
        assert means == pytest.approx([0.15 + KEEPS[0]])

    @pytest.mark.parametrize(("branches", "part"), [(1, 1.0), (2, 0.5), (3, 1 / 3)])
    def test_the_first_branch_has_none_to_share_with(self, branches, part):
        shared = plan(Choice(Share(of="branch")), MASS, dense_start=0.2)
        table = replace(TABLE, select=FREE)
        found = priced(shared, tables={"full": table}, branches=branches)["attention_ratio"]["b"]
        assert found == pytest.approx([(part * 1.05 + PRICE) / 2])

    def test_the_first_step_has_none_to_share_with(self):
        for start, part in ((0.0, 0.1), (0.2, 0.0)):
            shared = plan(Choice(Share(of="step")), dense_start=start)
            assert priced(shared)["attention_ratio"]["b"] == pytest.approx([part * 1.05])

    def test_a_site_dearer_than_dense_counts_as_dense(self):
        # two steps: a look costs as much as a dense call in each
        expected = priced(plan(MASS), steps=2)
        assert expected["attention_ratio"]["a"][0] > 1
        assert expected["speedup"] == 1.0

    def test_a_band_that_no_step_falls_in_costs_its_attention_alone(self):
        ratios = priced(plan(MASS, bands=(0.99,)))["attention_ratio"]
        assert ratios["a"][1] == pytest.approx(PRICE)

    def test_what_only_the_call_can_tell_is_not_priced(self):
        choice = Choice(Antidiagonal(tau=0.9))
        unknown = plan(choice)
        assert price(unknown, TABLES, baseline()) is unknown
        assert predict(unknown, TABLES, baseline()) is None
        # unless it was seen
        table = replace(TABLE, select={choice.select.work: P(0.0)})
        seen = {"tables": {"full": table}, "keeps": {choice: 0.375}}
        assert priced(unknown, **seen)["attention_ratio"]["a"] == pytest.approx([PRICE])

    def test_a_selection_that_was_not_measured_is_not_free(self):
        tables = {"full": replace(TABLE, select={"pooled": P(0.5)}, again={})}
        assert select_price(MASS, tables["full"]) is None
        assert looks_price(MASS, tables["full"], 2) is None
        assert looks_price(MASS, tables["full"], 0) == 0
        for unknown in (plan(MASS), plan(POOLED, MASS)):
            assert predict(unknown, tables, baseline()) is None
            assert price(unknown, tables, baseline()) is unknown
        assert predict(plan(POOLED), tables, baseline()) > 0

    def test_known_keeps_go_before_computed_ones(self):
        table = replace(TABLE, select=FREE)
        found = priced(plan(POOLED), tables={"full": table}, keeps={POOLED: 0.5})
        assert found["attention_ratio"]["a"] == pytest.approx([0.55])

    def test_a_generation_of_another_model(self):
        other = replace(baseline(), share={"a": 0.2, "c": 0.3})
        with pytest.raises(AccelError, match="no site 'b'"):
            predict(plan(MASS), TABLES, other)

    def test_what_was_expected_before_stays(self):
        before = replace(plan(DENSE), expected={"psnr_db": 40.0})
        assert priced(before)["psnr_db"] == 40.0


class TestMasks:
    def looks(self, plan, table=TABLE):
        """What masks add to the ratio of site a, times the steps of its first band."""
        found = priced(plan, tables={"full": table})["attention_ratio"]["a"][0]
        return (found - PRICE) * len(plan.schedule.steps_of(0, 10))

    def test_every_refresh_is_paid_and_later_ones_know_the_normalisers(self):
        assert self.looks(plan(MASS)) == pytest.approx(2.0)
        assert self.looks(plan(MASS, refresh=(0.3, 0.6))) == pytest.approx(2.0 + 2 * 1.25)
        # an estimator that does not find them
        assert self.looks(plan(POOLED, refresh=(0.3, 0.6))) == pytest.approx(3 * 0.5)

    def test_a_refresh_in_the_dense_start_is_not_paid(self):
        assert self.looks(plan(POOLED, refresh=(0.1,), dense_start=0.2)) == pytest.approx(0.5)

    def test_a_band_with_the_same_choices_keeps_the_mask(self):
        made = plan(POOLED, bands=(0.5,))
        found = priced(made)["attention_ratio"]["a"]
        assert found == pytest.approx([PRICE + 0.5 / 5, PRICE])

    def test_heads_of_one_choice_are_selected_together(self):
        table = replace(TABLE, mask=P(0.25))
        made = plan(MASS, POOLED)
        assert self.looks(made, table) == pytest.approx(2.0 / 2 + 0.5 / 2 + 0.25)

    def test_the_look_at_recall_is_paid_at_every_refresh_and_in_every_band(self):
        table = replace(TABLE, select=FREE, again={}, recall=P(0.5))
        assert self.looks(plan(MASS, refresh=(0.5,)), table) == pytest.approx(2 * 0.5)
        window = Choice(Window(t=0))
        keep = keep_of(window, LAYOUT, BLOCK)
        found = priced(plan(window, bands=(0.5,)), tables={"full": table})["attention_ratio"]["a"]
        assert found == pytest.approx([0.05 + keep + 0.5 / 5] * 2)

    def test_static_masks_are_made_once_in_a_run_for_all_sites(self):
        window = Choice(Window(t=0))
        union = Choice(Union((Window(t=0), Stripe())))
        table = replace(TABLE, mask=P(0.5), term=P(0.25))
        for made, cost in (
            (plan(window), 0.5 + 0.25),
            (plan(union), 0.5 + 2 * 0.25),
            (plan(window, union), 0.5 + 3 * 0.25),
        ):
            without = predict(made, TABLES, baseline())
            # a call of site a, of which there are two in a step
            call = 40 * 0.5 / 4 / 10 / 2
            found = predict(made, {"full": table}, baseline())
            assert found - without == pytest.approx(cost * call)

    def test_prices_of_looks(self):
        table = replace(TABLE, mask=P(0.25), recall=P(0.5))
        assert looks_price(MASS, table, 0) == 0
        assert looks_price(MASS, table, 1) == pytest.approx(2.75)
        assert looks_price(MASS, table, 3) == pytest.approx(2.75 + 2 * (1.25 + 0.75))
        assert looks_price(POOLED, table, 3) == pytest.approx(3 * 1.25)
        assert looks_price(Choice(Window(t=0)), table, 3) == pytest.approx(1.5)
        assert select_price(MASS, table) == 2.0
        assert select_price(Choice(Window(t=0)), table) == 0.0


class TestDense:
    @pytest.mark.parametrize("full", [0.6, 0.97])
    def test_dense_calls_go_where_they_are_fastest(self, full):
        row = [min(p.value, full) for p in TABLE.sparse["drop/natural"][:-1]]
        table = with_row("drop/natural", (*row, full))
        half = plan(Choice(Skip()), sites=("a",), dense_start=0.5)
        tables = {"full": table}
        made = price(fastest_dense(half, tables), tables, baseline())
        dense = full if full < 0.95 else 1.0
        assert made.dense == ("kernel" if full < 0.95 else "host")
        assert made.dense_ratio("a") == dense == dense_price(table)
        # site b always, site a for the first five steps
        ratio = (0.5 * 1 + 3) / 4 * dense
        assert made.expected["speedup"] == pytest.approx(1 / (1 - 0.5 * (1 - ratio)))

    def test_every_site_has_the_prices_of_its_precision(self):
        plain = replace(TABLE, select=FREE)
        tables = {"full": plain, "half": replace(plain, sparse=CHEAP)}
        mixed = replace(plan(POOLED), precision={"b": "half"}, dense="kernel")
        expected = priced(mixed, tables=tables)
        ratios = expected["attention_ratio"]
        assert ratios == {"a": [pytest.approx(PRICE)], "b": [pytest.approx(PRICE / 2)]}
        assert expected["dense_ratio"] == {"full": 1.05, "half": 0.525}

    def test_sites_without_a_precision_are_priced_in_full(self):
        plain = replace(TABLE, select=FREE)
        tables = {"full": plain, "half": replace(plain, sparse=CHEAP)}
        some = plan(POOLED, sites=("a",), dense_start=0.5)
        # a in half, b, which runs dense, in full: that is no faster by the kernel here
        mixed = replace(some, precision={"a": "half"})
        assert mixed.precisions == ("half", "full")
        assert fastest_dense(mixed, tables).dense == "host"
        kernel = replace(mixed, dense="kernel")
        expected = priced(kernel, tables=tables)
        a, b = (0.525 + PRICE / 2) / 2, 1.05
        assert expected["speedup"] == pytest.approx(1 / (1 - 0.5 * (1 - (a + 3 * b) / 4)))
        everywhere = replace(kernel, precision={"a": "half", "b": "half"})
        assert everywhere.precisions == ("half",)
        priced(everywhere, tables={"half": tables["half"]})

    def test_dense_recipes_are_priced_in_their_own_block(self):
        expected = priced(plan(POOLED))
        # the table's `dense` is of blocks of 128 x 64, its rows of those of the plan
        assert expected["dense_ratio"] == {"full": 1.05, "half": 0.8}
        table = replace(TABLE, dense={"full": P(0.7), "half": P(0.8)})
        expected = priced(plan(POOLED), tables={"full": table}, share=0.6)
        assert expected["dense_ratio"] == {"full": 1.05, "half": 0.8}
        assert dense_speedup(expected, "full") == pytest.approx(1 / (1 - 0.6 * 0.3))
        assert dense_speedup(expected, "half") == pytest.approx(1 / (1 - 0.6 * 0.2))
        assert dense_speedup(expected, "int8") is None
        del expected["dense_ratio"]
        assert dense_speedup(expected, "full") == pytest.approx(1 / (1 - 0.6 * 0.3))
        del expected["recipe_ratio"]
        assert dense_speedup(expected, "full") is None


class TestCalibration:
    LINE = Calibration(scale=1.5, offset=-6.0, runs=3, held_out=4, mape=0.042)

    def test_predictions_follow_the_line(self):
        made = plan(POOLED, sites=("a",))
        raw = predict(made, TABLES, baseline())
        expected = priced(made, calibration=self.LINE)
        assert expected["seconds"] == pytest.approx(1.5 * raw - 6)
        assert expected["dense_seconds"] == pytest.approx(54.0)
        assert expected["speedup"] == pytest.approx(54 / (1.5 * raw - 6))

    def test_speedups_of_dense_recipes_do_too(self):
        """The share is that of the measured seconds, so that both predictions are the same one."""
        expected = priced(plan(DENSE), share=0.5, calibration=self.LINE)
        own = replace(plan(DENSE), dense="kernel", schedule=Schedule(dense_start=1.0))
        seconds = priced(own, share=0.5, calibration=self.LINE)["seconds"]
        assert dense_speedup(expected, "full") == pytest.approx(54 / seconds)

    def test_a_share_is_never_more_than_all(self):
        line = replace(self.LINE, offset=-30.0)
        assert priced(plan(DENSE), share=0.8, calibration=line)["attention_share"] == 1.0

    def test_what_predictions_are_worth_is_said(self):
        origin = replace(TABLE.origin, device="a fast chip")
        tables = {"full": replace(TABLE, origin=origin)}
        assert cost_sentence(priced(plan(DENSE), tables=tables)) == "measured on a fast chip"
        said = cost_sentence(priced(plan(DENSE), tables=tables, calibration=self.LINE))
        assert said.startswith("measured on a fast chip; calibrated on 3 runs; error on 4 other")
        assert cost_sentence({}) == ""

    def test_what_comes_from_a_data_sheet_is_not_calibrated(self):
        assert priced(plan(DENSE))["calibrated"] is True
        sheet = replace(TABLE, source="roofline", origin=replace(TABLE.origin, device="G"))
        expected = priced(plan(DENSE), tables={"full": sheet})
        assert expected["calibrated"] is False
        assert cost_sentence(expected) == "uncalibrated: computed from the data sheet of G"
        assert priced(plan(DENSE), source="roofline")["calibrated"] is False


@pytest.mark.parametrize(
    "bad", [{"seconds": 0}, {"dense_seconds": "1"}, {"recipe_ratio": {"full": -1.0}}]
)
def test_a_plan_does_not_hold_predictions_that_are_none(bad):
    expected = priced(plan(DENSE))
    with pytest.raises(AccelError, match=next(iter(bad))):
        replace(plan(DENSE), expected={**expected, **bad})


def test_a_priced_plan_survives_its_file(tmp_path):
    made = price(plan(MASS), TABLES, baseline(calibration=TestCalibration.LINE))
    loaded = Plan.load(made.save(tmp_path / "plan.json"))
    assert loaded.expected == made.expected
    assert math.isfinite(loaded.expected["seconds"])
    assert loaded.ratio("a", 0, 256, "cpu", "float32") == made.expected["attention_ratio"]["a"][0]
    assert GEOMETRY.site("a").heads == 2
