"""Keeps of an adaptation: by pairs, falling within a stage, all levels alike, a plan that fits."""

from collections import Counter

import numpy as np
import pytest
from swin_digits_model import swin_of
from test_swin_digits import tiny_pipe
from window_adaptation import LEVELS, draw_keeps, keeps_plan, window_blocks

from accel.plan import Plan
from accel.window_keeps import WindowKeeps


def sites(*depths: int) -> list[str]:
    return [f"layers.{s}.blocks.{b}.attn" for s, depth in enumerate(depths) for b in range(depth)]


def test_keeps_fall_within_a_stage_and_pairs_share_one() -> None:
    names = sites(2, 3, 6, 1)
    starts = set()
    for index in range(40):
        keeps = draw_keeps(names, np.random.default_rng([1, index]))
        assert list(keeps) == names
        assert set(keeps.values()) <= set(LEVELS)
        for stage, depth in enumerate((2, 3, 6, 1)):
            found = [keeps[f"layers.{stage}.blocks.{b}.attn"] for b in range(depth)]
            assert found == sorted(found, reverse=True)
            assert all(found[b] == found[b + 1] for b in range(0, depth - 1, 2))
        starts.add(keeps["layers.0.blocks.0.attn"])
        assert keeps == draw_keeps(names, np.random.default_rng([1, index]))
    assert len(starts) > 5


def test_levels_are_tenths_and_equally_likely() -> None:
    assert LEVELS == (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
    random = np.random.default_rng(0)
    drawn = Counter(draw_keeps(sites(2), random)[sites(2)[0]] for _ in range(1800))
    assert set(drawn) == set(LEVELS)
    assert all(140 < count < 265 for count in drawn.values())


@pytest.mark.parametrize("bare", [False, True])
def test_a_plan_of_keeps_fits_its_model_and_a_file(bare: bool) -> None:
    pipe = tiny_pipe()
    model = swin_of(pipe) if bare else pipe.model
    names = window_blocks(model)
    assert names == sites(2, 1, 2, 1)
    keeps = draw_keeps(names, np.random.default_rng(3))
    plan = keeps_plan(model, WindowKeeps(keeps))
    assert plan.check(pipe) is plan
    again = Plan.from_dict(plan.to_dict())
    assert again.windows == WindowKeeps(keeps)
    assert not again.wants_sparse
