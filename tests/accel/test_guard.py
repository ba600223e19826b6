"""What turns sparse calls off: a measured slow-down, and recall under the plan's floor."""

import logging
import re
from dataclasses import replace

import pytest
import torch
from sessions import GEOMETRY, LAYOUT, ONLINE, STATIC, A, B, attend, qkv, run, session

from accel.choice import DENSE, Choice
from accel.context import Where
from accel.errors import PlanError
from accel.estimators import BlockMassTopK
from accel.guard import is_slower
from accel.layout import Layout
from accel.masks import sampled_recall
from accel.pattern import Identity, Share, Skip, Window
from accel.plan import Plan
from accel.records import Record
from accel.router import Session
from accel.run_summary import summarise

MS = 0.001


@pytest.mark.parametrize(
    ("dense", "sparse", "more", "slower"),
    [
        pytest.param([10, 10, 10], [12, 12, 12], 0, True, id="slower"),
        pytest.param([10, 10, 10], [10.9, 10.9, 10.9], 0, False, id="within the margin"),
        pytest.param([10, 10, 10], [8, 8, 8], 4, True, id="slower with its masks"),
        pytest.param([10, 10, 10], [8, 8, 8], 2, False, id="not slower with its masks"),
        pytest.param([10, 10, 10], [900, 5, 5], 0, False, id="a first call that compiles"),
        pytest.param([900, 10, 10], [12, 12, 12], 0, True, id="a first dense call that warms up"),
        pytest.param([10, 10, 10], [40, 40, 9, 40], 0, False, id="a burst of other work"),
        pytest.param([10, 30, 30], [20, 20, 20], 0, False, id="a burst in the dense calls"),
        pytest.param([10, 10], [30, 30, 30], 0, False, id="few dense calls"),
        pytest.param([10, 10, 10], [30, 30], 0, False, id="few sparse calls"),
        pytest.param([0.1] * 3, [0.3] * 3, 0, False, id="not worth it"),
    ],
)
def test_slower_than_dense(dense, sparse, more, slower):
    dense, sparse = ([s * MS for s in times] for times in (dense, sparse))
    assert is_slower(dense, sparse, more * MS) == slower


class TestTurningOff:
    """Ten steps, three of them dense; the times are put into the records by hand."""

    def guarded(self, choice=STATIC, *, guard=True, strict=False, **schedule):
        plan = session(choice, **{"dense_start": 0.3, **schedule}).plan
        return Session(plan, GEOMETRY, strict=strict, guard=guard)

    def timed(self, one, sparse_ms, masks_ms=(), recalls_ms=(), dense_ms=(10, 10, 10)):
        """After six steps, as if the calls at site a had taken so long."""
        run(one, range(6))
        one.records["a", "dense"].seconds[:] = [s * MS for s in dense_ms]
        record = one.records["a", "band 0"]
        record.seconds[:] = [s * MS for s in sparse_ms]
        record.mask_seconds[:] = [s * MS for s in masks_ms]
        record.check_seconds[:] = []  # what a look at the drift took on this machine
        one.records["b", "band 0"].mask_seconds[:] = [s * MS for s in masks_ms]
        for site in "ab":
            one.records[site, "band 0"].recall_seconds[:] = [s * MS for s in recalls_ms]
        return one

    def is_off(self, one, step=6):
        one.begin(LAYOUT, Where(step, 10))
        out, dense = attend(one, A)
        assert (out is dense) == ("a" in one.run.off)
        assert attend(one, B)[0] is not attend(one, B)[1], "the other site goes on"
        return out is dense

    @pytest.mark.parametrize("total", [4, 8, 9])
    def test_sites_of_a_short_run_are_judged_together(self, total):
        one = self.guarded(dense_start=0.25)
        first = total - one.plan.schedule.sparse_steps(total)
        run(one, range(first + 1), total)
        one.run.dense_alike[one._kind(A, *qkv()[:2])] = Record(seconds=[10 * MS] * 3)
        for site in "ab":
            one.records[site, "dense"].calls = 0
            one.records[site, "band 0"].seconds[:] = [20 * MS, 22 * MS]
        one.begin(LAYOUT, Where(first + 1, total))
        for site in (A, B):
            out, dense = attend(one, site)
            assert (out is dense) == (total <= 8)
        assert set(one.run.off) == ({"a", "b"} if total <= 8 else set())

    @pytest.mark.parametrize("strict", [False, True], ids=["lenient", "strict"])
    def test_a_slow_site_is_off_and_says_so_once(self, caplog, strict):
        one = self.timed(self.guarded(strict=strict), [12, 13, 14])
        with caplog.at_level(logging.WARNING, logger="accel"):
            assert all(self.is_off(one, step) for step in (6, 7, 8))
        assert len(caplog.records) == 1
        assert "13.00 ms with masks against 10.00 ms, medians of 3 and 3 calls" in caplog.text
        reason = (
            "sparse attention is slower than dense attention at a here, so it is off for the rest"
            " of the run"
        )
        assert one.notices == {reason: 3}
        assert f"ran dense 3 times: {reason}" in str(summarise([one]))

    def test_the_next_run_starts_anew(self):
        one = self.timed(self.guarded(), [12, 13, 14])
        assert self.is_off(one)
        run(one, range(6))
        assert not one.notices
        one.records["a", "dense"].seconds[:] = [10 * MS] * 3
        one.records["a", "band 0"].seconds[:] = [5 * MS] * 3
        assert not self.is_off(one)

    def test_a_fast_site_and_a_session_without_a_guard_go_on(self):
        assert not self.is_off(self.timed(self.guarded(), [5, 5, 5]))
        assert not self.is_off(self.timed(self.guarded(guard=False), [50, 50, 50]))

    def alike(self, one, sparse_ms, dense_ms=(10, 10, 10)):
        """A run without dense steps, as if its calls and those made for times took so long."""
        run(one, range(6))
        (found,) = one.run.dense_alike.values()
        found.seconds[:] = [s * MS for s in dense_ms]
        record = one.records["a", "band 0"]
        record.seconds[:], record.recall_seconds[:] = [s * MS for s in sparse_ms], []
        return one

    def test_without_dense_steps_calls_of_the_same_kind_are_judged_by(self, caplog):
        with caplog.at_level(logging.WARNING, logger="accel"):
            one = self.alike(self.guarded(dense_start=0.0), [12, 13, 14])
            assert set(one.records) == {("a", "band 0"), ("b", "band 0")}, "no calls of the run"
            assert self.is_off(one)
        assert "13.00 ms with masks against 10.00 ms, medians of 3 and 3 calls" in caplog.text
        assert not self.is_off(self.alike(self.guarded(dense_start=0.0), [5, 5, 5]))

    def test_a_late_or_short_dense_part_is_none_to_judge_by(self):
        for schedule in ({"dense_start": 0.0, "dense_end": 0.3}, {"dense_start": 0.2}):
            assert self.is_off(self.alike(self.guarded(**schedule), [12, 13, 14]))

    def test_three_dense_calls_are_made_for_every_kind_of_site(self):
        def counted(one, tensors, steps=range(6)):
            calls = []
            for step in steps:
                one.begin(LAYOUT, Where(step, 10))
                for site in (A, B):
                    q, k, v = tensors[site]
                    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
                    one.attend(
                        site, q, k, v, lambda d=dense, s=site: calls.append(s.name) or d, None
                    )
            return sorted(calls)

        same = {A: qkv(), B: qkv(seed=1)}
        other = {A: qkv(), B: tuple(x[..., :4] for x in qkv())}
        never = self.guarded(dense_start=0.0, guard=False)
        assert counted(self.guarded(dense_start=0.0), same) == ["a", "a", "b"]
        assert counted(self.guarded(dense_start=0.0), other) == ["a"] * 3 + ["b"] * 3
        assert counted(never, same) == []
        assert counted(self.guarded(), same) == ["a"] * 3 + ["b"] * 3, "the dense steps alone"

    def test_accels_own_dense_kernel_is_timed_where_the_plan_has_it(self):
        one = self.guarded(dense_start=0.0)
        own = Session(replace(one.plan, dense="kernel"), GEOMETRY, guard=True)
        own.begin(LAYOUT, Where(0, 10))
        q, k, v = qkv()

        def host():
            raise AssertionError("the host's attention is not what dense calls would take")

        own.attend(A, q, k, v, host, None)
        (kind,) = own.run.dense_alike
        assert kind.precision == "full"
        assert own.records["a", "band 0"].calls == 1

    def test_masks_are_spread_over_the_calls_that_they_serve(self):
        # one mask for the seven calls of the band: 35 / 7 = 5 ms a call
        assert not self.is_off(self.timed(self.guarded(ONLINE), [5, 5, 5], [35]))
        assert self.is_off(self.timed(self.guarded(ONLINE), [7, 7, 7], [35]))
        # and three of them with two refresh points
        often = {"refresh": (0.5, 0.9)}
        assert self.is_off(self.timed(self.guarded(ONLINE, **often), [5, 5, 5], [35]))

    def test_looks_at_recall_are_spread_like_masks_and_are_those_of_patterns_too(self):
        for choice in (STATIC, ONLINE):
            assert not self.is_off(self.timed(self.guarded(choice), [5, 5, 5], recalls_ms=[35]))
            assert self.is_off(self.timed(self.guarded(choice), [7, 7, 7], recalls_ms=[35]))
        both = self.timed(self.guarded(ONLINE), [7, 7, 7], [21], [14])
        assert self.is_off(both), "7 + 3 + 2 ms against 10"

    def test_masks_that_drift_made_count(self):
        drift = {"drift": 0.1}
        assert not self.is_off(self.timed(self.guarded(ONLINE, **drift), [5, 5, 5], [35]))
        assert self.is_off(self.timed(self.guarded(ONLINE, **drift), [5, 5, 5], [35] * 3))

    def test_masks_of_patterns_are_nobodys_price(self):
        assert not self.is_off(self.timed(self.guarded(), [5, 5, 5], [900]))

    def test_a_first_mask_that_compiles_does_not_decide(self):
        one = self.timed(self.guarded(ONLINE), [5, 5, 5], [900])
        one.records["b", "band 0"].mask_seconds[:] = [3 * MS]
        assert not self.is_off(one)

    def test_nothing_waits_for_a_device(self):
        class Event:
            def __init__(self, passed):
                self.passed = passed

            def query(self):
                return self.passed

            def synchronize(self):
                raise AssertionError("waited")

            def elapsed_time(self, end):
                return 30.0

        one = self.timed(self.guarded(), [])
        record = one.records["a", "band 0"]
        for passed in (True, True, False):
            record._events.append((record.seconds, Event(passed), Event(passed)))
        assert not self.is_off(one)
        assert len(record._events) == 1, "two have passed, which are too few"
        one.records["a", "band 0"]._events.append((record.seconds, Event(True), Event(True)))
        record.seconds[2:] = []
        assert self.is_off(one, 7)
        record._events.clear()


class TestRecallFloor:
    FEW, ALL = Choice(BlockMassTopK(keep=0.2)), Choice(Window())

    def floored(self, *choices, floor=0.9, strict=False, **schedule):
        plan = replace(session(*choices, **schedule).plan, recall_floor=floor)
        return Session(plan, GEOMETRY, strict=strict)

    def test_a_head_under_it_is_dense_and_the_others_are_not(self):
        plain = session(STATIC, self.FEW)
        plain.begin(LAYOUT, Where(0, 4))
        sparse = attend(plain)[0]
        recall = plain.records["a", "band 0"].recall[0]
        # between the recalls of the two heads
        one = self.floored(STATIC, self.FEW, floor=recall.mean().item(), strict=True)
        for step in range(2):
            one.begin(LAYOUT, Where(step, 4))
            out, dense = attend(one)
            weak = int(recall.argmin())
            torch.testing.assert_close(out[:, weak], dense[:, weak])
            assert torch.equal(out[:, 1 - weak], sparse[:, 1 - weak])
        why = f"recall is under the floor of {one.plan.recall_floor} at a, heads {weak}"
        assert one.notices == {why: 1}
        assert f"ran dense 1 times: {why}" in str(summarise([one]))
        kept = plain.run.masks.popitem()[1].mask.keep_per_head()
        expected = (1 + kept[1 - weak].item()) / 2
        assert one.records["a", "band 0"].keep / 2 == pytest.approx(expected)

    def test_as_long_as_the_mask_lives(self):
        one = self.floored(self.FEW, self.ALL, refresh=(0.5,))
        q, k, v = qkv()
        alike = q * 0.01, k, v
        k = torch.nn.functional.normalize(k, dim=-1)
        alone = 100 * k, k, v  # every token sees itself
        keeps, before = [], 0.0
        for step, tensors in enumerate((alike, alone, alone, alike)):
            one.begin(LAYOUT, Where(step, 4))
            attend(one, tensors=tensors)
            record = one.records["a", "band 0"]
            keeps.append(record.keep - before)
            before = record.keep
        # 2 of 6 blocks: a third, beside a head that keeps them all
        assert keeps == pytest.approx([1, 1, 2 / 3, 2 / 3])
        assert one.notices == {"recall is under the floor of 0.9 at a, heads 0": 1}

    def test_all_heads_under_it_are_a_dense_call(self):
        one = self.floored(self.FEW, floor=1.0)
        one.begin(LAYOUT, Where(0, 4))
        out, dense = attend(one)
        assert out is dense
        assert one.records["a", "band 0"].kernels == {"dense"}
        assert one.notices == {"recall is under the floor of 1.0 at a, heads 0, 1": 1}

    def test_heads_without_blocks_do_not_count(self):
        one = self.floored(Choice(Skip()), self.ALL)
        run(one, range(2))
        one = self.floored(Choice(Identity()), Choice(Share()))
        run(one, range(2))
        assert not one.notices

    def test_dense_heads_do_not_see_padding(self):
        one = self.floored(self.FEW, self.ALL)
        outs = []
        for filling in (0.0, 9.0):
            tensors = tuple(torch.nn.functional.pad(x, (0, 0, 0, 28), value=filling) for x in qkv())
            one.begin(Layout.of((3, 4, 7), padding=28), Where(0, 1))
            outs.append(attend(one, tensors=tensors)[0][:, :, :84])
            assert one.notices
            counts = list(one.run.masks.values())[-1].mask.counts
            assert torch.equal(counts[:, 0], counts[:, 1]), "nor are they given any"
        torch.testing.assert_close(outs[0], outs[1])
        dense = torch.nn.functional.scaled_dot_product_attention(*qkv())
        torch.testing.assert_close(outs[0], dense, atol=1e-5, rtol=1e-5)

    def test_without_a_floor_nothing_is_read(self, monkeypatch):
        monkeypatch.setattr("accel.judged_masks.weak_heads", None)
        run(session(self.FEW), range(2))

    @pytest.mark.parametrize("floor", [0, -0.1, 1.5, True, "0.9", float("nan")])
    def test_a_floor_is_a_fraction(self, floor):
        with pytest.raises(PlanError, match=re.escape("recall_floor must be in (0, 1], got ")):
            Plan.from_dict({**session(STATIC).plan.to_dict(), "recall_floor": floor})

    def test_the_recall_is_that_of_the_mask(self):
        one = self.floored(self.FEW, DENSE, floor=0.99)
        one.begin(LAYOUT, Where(0, 1))
        attend(one)
        found = one.run.masks[next(iter(one.run.masks))]
        assert torch.equal(one.records["a", "band 0"].recall[0], sampled_recall(*qkv()[:2], found))
