"""A session by itself: which calls are sparse, and with which masks."""

import logging
import re
from dataclasses import replace

import pytest
import torch
from sessions import LAYOUT, ONLINE, PRICED, STATIC, A, B, attend, qkv, run, session
from torch.nn.functional import scaled_dot_product_attention

from accel import own_dense, sparse_calls
from accel.choice import Choice
from accel.context import Where
from accel.errors import AccelError
from accel.estimators import AdaptiveBlockMass, BlockMassTopK
from accel.kernels.attention import resolve_backend, sparse_attention
from accel.layout import Layout
from accel.pattern import Full, Window
from accel.router import Session


class TestMasks:
    def test_static_masks_are_shared_by_sites_branches_and_steps(self, looks):
        run(session(STATIC), range(10), branches=("cond", "uncond"))
        assert len(looks) == 1

    def test_online_masks_belong_to_a_site_and_a_branch(self, looks):
        run(session(ONLINE), range(10), branches=("cond", "uncond"))
        assert len(looks) == 4

    def test_online_masks_are_made_anew_at_refresh_points_alone(self, looks):
        one = session(ONLINE, dense_start=0.2, refresh=(0.1, 0.5, 0.8))
        counts = []
        for step in range(10):
            run(one, [step])
            counts.append(len(looks) // 2)
        assert counts == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3]
        assert len(one.run.masks) == 2, "masks of earlier generations are let go"

    @pytest.mark.parametrize(
        ("precision", "dtype"), [("full", torch.float32), ("half", torch.bfloat16)]
    )
    def test_estimators_see_what_the_precision_allows(self, precision, dtype, monkeypatch):
        seen, select = [], BlockMassTopK.select_in

        def spy(self, call):
            seen.append((call.q.dtype, call.k.dtype))
            return select(self, call)

        monkeypatch.setattr(BlockMassTopK, "select_in", spy)
        one = session(ONLINE)
        run(Session(replace(one.plan, precision=precision), one.geometry), [9])
        assert set(seen) == {(dtype, dtype)}

    def test_a_static_head_beside_an_online_one(self, looks):
        one = session(STATIC, ONLINE, refresh=(0.5,))
        run(one, range(10))
        assert len(looks) == 4

    def test_bands_with_the_same_choices_share_their_masks(self, looks):
        run(session(ONLINE, bands=(0.5,)), range(10))
        assert len(looks) == 2

    def test_a_refresh_reuses_the_rows_that_it_found(self, monkeypatch):
        given = []
        find = AdaptiveBlockMass.select_in

        def spy(self, call):
            given.append(call.lse is not None)
            return find(self, call)

        monkeypatch.setattr(AdaptiveBlockMass, "select_in", spy)
        run(session(Choice(AdaptiveBlockMass(keep=0.5)), refresh=(0.5,)), range(10))
        assert given == [False, False, True, True]

    @pytest.mark.parametrize("later", [(True, False), (False, True), (False, False)])
    def test_rows_belong_to_heads_and_not_to_choices(self, later):
        """A choice that moves to other heads in the next band gets the rows of these heads."""
        few, many = (Choice(AdaptiveBlockMass(keep=keep)) for keep in (0.3, 0.6))
        first = (few, few) if any(later) else (few, many)
        then = tuple(few if same else many for same in later) if any(later) else (many, few)
        one = session(few, bands=(0.5,))
        one.plan = replace(one.plan, sites=dict.fromkeys("ab", (first, then)))
        steady = session(few, bands=(0.5,))
        steady.plan = replace(steady.plan, sites=dict.fromkeys("ab", (then, then)))
        outs, expected = (run(s, range(10))[-2:] for s in (one, steady))
        for moved, same in zip(outs, expected, strict=True):
            torch.testing.assert_close(moved, same)

    def test_rows_are_kept_for_a_later_look_alone(self):
        one = session(Choice(AdaptiveBlockMass(keep=0.5)), refresh=(0.3, 0.6, 0.9), dense_end=0.2)
        kept = []
        for step in range(10):
            run(one, [step])
            kept.append(len(one.run.lse))
        assert kept == [2] * 6 + [0] * 4, "the last refresh point lies in the dense end"
        one = session(ONLINE)
        run(one, [0])
        assert not one.run.lse

    def test_a_pattern_is_made_once_a_run(self, looks, monkeypatch):
        made = []
        make = Window.mask

        def spy(self, blocking, device=None):
            made.append(self)
            return make(self, blocking, device)

        monkeypatch.setattr(Window, "mask", spy)
        other = Choice(Window(h=1))
        one = session(STATIC, other, bands=(0.5,))
        sites = {"a": ((STATIC, other), (other, STATIC)), "b": ((other, other), (STATIC, STATIC))}
        one.plan = replace(one.plan, sites=sites)
        run(one, range(10))
        assert len(looks) == 4
        assert sorted(p.name for p in made) == sorted([STATIC.select.name, other.select.name])
        one.begin(Layout.of((7, 4, 3)), Where(0, 10))
        attend(one)
        assert len(made) == 4, "another layout is another run"

    def test_another_batch_size_gets_masks_of_its_own(self):
        one = session(ONLINE, refresh=(0.5,))
        run(one, [0], tensors=qkv(batch=2))
        alone = session(ONLINE)
        run(alone, [0], tensors=qkv(batch=1))
        expected = run(alone, [1], tensors=qkv(batch=1))
        for out, same in zip(run(one, [1], tensors=qkv(batch=1)), expected, strict=True):
            assert torch.equal(out, same)

    def test_adaptive_rows_of_another_batch_size_are_not_reused(self):
        one = session(Choice(AdaptiveBlockMass(keep=0.5)), refresh=(0.5,))
        run(one, range(6), tensors=qkv(batch=2))
        assert run(one, [6], tensors=qkv(batch=3))[0].shape[0] == 3


class TestPadding:
    """Tokens that the layout calls padding are nobody's keys."""

    PADDED = Layout.of((3, 4, 7), padding=28)  # blocks of padding alone, and one shared with tokens

    @pytest.mark.parametrize("rest", ["drop", "mean"])
    @pytest.mark.parametrize("select", [Window(), BlockMassTopK(keep=1.0), BlockMassTopK(keep=0.3)])
    def test_what_stands_there_does_not_matter(self, select, rest):
        outs, recalls = [], []
        for filling in (0.0, 9.0):
            q, k, v = (torch.nn.functional.pad(x, (0, 0, 0, 28), value=filling) for x in qkv())
            one = session(Choice(select, rest=rest))
            one.begin(self.PADDED, Where(0, 1))
            outs.append(attend(one, tensors=(q, k, v))[0][:, :, : LAYOUT.length])
            recalls.append(one.records["a", "band 0"].recall[0])
        torch.testing.assert_close(outs[0], outs[1])
        torch.testing.assert_close(recalls[0], recalls[1])

    def test_all_blocks_kept_are_dense_attention_without_it(self):
        tensors = tuple(torch.nn.functional.pad(x, (0, 0, 0, 28), value=3.0) for x in qkv())
        one = session(Choice(Window()))
        one.begin(self.PADDED, Where(0, 1))
        out = attend(one, tensors=tensors)[0][:, :, : LAYOUT.length]
        torch.testing.assert_close(out, scaled_dot_product_attention(*qkv()), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(one.records["a", "band 0"].recall[0], torch.ones(2))


class TestDenseByKernel:
    """Dense calls of a plan whose `dense` is `kernel`."""

    def kernel_session(self, precision="full", **schedule):
        one = session(STATIC, **schedule)
        plan = replace(one.plan, dense="kernel", precision=precision)
        return Session(plan, one.geometry)

    def test_they_run_in_the_kernel_with_all_blocks_and_agree(self):
        one = self.kernel_session(dense_start=0.5)
        one.begin(LAYOUT, Where(0, 10))
        out, dense = attend(one)
        assert torch.allclose(out, dense, atol=1e-5)
        assert not torch.equal(out, torch.zeros_like(out))
        record = one.records["a", "dense"]
        assert record.kernels == {resolve_backend("auto", out.device)}
        assert (record.calls, record.keep) == (1, 1.0)

    @pytest.mark.parametrize("step", [0, 9], ids=["dense", "sparse"])
    def test_the_precision_of_the_site_is_used(self, step, monkeypatch):
        seen = []

        def spy(*tensors, precision, **options):
            seen.append(precision)
            return sparse_attention(*tensors, precision=precision, **options)

        for module in (sparse_calls, own_dense):
            monkeypatch.setattr(module, "sparse_attention", spy)
        for site in ("a", "b"):
            one = self.kernel_session({site: "half"}, dense_start=0.5)
            one.begin(LAYOUT, Where(step, 10))
            attend(one)
        assert seen == ["half", "full"]

    def test_other_lengths_of_queries_and_keys(self):
        one = self.kernel_session(dense_start=0.5)
        one.begin(LAYOUT, Where(0, 10))
        q, k, v = qkv()
        out, dense = attend(one, tensors=(q[:, :, :37], k, v))
        assert torch.allclose(out, dense, atol=1e-5)

    @pytest.mark.parametrize("why", ["obstacle", "unknown step", "gradients"])
    def test_they_stay_with_the_host_where_the_kernel_cannot_tell(self, why):
        one = self.kernel_session(dense_start=0.5)
        one.begin(LAYOUT, None if why == "unknown step" else Where(0, 10))
        tensors = tuple(x.requires_grad_(why == "gradients") for x in qkv())
        attend(one, tensors=tensors, obstacle="a mask" if why == "obstacle" else None)
        assert one.records["a", "dense"].kernels == {"dense"}


REASONS = {
    "mask": ({"obstacle": "the call has a mask"}, {}, "the call has a mask"),
    "other tokens": (
        {"tensors": qkv(tokens=80)},
        {},
        "a has 80 tokens, but the layout ((3, 4, 7), with 0 of text) makes 84; pass layout=",
    ),
    "other keys": (
        {"tensors": (qkv()[0], *qkv(tokens=70)[1:])},
        {},
        "a has 84 queries and 70 keys",
    ),
    "gradients": (
        {"tensors": tuple(x.requires_grad_() for x in qkv())},
        {},
        "the call needs gradients",
    ),
    "gradients of keys alone": (
        {"tensors": (qkv()[0], qkv()[1].requires_grad_(), qkv()[2])},
        {},
        "the call needs gradients",
    ),
    "double": (
        {"tensors": tuple(x.double() for x in qkv())},
        {},
        "the model computes in torch.float64, which the sparse kernels do not",
    ),
    "wide heads": (
        {"tensors": tuple(x.repeat(1, 1, 1, 33) for x in qkv())},
        {},
        "the head dim is 264; the sparse kernels take up to 256",
    ),
    "predicted": (
        {},
        {"expected": {"attention_ratio": {"a": [1.2]}, **PRICED}},
        "dense attention is predicted to be faster at a",
    ),
}


class TestDense:
    def test_dense_phases_give_what_the_user_chose(self):
        one = session(STATIC, dense_start=0.5, dense_end=0.2)
        for step in range(10):
            one.begin(LAYOUT, Where(step, 10))
            out, dense = attend(one)
            assert (out is dense) == (step < 5 or step >= 8)
        assert not one.notices

    def test_full_choices_and_sites_left_out_are_dense_without_a_notice(self):
        one = session(Choice(Full()), sites=(A,))
        one.begin(LAYOUT, Where(0, 1))
        for site in (A, B):
            out, dense = attend(one, site)
            assert out is dense
        assert not one.notices

    def test_a_run_too_short_for_its_schedule_says_so_once_a_run(self):
        one = session(STATIC, dense_start=0.3, dense_end=0.3)
        for _ in range(2):
            run(one, range(2), total=2, branches=("cond", "uncond"))
            assert [("none of the run's 2 steps" in why, n) for why, n in one.notices.items()] == [
                (True, 1)
            ]
        run(one, range(4), total=4)
        assert not one.notices
        with pytest.raises(AccelError, match=r"strict: none of the run's 1 steps is sparse"):
            run(session(STATIC, strict=True, dense_start=0.3), [0], total=1)

    @pytest.mark.parametrize("schedule", [{"dense_start": 1.0}, {"dense_end": 1.0}], ids=str)
    def test_a_plan_that_is_dense_on_purpose_says_nothing(self, schedule):
        for choice in (STATIC, Choice(Full())):
            one = session(choice, strict=True, **schedule)
            run(one, [0], total=1)
            assert not one.notices
        run(session(Choice(Full()), strict=True, dense_start=0.5), [0], total=1)

    @pytest.mark.parametrize("strict", [False, True], ids=["lenient", "strict"])
    @pytest.mark.parametrize(("call", "settings", "reason"), REASONS.values(), ids=REASONS)
    def test_what_has_to_run_dense_says_so_once(self, caplog, call, settings, reason, strict):
        one = session(STATIC, strict=strict, **settings)
        one.begin(LAYOUT, Where(0, 2))
        if strict:
            with pytest.raises(AccelError, match=re.escape(f"strict: {reason}")):
                attend(one, **call)
            return
        with caplog.at_level(logging.WARNING, logger="accel"):
            for _ in range(3):
                out, dense = attend(one, **call)
                assert out is dense
        assert len(caplog.records) == 1
        assert reason in caplog.text
        assert [(reason in text, n) for text, n in one.notices.items()] == [(True, 3)]

    @pytest.mark.parametrize(
        ("layout", "where", "reason"),
        [
            pytest.param(LAYOUT, None, "the step is unknown", id="no step"),
            pytest.param(None, Where(0, 1), "the layout of the call is unknown", id="no layout"),
            pytest.param(
                Layout.of(text_after=9), Where(0, 1), "the layout (no grid, with 9", id="text"
            ),
        ],
    )
    def test_a_call_that_cannot_be_placed(self, layout, where, reason):
        one = session(STATIC)
        one.begin(layout, where)
        out, dense = attend(one)
        assert out is dense
        assert [reason in text for text in one.notices] == [True]
        with pytest.raises(AccelError, match=re.escape(reason)):
            run(session(STATIC, strict=True), [0], layout=layout, place=lambda *_: where)

    def test_a_layout_that_was_known_before_is_not_used_for_a_call_without(self):
        one = session(STATIC)
        one.begin(LAYOUT, Where(0, 2))
        one.begin(None, Where(1, 2))
        out, dense = attend(one)
        assert out is dense

    def test_a_site_predicted_to_be_faster_is_sparse(self):
        one = session(STATIC, expected={"attention_ratio": {"a": [0.9]}, **PRICED})
        one.begin(LAYOUT, Where(0, 1))
        assert attend(one)[0] is not attend(one)[1]

    @pytest.mark.parametrize(
        "other",
        [{"tokens": 4096}, {"device": "cuda"}, {"dtype": "bfloat16"}, {"tokens": None}],
        ids=str,
    )
    def test_a_prediction_for_other_calls_does_not_count(self, other):
        one = session(STATIC, expected={"attention_ratio": {"a": [1.2]}, **PRICED, **other})
        one.begin(LAYOUT, Where(0, 1))
        out, dense = attend(one)
        assert out is not dense
        assert not one.notices
        assert one.records["a", "band 0"].ratio is None

    def test_a_prediction_holds_at_its_grid_alone(self):
        one = session(STATIC, expected={"attention_ratio": {"a": [1.2]}, **PRICED})
        for layout, priced in ((LAYOUT, True), (Layout.of((3, 4, 9)), False), (LAYOUT, True)):
            one.begin(layout, Where(0, 1))
            out, dense = attend(one, tensors=qkv(tokens=layout.length))
            assert (out is dense) == priced


def test_an_observer_sees_dense_calls_and_may_replace_them():
    one = session(STATIC, dense_start=0.5)
    seen = []

    def observe(site, run, q, k, v, out):
        seen.append((site, run.where.step))
        return out * 0

    one.observer = observe
    outs = run(one, range(10))
    assert seen == [(site, step) for step in range(5) for site in (A, B)]
    assert [bool(out.any()) for out in outs] == [False] * 10 + [True] * 10


def test_a_probe_counts_and_leaves_no_record():
    one = session(STATIC)
    with one.probing() as seen:
        one.begin(LAYOUT, None)
        out, dense = attend(one)
    assert out is dense
    assert seen == {"a": 1}
    assert not one.records
    assert not one.notices
    assert one.probe is None
