"""Which calls belong to one run of a session, to one step, and to one branch."""

import pytest
import torch
from sessions import LAYOUT, ONLINE, STATIC, A, B, attend, place, qkv, run, session

import accel
from accel.choice import Choice
from accel.context import Where, locate
from accel.estimators import AdaptiveBlockMass
from accel.layout import Layout


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
