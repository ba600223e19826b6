"""SparseViT: window pruning."""

import re
from collections.abc import Sequence
from itertools import groupby

from accel.choice import DENSE
from accel.errors import PlanError
from accel.geometry import Geometry
from accel.plan import Plan
from accel.recipes.registry import published
from accel.schedule import Schedule
from accel.window_keeps import WindowKeeps

STAGE = re.compile(r"(.*layers\.\d+)\.blocks\.\d+\.attn")
# of the searched configuration cfg2 for Swin-T: 1 - .6; 0; .2, .4, .5; 0
KEEPS = (0.4, 1.0, (0.8, 0.6, 0.5), 1.0)


@published(frames=False, vision=True)
def sparsevit(
    geometry: Geometry,
    *,
    keeps: Sequence[float | Sequence[float]] = KEEPS,
    uniform: float | None = None,
    score: str = "norm_of_means",
) -> Plan:
    """Blocks compute their highest-scoring windows (Chen et al., CVPR 2023, arXiv 2303.17605).

    keeps: one number for each stage, or one for each pair of its blocks (unshifted and shifted),
        which do not grow. Where a stage has more pairs than numbers, numbers count for as many
        pairs in turn. The default is what the paper's search found for Swin-T at 672 x 672 (cfg2:
        1.4 times as fast, one point of box mAP less, after training with pruning): most is left out
        in the first stage, nothing in the second and the last.
    uniform: one keep for all blocks instead.
    score: what ranks windows, of the paper's code or of its text, or `contrast`
        (`accel.window_keeps`).

    For models in stages (Swin, Swin v2); SAM and Hiera take a `WindowKeeps` by site.
    """
    sites = [site.name for site in geometry.sites]
    stage_of = {name: found[1] for name in sites if (found := STAGE.fullmatch(name))}
    if len(stage_of) < len(sites):
        raise PlanError(
            f"'sparsevit' has keeps for the stages of Swin and Swin v2, not for a"
            f" {geometry.model}; give it keeps by site (accel.window_keeps)"
        )
    stages = [list(names) for _, names in groupby(sites, stage_of.__getitem__)]
    chosen = [uniform] * len(stages) if uniform is not None else list(keeps)
    if len(chosen) != len(stages):
        raise PlanError(f"keeps are for {len(chosen)} stages, the model has {len(stages)}")
    by_site = {}
    for names, of_stage in zip(stages, chosen, strict=True):
        row = of_stage if isinstance(of_stage, Sequence) else [of_stage]
        pairs = -(-len(names) // 2)
        if not 0 < len(row) <= pairs:
            raise PlanError(
                f"keeps have {len(row)} numbers for the {pairs} pairs of blocks from {names[0]} on"
            )
        for number, name in enumerate(names):
            by_site[name] = row[number // 2 * len(row) // pairs]
    return Plan.uniform(
        "sparsevit",
        geometry,
        DENSE,
        schedule=Schedule(dense_start=0.0),
        windows=WindowKeeps({name: keep for name, keep in by_site.items() if keep != 1}, score),
        provenance={"recipe": "sparsevit"},
    )
