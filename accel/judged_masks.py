"""The mask of a call, judged by its recall: heads under the plan's floor are dense for its life."""

from jaxtyping import Float
from torch import Tensor

from accel.choice import Choice
from accel.dense_heads import with_dense_heads, with_more_heads
from accel.geometry import Site
from accel.guard import weak_heads
from accel.head_shares import Mine
from accel.layout import Layout
from accel.layouts import Part
from accel.masks import SiteMask, sampled_recall
from accel.plan import Plan
from accel.records import Record, Stopwatch, phase_label
from accel.run_masks import found_mask
from accel.run_state import MaskKey, Run
from accel.stand_in import computed, stands_in

__all__ = ["judged_mask"]


def judged_mask(
    plan: Plan,
    run: Run,
    site: Site,
    part: Part,
    choices: tuple[Choice, ...],
    dense: tuple[int, ...],
    record: Record,
    q: Float[Tensor, "batch heads tokens dim"],
    k: Float[Tensor, "batch kv_heads tokens dim"],
    v: Float[Tensor, "batch kv_heads tokens dim"],
    mine: Mine | None = None,
) -> tuple[SiteMask | None, str]:
    """The mask of a part of a call, None where every head is dense; and which heads a new mask has
    under the floor, in words, "" where there are none.

    dense: heads that are dense in this call, whatever their choice; q, k, v: of the part.
    mine: of a site that ranks share these are the heads; there is a mask even where all of them
    are dense, and None where there are none.
    """
    branch, layout = run.branch + part.name, part.layout
    if mine is not None and mine.more:
        q, k, v = (x[:, : len(mine.heads)] for x in (q, k, v))
    key, found = found_mask(
        plan, run, site, branch, layout, computed(choices), record, q, k, v, mine
    )
    if found is None:
        return _with_more(plan, run, key, None, mine, layout), ""
    said = ""
    looked = (site.name, branch, phase_label(run.phase.band), run.phase.block, run.phase.generation)
    if looked not in run.recalls:
        floor = plan.recall_floor
        watch = Stopwatch(record, q.device, "recall_seconds")
        recall = run.recalls[looked] = sampled_recall(q, k, found)
        run.weak[looked] = () if floor is None else weak_heads(recall, floor, choices)
        watch.stop()
        seen = [h for h, c in enumerate(choices) if not stands_in(c)]
        record.recall.append(recall if len(seen) == len(choices) else recall[seen])
        if run.weak[looked]:
            numbers = range(len(choices)) if mine is None else mine.heads
            heads = ", ".join(str(numbers[h]) for h in run.weak[looked])
            said = f"recall is under the floor of {floor} at {site.name}, heads {heads}"
    dense = tuple(sorted({*dense, *run.weak[looked]}))
    if mine is None and all(c.dense or h in dense for h, c in enumerate(choices)):
        return None, said
    if dense:
        key = key._replace(dense=dense)
        if key not in run.masks:
            run.masks[key] = with_dense_heads(found, dense, layout)
        found = run.masks[key]
    return _with_more(plan, run, key, found, mine, layout), said


def _with_more(
    plan: Plan,
    run: Run,
    key: MaskKey,
    found: SiteMask | None,
    mine: Mine | None,
    layout: Layout,
) -> SiteMask | None:
    """A mask with the dense heads that this rank has besides those with choices of their own."""
    if mine is None or not mine.more:
        return found
    key = key._replace(more=mine.more)
    if key not in run.masks:
        run.masks[key] = with_more_heads(found, mine.more, layout, plan.block, key.device)
    return run.masks[key]
