"""Heads whose output is a value or an earlier output: what they get, and what is kept for them."""

import pytest
import torch
from sessions import LAYOUT, ONLINE, STATIC, attend, place, qkv, run, session
from torch.nn.functional import scaled_dot_product_attention

from accel import sparse_calls
from accel.choice import DENSE, Choice
from accel.context import Where
from accel.geometry import Geometry, Site
from accel.layout import Layout
from accel.pattern import Identity, Share
from accel.plan import Plan
from accel.router import Session
from accel.schedule import Schedule

IDENTITY, STEP, BRANCH = Choice(Identity()), Choice(Share("step")), Choice(Share("branch"))
HEADS, KV_HEADS = 6, 3


def wide(*choices, schedule=None, grid=(3, 4, 7), **settings):
    """A session of one site with six heads that share three of keys."""
    site = Site("a", HEADS, 8)
    geometry = Geometry("M", (site,), Layout.of(grid))
    schedule = schedule or Schedule(dense_start=0.0)
    bands = (choices,) * schedule.n_bands if len(choices) == HEADS else choices
    plan = Plan.of("p", geometry, {"a": bands}, schedule=schedule, block=(16, 16), **settings)
    return Session(plan, geometry)


def tensors(seed=0, batch=3, tokens=84):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(batch, heads, tokens, 8, generator=generator)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )


def dense_of(q, k, v):
    return scaled_dot_product_attention(q, k, v, enable_gqa=True)


def call(one, where, seed=0, layout=LAYOUT, **shape):
    one.begin(layout, where)
    q, k, v = tensors(seed, **shape)
    out = one.attend(one.geometry.sites[0], q, k, v, lambda: dense_of(q, k, v), None)
    return out, dense_of(q, k, v), v


class TestOutputs:
    def test_identity_is_the_value_of_the_same_token(self):
        one = wide(*[IDENTITY, STATIC] * 3)
        out, _, v = call(one, Where(0, 4))
        for head in (0, 2, 4):
            assert torch.equal(out[:, head], v[:, head // 2])
        plain, _, _ = call(wide(*[Choice(STATIC.select)] * 6), Where(0, 4))
        for head in (1, 3, 5):
            assert torch.equal(out[:, head], plain[:, head])

    def test_an_output_of_the_step_before_whatever_computed_it(self):
        choices = [STEP, STATIC, STEP, DENSE, IDENTITY, STATIC]
        one = wide(*choices, schedule=Schedule(dense_start=0.3))
        outs = [call(one, Where(step, 10), seed=step) for step in range(10)]
        for step in range(3, 10):
            for head in (0, 2):
                # the last dense step's, handed on: the error builds up
                assert torch.equal(outs[step][0][:, head], outs[2][1][:, head])
            torch.testing.assert_close(outs[step][0][:, 3], outs[step][1][:, 3])
            assert not torch.allclose(outs[step][0][:, 0], outs[step][1][:, 0], atol=1e-2)

    def test_a_head_that_computes_in_between_is_shared_anew(self):
        bands = ((STATIC,) * 6, (STEP, STATIC) * 3, (STATIC,) * 6, (STEP,) * 6)
        schedule = Schedule(dense_start=0.0, bands=(0.25, 0.5, 0.75))
        one = wide(*bands, schedule=schedule)
        outs = [call(one, Where(step, 8), seed=step)[0] for step in range(8)]
        for step, source in ((2, 1), (3, 1), (6, 5), (7, 5)):
            for head in (0, 2, 4):
                assert torch.equal(outs[step][:, head], outs[source][:, head])
        assert not torch.equal(outs[4][:, 0], outs[3][:, 0])

    def test_branches_have_their_own_steps(self):
        one = wide(*[STEP, STATIC] * 3)
        outs = {}
        for step in range(3):
            for seed, branch in enumerate(("cond", "uncond")):
                outs[step, branch] = call(one, Where(step, 3, branch), seed=10 * step + seed)[0]
        for branch in ("cond", "uncond"):
            assert torch.equal(outs[2, branch][:, 0], outs[0, branch][:, 0])
        assert not torch.equal(outs[2, "cond"][:, 0], outs[2, "uncond"][:, 0])

    def test_an_output_of_the_branch_that_came_first(self):
        one = wide(*[STATIC, BRANCH] * 3)
        for step in range(3):
            outs = [
                call(one, Where(step, 3, branch), seed=10 * step + seed)
                for seed, branch in enumerate(("uncond", "cond", "third"))
            ]
            for head in (1, 3, 5):
                torch.testing.assert_close(outs[0][0][:, head], outs[0][1][:, head])
                assert torch.equal(outs[1][0][:, head], outs[0][0][:, head])
                assert torch.equal(outs[2][0][:, head], outs[0][0][:, head])
            assert not torch.equal(outs[1][0][:, 0], outs[0][0][:, 0])

    def test_calls_of_one_name_are_branches_too(self):
        one = wide(*[BRANCH] * 6)
        where = Where(0, 3)
        first = call(one, where, seed=1)[0]
        assert torch.equal(call(one, where, seed=2)[0], first)

    @pytest.mark.parametrize("branch", ["", "cond", "batched"])
    def test_a_branch_alone_is_dense(self, branch):
        one = wide(*[BRANCH] * 6)
        for step in range(3):
            out, dense, _ = call(one, Where(step, 3, branch), seed=step)
            assert torch.equal(out, dense)
            assert not one.run.outputs.first or step == 0

    def test_what_stands_in_is_neither_computed_nor_counted(self, monkeypatch):
        one = wide(*[STEP, IDENTITY] * 3, schedule=Schedule(dense_start=0.5))
        monkeypatch.setattr(sparse_calls, "sparse_attention", None)
        for step in range(4):
            out, _, _ = call(one, Where(step, 4), seed=step)
        record = one.records["a", "band 0"]
        assert (record.calls, record.keep, record.recall, record.kernels) == (2, 0.0, [], set())
        assert out.isfinite().all()

    def test_a_kernel_knows_nothing_of_their_order_and_rest(self):
        one = wide(*[Choice(Identity(), order="hwt", rest="mean"), STATIC] * 3)
        call(one, Where(0, 4))
        (mask,) = one.run.masks.values()
        assert (mask.order, mask.rest) == (None, "drop")

    def test_keep_and_recall_are_those_of_the_heads_that_are_computed(self):
        mixed, plain = wide(*[STEP, STATIC] * 3), wide(*[STATIC] * 6)
        for one in (mixed, plain):
            for step in range(2):
                call(one, Where(step, 2), seed=0)
        first, both = mixed.records["a", "band 0"], plain.records["a", "band 0"]
        # in the first step there is nothing to share: those heads are dense
        assert first.keep == pytest.approx((0.5 + both.keep / 4) + both.keep / 4)
        assert torch.equal(first.recall[0], both.recall[0][1::2])

    def test_a_head_that_finds_nothing_does_not_look_anew_later(self, looks):
        one = wide(*[STEP, ONLINE] * 3)
        for step in range(3):
            call(one, Where(step, 3))
        assert len(looks) == 1


class TestNothingToTakeOver:
    def is_dense(self, one, where, **more):
        out, dense, _ = call(one, where, seed=9, **more)
        return torch.allclose(out, dense, atol=1e-5)

    def test_the_first_step(self):
        assert self.is_dense(wide(*[STEP] * 6), Where(0, 4))

    def test_a_new_run(self):
        one = wide(*[STEP] * 6)
        for step in range(3):
            call(one, Where(step, 4), seed=step)
        assert self.is_dense(one, Where(0, 4))

    def test_a_run_that_may_be_another(self):
        one = wide(*[STEP] * 6)
        call(one, Where(0, 9))
        assert self.is_dense(one, Where(5, 9))

    def test_steps_left_out_that_a_scheduler_vouches_for_are_the_same_run(self):
        one, where = wide(*[STEP] * 6), place(torch.arange(9))
        first = call(one, where(0, 9))[0]
        assert torch.equal(call(one, where(5, 9), seed=9)[0], first)

    def test_another_layout(self):
        one = wide(*[STEP] * 6)
        call(one, Where(0, 4))
        assert self.is_dense(one, Where(1, 4), layout=Layout.of((3, 7, 4)))

    @pytest.mark.parametrize("choice", [STEP, BRANCH], ids=["step", "branch"])
    def test_another_batch_size(self, choice):
        one = wide(*[choice] * 6)
        call(one, Where(0, 4, "cond"), batch=2)
        branch = "cond" if choice is STEP else "uncond"
        assert self.is_dense(one, Where(choice is STEP, 4, branch), batch=3)

    def test_a_call_without_a_place_is_nobodys_step(self):
        one = wide(*[STEP] * 6)
        first = call(one, Where(0, 4))[0]
        call(one, None, seed=5)
        assert torch.equal(call(one, Where(1, 4), seed=6)[0], first)


class TestMemory:
    """Outputs of the heads that will need them alone, from the call before to their use."""

    def test_nothing_is_kept_for_a_plan_that_shares_nothing(self):
        one = session(STATIC, dense_start=0.3)
        for step in range(10):
            run(one, [step])
            assert not one.run.outputs.before
            assert not one.run.outputs.first

    def test_the_step_before_and_no_other(self):
        bands = ((STATIC,) * 6, (STEP, STATIC, STATIC) * 2)
        schedule = Schedule(dense_start=0.2, dense_end=0.2, bands=(0.5,))
        one, heads = wide(*bands, schedule=schedule), []
        for step in range(10):
            call(one, Where(step, 10))
            kept = one.run.outputs.before.get(("a", ""))
            heads.append(None if kept is None else (kept.heads, kept.out.shape[1]))
        # steps 5, 6 and 7 share
        assert heads == [None] * 4 + [((0, 3), 2)] * 3 + [None] * 3

    def test_a_dense_first_step_keeps_for_the_second(self):
        one = wide(*[STEP] * 6, schedule=Schedule(dense_start=0.2))
        call(one, Where(0, 10))
        assert not one.run.outputs.before
        call(one, Where(1, 10))
        assert one.run.outputs.before["a", ""].heads == tuple(range(6))

    def test_the_first_branch_to_the_last_of_its_step(self):
        one, kept = wide(*[STATIC, BRANCH] * 3), []
        for step in range(3):
            for branch in ("cond", "uncond"):
                call(one, Where(step, 3, branch))
                kept.append([k.heads for k in one.run.outputs.first.values()])
        # how many branches there are is known from the second step on
        assert kept == [[(1, 3, 5)], [(1, 3, 5)], [(1, 3, 5)], [], [(1, 3, 5)], []]

    def test_kept_outputs_hold_no_graph_and_no_other_heads(self):
        one = wide(*[STEP, STATIC] * 3, schedule=Schedule(dense_start=0.5))
        one.begin(LAYOUT, Where(1, 4))
        q, k, v = (x.requires_grad_() for x in tensors())
        one.attend(one.geometry.sites[0], q, k, v, lambda: dense_of(q, k, v), None)
        kept = one.run.outputs.before["a", ""].out
        assert not kept.requires_grad
        assert kept.untyped_storage().nbytes() == kept.numel() * 4


def test_an_output_that_an_observer_replaced_is_what_is_shared():
    one = session(Choice(Share()), dense_start=0.5)
    one.observer = lambda site, run, q, k, v, out: out * 0 + 7
    run(one, range(5))
    one.begin(LAYOUT, Where(5, 10))
    assert (attend(one, tensors=qkv(seed=3))[0] == 7).all()
