"""The masks of a run: found once, shared where that is right, found anew when they are stale."""

from collections.abc import Iterator

from jaxtyping import Float
from torch import Tensor

from accel.choice import Choice
from accel.drift import BlockMeans
from accel.geometry import Site
from accel.layout import Layout
from accel.masks import SiteMask, site_mask
from accel.plan import Plan
from accel.records import Record, Stopwatch
from accel.run_state import MaskKey, Run


def found_mask(
    plan: Plan,
    run: Run,
    site: Site,
    branch: str,
    layout: Layout,
    choices: tuple[Choice, ...],
    record: Record,
    q: Float[Tensor, "batch heads tokens dim"],
    k: Float[Tensor, "batch kv_heads tokens dim"],
    v: Float[Tensor, "batch kv_heads tokens dim"],
) -> tuple[MaskKey, SiteMask]:
    """The mask of a call of `site` and its key in `run.masks`; made where none still holds.

    Masks of patterns alone hold for a run, and for all sites and branches with the same choices.
    Those that looked at q and k belong to a site and branch, and hold until the next refresh point
    of the schedule, or until q and k have drifted away.
    """
    online = [h for h, c in enumerate(choices) if c.online]
    owner = (site.name, branch) if online else None
    generation = run.phase.generation if online else None
    batch = q.shape[0] if online else None
    key = MaskKey(owner, choices, layout, generation, batch, q.device)
    rows = (owner, q.shape[0], q.device)
    chosen = run.masks.get(key)
    bound = plan.schedule.drift
    if online and bound is not None:
        watch = Stopwatch(record, q.device, "check_seconds")
        means = BlockMeans.of(q, k, plan.block, layout.valid_length)
        if chosen is not None and means.has_left(run.anchors[owner], bound, online):
            chosen = None
            run.lse.pop(rows, None)  # the rows have moved as well
        if chosen is None:
            run.anchors[owner] = means
        watch.stop()
    if chosen is None:
        if owner is not None:
            run.let_go(owner)
        watch = Stopwatch(record, q.device, "mask_seconds")
        lse = run.lse.pop(rows, {})
        if plan.schedule.looks_again(run.phase):
            run.lse[rows] = lse
        chosen = run.masks[key] = site_mask(
            choices,
            q,
            k,
            v,
            layout=layout,
            block=plan.block,
            lse=lse,
            patterns=run.patterns,
            precision=plan.precision_of(site.name),
        )
        watch.stop()
    return key, chosen


def selected_keeps(run: Run) -> Iterator[tuple[Choice, float]]:
    """What choices that look at q and k keep in the masks that hold now, head by head.

    As they were selected: heads that are dense for their recall are in masks of their own.
    """
    for key, found in run.masks.items():
        if key.owner is None or key.dense:
            continue
        for choice, keep in zip(key.choices, found.mask.keep_per_head().tolist(), strict=True):
            if choice.online:
                yield choice, keep
