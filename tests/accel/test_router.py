"""A session by itself: random queries and keys, no model."""

import logging
import re
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import accel.router
from accel.context import Where, locate
from accel.errors import AccelError
from accel.estimators import AdaptiveBlockMass, BlockMassTopK
from accel.geometry import Geometry, Site
from accel.kernels.attention import resolve_backend
from accel.layout import Layout
from accel.pattern import Full, Window
from accel.plan import Choice, Plan
from accel.router import Session
from accel.schedule import Schedule

LAYOUT = Layout.of((3, 4, 7))
A, B = Site("a", 2, 8), Site("b", 2, 8)
GEOMETRY = Geometry("M", (A, B))
PRICED = {"tokens": LAYOUT.length, "device": "cpu", "dtype": "float32"}  # the calls of `attend`
STATIC = Choice(Window(t=0))
ONLINE = Choice(BlockMassTopK(keep=0.5))


def session(*choices, strict=False, sites=(A, B), expected=None, **schedule):
    schedule = Schedule(**{"dense_start": 0.0, **schedule})
    heads = choices * 2 if len(choices) == 1 else choices
    plan = Plan(
        name="p",
        model="M",
        sites={s.name: (heads,) * schedule.n_bands for s in sites},
        n_sites=2,
        head_dim=8,
        schedule=schedule,
        block=(16, 16),
        expected=expected or {},
    )
    return Session(plan, GEOMETRY, strict=strict)


def qkv(batch=1, seed=0, tokens=84):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, 2, tokens, 8, generator=generator) for _ in range(3))


def attend(session, site=A, tensors=None, obstacle=None):
    q, k, v = tensors or qkv()
    dense = scaled_dot_product_attention(q, k, v)
    return session.attend(site, q, k, v, lambda: dense, obstacle), dense


def run(session, steps, total=10, branches=("",), tensors=None, layout=LAYOUT, place=Where):
    outs = []
    for step in steps:
        for branch in branches:
            session.begin(layout, place(step, total, branch))
            outs += [attend(session, site, tensors)[0] for site in (A, B)]
    return outs


@pytest.fixture
def looks(monkeypatch):
    """Every selection of blocks that is made, as (choices, layout)."""
    made = []
    select = accel.router.site_mask

    def spy(choices, q, k, v, *, layout, **settings):
        made.append((choices, layout))
        return select(choices, q, k, v, layout=layout, **settings)

    monkeypatch.setattr(accel.router, "site_mask", spy)
    return made


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

    def test_a_static_head_beside_an_online_one(self, looks):
        one = session(STATIC, ONLINE, refresh=(0.5,))
        run(one, range(10))
        assert len(looks) == 4

    def test_bands_with_the_same_choices_share_their_masks(self, looks):
        run(session(ONLINE, bands=(0.5,)), range(10))
        assert len(looks) == 2

    def test_a_refresh_reuses_the_rows_that_it_found(self, monkeypatch):
        given = []
        find = AdaptiveBlockMass._select

        def spy(self, call):
            given.append(call.lse is not None)
            return find(self, call)

        monkeypatch.setattr(AdaptiveBlockMass, "_select", spy)
        run(session(Choice(AdaptiveBlockMass(keep=0.5)), refresh=(0.5,)), range(10))
        assert given == [False, False, True, True]

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


class TestRuns:
    """A new run starts from nothing: what it gives does not depend on what was before."""

    FRESH = 5

    def after(self, before, looks, **second):
        """Outputs of a run at FRESH steps with other tensors, after what `before` does."""
        one = session(ONLINE, **second.pop("plan", {}))
        before(one)
        looks.clear()
        outs = run(one, range(self.FRESH), total=self.FRESH, tensors=qkv(seed=1), **second)
        other = session(ONLINE)
        alone = run(other, range(self.FRESH), total=self.FRESH, tensors=qkv(seed=1), **second)
        assert all(torch.equal(a, b) for a, b in zip(outs, alone, strict=True))
        assert {key: (r.calls, r.keep) for key, r in one.records.items()} == {
            key: (r.calls, r.keep) for key, r in other.records.items()
        }
        return one

    def test_a_whole_run(self, looks):
        self.after(lambda s: run(s, range(5), total=5), looks)

    def test_a_run_of_another_length(self, looks):
        self.after(lambda s: run(s, [0], total=3), looks)

    @pytest.mark.parametrize("step", [0, 1, 4])
    def test_an_interrupted_run(self, looks, step):
        self.after(lambda s: run(s, range(step + 1), total=5), looks)

    def test_another_layout(self, looks):
        self.after(
            lambda s: run(s, [0], total=5, layout=Layout.of((3, 7, 4))),
            looks,
        )

    def test_an_unknown_step_between(self, looks):
        def before(one):
            run(one, range(3), total=5)
            one.begin(LAYOUT, None)

        self.after(before, looks)

    def test_an_unknown_layout_between(self, looks):
        def before(one):
            run(one, [0], total=5, layout=Layout.of((3, 7, 4)))
            one.begin(None, Where(0, 5))

        self.after(before, looks)

    def test_branches_of_the_first_step_are_one_run(self, looks):
        one = session(ONLINE)
        run(one, range(3), branches=("cond", "uncond"))
        assert one.records["a", "band 0"].calls == 6
        assert len(looks) == 4

    def test_a_run_that_begins_late_and_is_interrupted_there(self, looks):
        one = session(ONLINE)
        run(one, [6])
        looks.clear()
        run(one, [6], tensors=qkv(seed=1))
        assert len(looks) == 2

    def test_a_run_that_begins_later_than_the_one_before_was_interrupted(self, looks):
        one = session(Choice(AdaptiveBlockMass(keep=0.5)), refresh=(0.3,))
        run(one, range(2))
        looks.clear()
        outs = run(one, [5, 6], tensors=qkv(seed=1))
        alone = run(session(Choice(AdaptiveBlockMass(keep=0.5))), [5, 6], tensors=qkv(seed=1))
        assert all(torch.equal(a, b) for a, b in zip(outs, alone, strict=True))

    def test_timesteps_of_its_own_make_a_run(self, looks):
        one = session(ONLINE)
        for seed, begin in enumerate((0, 3, 4, 4)):
            timesteps = torch.arange(10)
            looks.clear()
            run(one, [begin, begin + 1], tensors=qkv(seed=seed), place=place(timesteps))
            assert len(looks) == 2
            assert one.records["a", "band 0"].calls == 2

    def test_timesteps_that_stay_vouch_for_steps_left_out(self, looks):
        run(session(ONLINE), [0, 5], place=place(torch.arange(10)))
        assert len(looks) == 2


def place(timesteps, **more):
    """Places of a pipeline's run."""
    return lambda *where: Where(*where, run=timesteps, **more)


class TestGuidance:
    """Calls of one step: each has masks of its own and is counted."""

    def test_two_calls_in_one_block_are_two_branches(self, looks):
        one, tensors = session(ONLINE), [qkv(seed=seed) for seed in (1, 2)]
        outs = []
        for step in range(3):
            with accel.step(step, 3):
                for call in tensors:
                    one.begin(LAYOUT, locate(None, None))
                    outs.append([attend(one, site, call)[0] for site in (A, B)])
        assert len(looks) == 4
        assert one.records["a", "band 0"].calls == 6
        assert one.run.first_branches == {"", "#2"}
        for seed, found in ((1, outs[-2]), (2, outs[-1])):
            alone = run(session(ONLINE), [0], tensors=qkv(seed=seed))
            assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))

    def test_another_block_of_the_first_step_is_another_run(self):
        one = session(ONLINE)
        for _ in range(2):
            with accel.step(0, 3):
                one.begin(LAYOUT, locate(None, None))
                attend(one)
        assert one.records["a", "band 0"].calls == 1

    @pytest.mark.parametrize(("branch", "known"), [("", 3), ("cond", 1)])
    def test_a_scheduler_that_stands_still_is_found_out(self, branch, known):
        one, where = session(STATIC), place(torch.arange(10), assumed=True)
        for _ in range(5):
            one.begin(LAYOUT, where(0, 10, branch))
            attend(one)
        assert one.records["a", "band 0"].calls == known
        assert one.records["a", "dense"].calls == 5 - known
        assert [("the step is unknown" in why, n) for why, n in one.notices.items()] == [
            (True, 5 - known)
        ]

    def test_a_scheduler_that_is_stepped_is_believed(self):
        one = session(STATIC)
        run(
            one, range(10), branches=("cond", "uncond"), place=place(torch.arange(10), assumed=True)
        )
        assert not one.notices


class TestDenseByKernel:
    """Dense calls of a plan whose `dense` is `kernel`."""

    def kernel_session(self, **schedule):
        one = session(STATIC, **schedule)
        one.plan = replace(one.plan, dense="kernel")
        return one

    def test_they_run_in_the_kernel_with_all_blocks_and_agree(self):
        one = self.kernel_session(dense_start=0.5)
        one.begin(LAYOUT, Where(0, 10))
        out, dense = attend(one)
        assert torch.allclose(out, dense, atol=1e-5)
        assert not torch.equal(out, torch.zeros_like(out))
        record = one.records["a", "dense"]
        assert record.kernels == {resolve_backend("auto", out.device)}
        assert (record.calls, record.keep) == (1, 1.0)

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
