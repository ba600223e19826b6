"""Sparsity-aware adaptation of windowed models (SparseViT, Chen et al., CVPR 2023, arXiv
2303.17605): every step of a training computes another share of the windows, so that a search can
judge any keeps without training for them.
"""

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
from torch import nn

from accel.choice import DENSE
from accel.pipelines.adapters import denoisers_of, geometry_of
from accel.pipelines.window_blocks import window_stages
from accel.plan import Plan
from accel.schedule import Schedule
from accel.window_keeps import WindowKeeps

__all__ = ["LEVELS", "SCORE", "draw_keeps", "keeps_plan", "window_blocks"]

# of windows: the ground of a canvas has the larger activations, and norms keep it
SCORE = "contrast"
LEVELS = tuple(round(1 - tenth / 10, 1) for tenth in range(10))  # 1.0 to 0.1


def window_blocks(model: nn.Module) -> list[str]:
    """Sites of the blocks that can leave windows out: the names that keeps go by."""
    (core,) = denoisers_of(model)
    stages = window_stages(core, [site.name for site in geometry_of(core).sites])
    return [b.site for stage in stages for b in stage.blocks if b.host.obstacle is None]


def draw_keeps(sites: Iterable[str], random: np.random.Generator) -> dict[str, float]:
    """Keeps of one step, by site.

    The blocks of a stage go by pairs, one without and one with a shift, and a pair has one keep. A
    stage of n pairs draws n of `LEVELS`, all equally likely, and gives them out in falling order:
    later blocks take a part of the windows that earlier ones took. An odd block at the end of a
    stage is a pair by itself.
    """
    stages: dict[str, list[str]] = defaultdict(list)
    for site in sites:
        stages[site.partition(".blocks.")[0]].append(site)
    keeps = {}
    for blocks in stages.values():
        drawn = random.choice(LEVELS, -(-len(blocks) // 2))
        for number, keep in enumerate(sorted(drawn.tolist(), reverse=True)):
            keeps |= dict.fromkeys(blocks[2 * number : 2 * number + 2], keep)
    return keeps


def keeps_plan(model: nn.Module, windows: WindowKeeps, name: str = "adaptation") -> Plan:
    """The plan that computes these windows, and all of the attention inside them."""
    schedule = Schedule(dense_start=0.0)
    return Plan.uniform(name, geometry_of(model), DENSE, schedule=schedule, windows=windows)
