"""Whether what was measured of a run still speaks for its sparse calls.

Two questions: which heads of a new mask miss too much of the softmax mass, and whether the sparse
calls of a site take longer than its dense ones. The second is asked of times that are there
already: on a GPU only events that have passed count, and nothing waits. Where a run has no dense
steps, or too few to judge by, FEW dense calls are made beside the first sparse ones for the sake of
their times, once for all sites of a kind. A short run (SHORT, of a distilled model) would be over
before any site has calls enough, so there sites that are alike are judged together.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median, median_low
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from accel.choice import Choice
from accel.geometry import Site
from accel.pattern import Skip
from accel.records import DENSE_LABEL, Record, Stopwatch, phase_label
from accel.run_state import Run
from accel.schedule import Schedule

MARGIN = 1.1  # a site is slower when its sparse call takes longer than a dense one by this factor
FEW = 3  # measured calls of either kind, below which nothing is said
SHORT = 8  # steps of a run, up to which sites that are alike are judged together
LEAST_S = 2e-4  # dense calls shorter than this are not worth the question


def weak_heads(
    recall: Float[Tensor, " heads"], floor: float, choices: Sequence[Choice]
) -> tuple[int, ...]:
    """Heads whose recall is under `floor`. Waits for the device.

    Heads that keep no block on purpose have none to lose.
    """
    return tuple(
        head
        for head, (share, choice) in enumerate(zip(recall.tolist(), choices, strict=True))
        if share < floor and not isinstance(choice.select, Skip)
    )


def is_slower(dense: Sequence[float], sparse: Sequence[float], more: float = 0.0) -> bool:
    """Whether sparse calls are slower than dense ones beyond what noise explains.

    dense, sparse: seconds of calls, at least FEW of each; more: seconds that a sparse call pays
    besides, its part in the making of masks. The median sparse call has to take MARGIN times the
    median dense one: a call that compiles does not decide. And the fastest sparse call has to take
    longer than the fastest dense one: other work on the machine only ever adds time, so a burst of
    it does not decide either.
    """
    if min(len(dense), len(sparse)) < FEW or median(dense) < LEAST_S:
        return False
    slower = median(sparse) + more > MARGIN * median(dense)
    return slower and min(sparse) + more > min(dense)


class Kind(NamedTuple):
    """What the time of a dense call depends on: sites that agree in it are of one kind.

    precision: of accel's own kernel where that makes the dense calls, None where the host does.
    """

    q_shape: torch.Size
    k_shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    precision: str | None

    @classmethod
    def of(cls, q: Tensor, k: Tensor, precision: str | None) -> "Kind":
        return cls(q.shape, k.shape, q.dtype, q.device, precision)


def time_dense(
    run: Run,
    site: Site,
    kind: Kind,
    records: Mapping[tuple[str, str], Record],
    dense: Callable[[], Tensor],
) -> None:
    """Make a dense call for its time alone, where neither site nor kind have FEW of them yet.

    One beside a sparse call, so that a burst of other work meets both.
    """
    own = records.get((site.name, DENSE_LABEL))
    if own is not None and own.calls >= FEW:
        return
    alike = run.dense_alike.setdefault(kind, Record())
    if alike.calls >= FEW:
        return
    alike.calls += 1
    watch = Stopwatch(alike, kind.device)
    dense()
    watch.stop()


def slower_than_dense(
    schedule: Schedule,
    run: Run,
    site: Site,
    choices: Sequence[Choice],
    records: Mapping[tuple[str, str], Record],
    kind: Kind,
) -> str | None:
    """What was measured, where the sparse calls of a site are slower than its dense ones.

    Each band is judged by its own calls, as they stand; by the dense calls of the site where it has
    FEW of them, else by those that were timed for all sites of its kind (`time_dense`). In a short
    run the sparse calls of all sites of the kind with the same choices count.
    """
    assert run.where is not None
    label = phase_label(run.phase.band)
    names = [site.name]
    if run.where.total <= SHORT:
        alike = run.sparse_alike.setdefault((kind, tuple(choices), label), {})
        alike.setdefault(site.name, None)
        # calls of one that was turned off are dense ones by now
        if any(alike.values()):
            return next(filter(None, alike.values()))
        names = list(alike)
    dense = records.get((site.name, DENSE_LABEL))
    if dense is None or dense.calls < FEW:
        dense = run.dense_alike.get(kind)
    judged = [records[name, label] for name in names if (name, label) in records]
    if dense is None or not judged:
        return None
    for record in (dense, *judged):
        record.settle(wait=False)
    sparse = [s for record in judged for s in record.seconds]
    own = records.get((site.name, label), judged[0])
    masks = _masks_per_call(schedule, run, own)
    more = _look_seconds(own, records.values(), masks)
    # masks of patterns alone are made once for all sites: no site pays for them
    if any(c.online for c in choices):
        more += _making_seconds(own, records.values(), masks)
    if not is_slower(dense.seconds, sparse, more):
        return None
    took, would = ((1000 * s) for s in (median(sparse) + more, median(dense.seconds)))
    found = (
        f"{took:.2f} ms with masks against {would:.2f} ms, medians of {len(sparse)} and"
        f" {len(dense.seconds)} calls"
    )
    if run.where.total <= SHORT:
        alike[site.name] = found
    return found


def _making_seconds(own: Record, records: Iterable[Record], masks_per_call: float) -> float:
    """What a sparse call pays for its masks and for its look at their drift."""
    drift = median(own.check_seconds) if own.check_seconds else 0.0
    every = [s for record in records for s in record.mask_seconds]
    return drift + masks_per_call * _typical(own.mask_seconds, every)


def _look_seconds(own: Record, records: Iterable[Record], masks_per_call: float) -> float:
    """What a sparse call pays for the look at the recall of its masks, one for each of them."""
    every = [s for record in records for s in record.recall_seconds]
    return masks_per_call * _typical(own.recall_seconds, every)


def _typical(own: Sequence[float], every: Sequence[float]) -> float:
    """The median of the site's or of all sites', whichever is lower: a site may have a single one,
    which compiled.
    """
    return min(median_low(own), median_low(every)) if own else 0.0


def _masks_per_call(schedule: Schedule, run: Run, sparse: Record) -> float:
    """Masks over calls of the band that is running: by the schedule, or more where drift made more.

    A mask is spread over all calls that it serves, those to come among them.
    """
    assert run.where is not None
    assert run.phase.band is not None
    steps = schedule.steps_of(run.phase.band, schedule.span(run.where)[1])
    looks: float = len(set(steps))
    if schedule.drift is not None:
        looks = max(looks, len(sparse.mask_seconds) / (run.outputs.calls_before or 1))
    return looks / len(steps)
