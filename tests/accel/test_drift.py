"""Masks that are made anew once queries and keys have moved."""

import pytest
import torch
from sessions import LAYOUT, ONLINE, A, attend, qkv, run, session

from accel.choice import Choice
from accel.context import Where
from accel.drift import BlockMeans
from accel.estimators import AdaptiveBlockMass
from accel.layout import Layout
from accel.pattern import Window


def means(x, size):
    return torch.stack([part.mean(2) for part in x.split(size, 2)], 2)


@pytest.mark.parametrize("valid", [84, 75])
def test_drift_is_the_moved_part_of_the_means(valid):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(3, h, 84, 8, generator=generator) for h in (6, 2))
    moved = [x + 0.1 * torch.randn(x.shape, generator=generator) for x in (q, k)]
    before, now = BlockMeans.of(q, k, (32, 16), valid), BlockMeans.of(*moved, (32, 16), valid)
    found = now.drift(before)
    for b in range(3):
        for h in range(6):
            pairs = [
                [means(x[b : b + 1, [head], :valid].double(), size) for x in two]
                for two, head, size in (
                    ((q, moved[0]), h, 32),
                    ((k, moved[1]), h // 3, 16),
                )
            ]
            change = sum((new - old).abs().sum() for old, new in pairs)
            size = sum(old.abs().sum() for old, _ in pairs)
            assert found[b, h].item() == pytest.approx((change / size).item(), rel=1e-5)


def test_half_precision_is_summed_in_full():
    q, k, _ = qkv()
    means = BlockMeans.of(q.bfloat16(), k.bfloat16(), (16, 16), 84)
    assert (means.q.dtype, means.k.dtype) == (torch.float32, torch.float32)


def test_queries_and_keys_of_zeros_have_not_moved():
    zeros = torch.zeros(1, 2, 84, 8)
    still = BlockMeans.of(zeros, zeros, (16, 16), 84)
    assert still.moved(still, 1e-9, [0, 1]).tolist() == [0, 2]


def scaled(factor, heads=slice(None)):
    """q and k whose block means are `factor` of what they were: a drift of |factor - 1|."""
    q, k, v = qkv()
    q[:, heads] *= factor
    k[:, heads] *= factor
    return q, k, v


class TestRefresh:
    def looked(self, one, looks, factors, **heads):
        """At which of the calls masks were made."""
        steps = []
        for step, factor in enumerate(factors):
            looks.clear()
            one.begin(LAYOUT, Where(step, len(factors)))
            attend(one, A, scaled(factor, **heads))
            steps.append(bool(looks))
        return [step for step, made in enumerate(steps) if made]

    def test_the_anchor_moves_with_the_mask_alone(self, looks):
        """Steps of 4% add up to more than 10% of the mask's own at every third one."""
        factors = [1.0, 1.04, 1.08, 1.12, 1.16, 1.2, 1.24, 1.28]
        assert self.looked(session(ONLINE, drift=0.1), looks, factors) == [0, 3, 6]
        assert self.looked(session(ONLINE, drift=0.02), looks, factors) == list(range(8))
        assert self.looked(session(ONLINE, drift=0.5), looks, factors) == [0]
        assert self.looked(session(ONLINE), looks, factors) == [0]

    def test_refresh_points_hold_beside_it(self, looks):
        factors = [1.0, 1.0, 1.2, 1.2, 1.2, 1.2]
        one = session(ONLINE, drift=0.1, refresh=(0.7,))
        assert self.looked(one, looks, factors) == [0, 2, 5]

    def test_more_than_half_of_the_heads_have_to_move(self, looks):
        assert self.looked(session(ONLINE, drift=0.1), looks, [1.0, 1.5], heads=[0]) == [0]
        assert self.looked(session(ONLINE, drift=0.1), looks, [1.0, 1.5], heads=[0, 1]) == [0, 1]

    def test_heads_that_look_at_nothing_have_no_say(self, looks):
        one = session(Choice(Window(t=0)), ONLINE, drift=0.1)
        assert self.looked(one, looks, [1.0, 1.5], heads=[1]) == [0, 1]
        one = session(Choice(Window(t=0)), ONLINE, drift=0.1)
        assert self.looked(one, looks, [1.0, 1.5], heads=[0]) == [0]
        static = session(Choice(Window(t=0)), drift=0.1)
        assert self.looked(static, looks, [1.0, 1.5]) == [0]
        assert not static.run.anchors

    def test_a_site_and_a_branch_move_by_themselves(self, looks):
        one = session(ONLINE, drift=0.1)
        for step, factor in enumerate((1.0, 1.5)):
            for branch in ("cond", "uncond"):
                one.begin(LAYOUT, Where(step, 2, branch))
                for site in one.geometry.sites:
                    moves = branch == "cond" and site is A
                    attend(one, site, scaled(factor if moves else 1.0))
        assert len(looks) == 5
        assert sorted(one.run.anchors) == sorted((s, b) for s in "ab" for b in ("cond", "uncond"))

    def test_padding_does_not_move_it(self, looks):
        layout = Layout.of((3, 4, 7), padding=28)
        one = session(ONLINE, drift=0.1)
        for step, filling in enumerate((0.0, 9.0)):
            one.begin(layout, Where(step, 2))
            attend(
                one,
                tensors=tuple(
                    torch.nn.functional.pad(x, (0, 0, 0, 28), value=filling) for x in qkv()
                ),
            )
        assert len(looks) == 1

    def test_rows_that_moved_are_not_reused(self, monkeypatch):
        given, find = [], AdaptiveBlockMass.select_in

        def spy(self, call):
            given.append(call.lse is not None)
            return find(self, call)

        monkeypatch.setattr(AdaptiveBlockMass, "select_in", spy)
        one = session(Choice(AdaptiveBlockMass(keep=0.5)), drift=0.1, refresh=(0.9,))
        for step, factor in enumerate((1.0, 1.5, 1.5, 1.5)):
            one.begin(LAYOUT, Where(step, 4))
            attend(one, tensors=scaled(factor))
        assert given == [False, False]

    def test_the_new_mask_is_that_of_the_call(self):
        one, alone = session(ONLINE, drift=0.1), session(ONLINE)
        other = qkv(seed=3)
        run(one, [0])
        for out, same in zip(
            run(one, [1], tensors=other), run(alone, [0], tensors=other), strict=True
        ):
            assert torch.equal(out, same)

    def test_recall_is_that_of_the_new_mask_and_looks_are_timed(self):
        one = session(ONLINE, drift=0.1)
        run(one, [0])
        run(one, [1], tensors=qkv(seed=3))
        run(one, [2], tensors=qkv(seed=3))
        record = one.records["a", "band 0"]
        assert len(record.recall) == 2
        assert (len(record.mask_seconds), len(record.check_seconds)) == (2, 3)

    def test_a_new_run_has_no_anchor(self, looks):
        one = session(ONLINE, drift=9.0)
        run(one, range(2), total=2)
        looks.clear()
        run(one, [0], total=2, tensors=qkv(seed=3))
        assert len(looks) == 2
