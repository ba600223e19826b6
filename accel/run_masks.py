"""The masks of a run: found once, shared where that is right, found anew when they are stale."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from accel.choice import Choice
from accel.drift import BlockMeans, most
from accel.geometry import Site
from accel.head_shares import Mine
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
    mine: Mine | None = None,
) -> tuple[MaskKey, SiteMask | None]:
    """The mask of a call of `site` and its key in `run.masks`; made where none still holds.

    Masks of patterns alone hold for a run, and for all sites and branches with the same choices.
    Those that looked at q and k belong to a site and branch, and hold until the next refresh point
    of the schedule, or until q and k have drifted away.

    mine: choices, q, k and v are of some heads of a site, whose other heads other ranks compute;
    without heads there is no mask. Whether they have drifted away is asked of all heads together.
    """
    online = [h for h, c in enumerate(choices) if c.online]
    owner = (site.name, branch) if online else None
    generation = (run.phase.block, run.phase.generation) if online else None
    batch = q.shape[0] if online else None
    key = MaskKey(owner, choices, layout, generation, batch, q.device)
    if mine is not None and online:
        key = key._replace(heads=mine.heads)
    rows = (owner if mine is None else (site.name, branch), q.shape[0], q.device)
    if mine is not None and mine.rows is not None:
        run.lse[rows] = mine.moved(run.lse.get(rows, {}), q)
    chosen = run.masks.get(key)
    bound = plan.schedule.drift
    if bound is not None and (online or (mine is not None and mine.online)):
        watch = Stopwatch(record, q.device, "check_seconds")
        moved, means = q.new_zeros(2, dtype=torch.int64), None
        if online:
            means = BlockMeans.of(q, k, plan.block, layout.valid_length)
            if chosen is not None:
                moved = means.moved(run.anchors[owner], bound, online)
        if mine is not None:
            moved = mine.ranks.total(moved)
        # without a mask yet nothing has moved, and nobody has to wait for the device
        if (chosen is not None or mine is not None) and most(moved):
            run.lse.pop(rows, None)  # the rows have moved as well
            chosen = None if online else chosen
        if chosen is None and means is not None:
            run.anchors[owner] = means
        watch.stop()
    if not choices:
        return key, None
    if chosen is None:
        if owner is not None:
            run.let_go(owner)
        watch = Stopwatch(record, q.device, "mask_seconds")
        known = run.lse.pop(rows, {})
        # a mask is made for heads by their place in the call, rows are kept by their place in the
        # site: another deal may put other heads here
        place = range(len(choices)) if mine is None else mine.heads
        lse = {h: known[number] for h, number in enumerate(place) if number in known}
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
        if plan.schedule.looks_again(run.phase):
            run.lse[rows] = known | {place[h]: found for h, found in lse.items()}
        watch.stop()
    return key, chosen


def selected_keeps(run: Run) -> Iterator[tuple[Choice, float]]:
    """What choices that look at q and k keep in the masks that hold now, head by head.

    As they were selected: heads that are dense for their recall are in masks of their own.
    """
    for key, found in run.masks.items():
        if key.owner is None or key.dense or key.more:
            continue
        for choice, keep in zip(key.choices, found.mask.keep_per_head().tolist(), strict=True):
            if choice.online:
                yield choice, keep
