"""The run-time of one denoiser: decides, call by call, between dense attention and a sparse kernel.

A `Session` belongs to one enabled model and to nothing else: no state is shared between models, so
two pipelines in two threads never meet. The state of a run (masks, cached log-sum-exp rows) is
dropped when a new run begins; an interrupted run leaves nothing behind.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from accel.choice import Choice
from accel.context import Where
from accel.errors import AccelError
from accel.geometry import Geometry, Site
from accel.kernels.arguments import DTYPES, MAX_DIM
from accel.kernels.attention import resolve_backend, resolve_precision, sparse_attention
from accel.kernels.block_mask import BlockMask
from accel.layout import Layout
from accel.masks import SiteMask, sampled_recall, site_mask
from accel.plan import Plan
from accel.records import Record, Stopwatch, phase_label
from accel.schedule import Phase

logger = logging.getLogger("accel")

Heads = Float[Tensor, "batch heads tokens dim"]
KeyHeads = Float[Tensor, "batch kv_heads kv_tokens dim"]
UNNAMED_CALLS = 3  # of one step at most: guidance in three directions
# Sees every dense call (site, run, q, k, v, out) and may put another output in its place.
Observer = Callable[[Site, "Run", Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(slots=True)
class Run:
    """What one generation keeps between steps. A fresh one replaces it when a run begins.

    where, layout: the last ones known; first_step, first_branches: where the run began.
    said: the last place as it was given; turns: calls of its step so far, by branch.
    """

    where: Where | None = None
    layout: Layout | None = None
    phase: Phase = field(default_factory=lambda: Phase(None, 0))
    reason: str | None = None
    masks: dict[Any, SiteMask] = field(default_factory=dict)
    full: dict[Any, BlockMask] = field(default_factory=dict)
    patterns: dict[Any, Tensor] = field(default_factory=dict)
    lse: dict[Any, dict[int, Tensor]] = field(default_factory=dict)
    recalls: dict[Any, Tensor] = field(default_factory=dict)
    first_step: int | None = None
    first_branches: set[str] = field(default_factory=set)
    said: Where | None = None
    turns: Counter[str] = field(default_factory=Counter)

    def take(self, where: Where) -> None:
        """Note `where`; the second call of a step under one name is the branch "name#2"."""
        if self.said is None or self.said.step != where.step:
            self.turns.clear()
        self.said = where
        self.turns[where.branch] += 1
        turn = self.turns[where.branch]
        self.where = where if turn == 1 else replace(where, branch=f"{where.branch}#{turn}")
        if self.first_step is None:
            self.first_step = where.step
        if where.step == self.first_step:
            self.first_branches.add(self.where.branch)

    def forget(self) -> None:
        """Let go of what was found in the queries and keys of earlier steps."""
        self.masks = {key: mask for key, mask in self.masks.items() if key[0] is None}
        self.lse.clear()
        self.recalls.clear()
        self.first_step = None
        self.first_branches.clear()


class Session:
    """One plan at work on one model.

    strict: anything that would quietly run dense is an error instead.
    """

    def __init__(self, plan: Plan, geometry: Geometry, *, strict: bool = False) -> None:
        self.plan = plan
        self.geometry = geometry
        self.strict = strict
        self.run = Run()
        self.records: dict[tuple[str, str], Record] = {}
        self.notices: Counter[str] = Counter()
        self.probe: Counter[str] | None = None
        self.observer: Observer | None = None

    @contextmanager
    def probing(self) -> Iterator[Counter[str]]:
        """While the context is open every site runs dense and is counted."""
        self.probe = Counter()
        try:
            yield self.probe
        finally:
            self.probe = None

    def begin(self, layout: Layout | None, where: Where | None) -> None:
        """Called at the start of every denoiser call."""
        if self.probe is not None:
            return  # a self-check belongs to no run
        if self._is_new_run(layout, where):
            self.run = Run()
            self.records.clear()
            self.notices.clear()
        elif where is not None and _leaps(self.run.said, where):
            self.run.forget()
        run = self.run
        run.layout, run.reason = layout or run.layout, None
        if where is not None:
            if run.said is None:
                self._look_for_sparse_steps(where.total)
            run.take(where)
        if where is None or (where.assumed and _stands_still(run.turns, where.branch)):
            run.phase = Phase(None, 0)
            self._runs_dense(
                "the step is unknown: call the model through its pipeline, or wrap the call in"
                " `with accel.step(i, n):`"
            )
            return
        run.phase = self.plan.schedule.phase(where.step, where.total)
        if layout is None:
            run.reason = "the layout of the call is unknown; pass layout= to accel.enable"

    def _look_for_sparse_steps(self, total: int) -> None:
        """A run too short for its schedule says so at its start."""
        schedule = self.plan.schedule
        if self.plan.wants_sparse and not schedule.sparse_steps(total):
            self._runs_dense(
                f"none of the run's {total} steps is sparse with schedule.dense_start"
                f" {schedule.dense_start} and dense_end {schedule.dense_end}; lower them, or take"
                " more steps"
            )

    def _is_new_run(self, layout: Layout | None, where: Where | None) -> bool:
        """Whether this call belongs to another generation than the one before it.

        The scheduler has other timesteps, the step went back, the number of steps or the layout
        changed, or, where no scheduler tells, the first step of a branch is said a second time (a
        run that was interrupted in its first step).
        """
        run, last = self.run, self.run.said
        if None not in (layout, run.layout) and layout != run.layout:
            return True
        if where is None or last is None:
            return False
        if where.run is not last.run or where.total != last.total or where.step < last.step:
            return True
        again = where.step == run.first_step and where.branch in run.first_branches
        # calls in one block of `accel.step` have one place between them: they are guidance
        return again and where.run is None and where is not last

    def attend(
        self,
        site: Site,
        q: Heads,
        k: KeyHeads,
        v: KeyHeads,
        dense: Callable[[], Heads],
        obstacle: str | None,
    ) -> Heads:
        """The output of one site.

        dense: the user's own attention, for dense phases; obstacle: what about this call no sparse
        kernel can do.
        """
        if self.probe is not None:
            self.probe[site.name] += 1
            return dense()
        run = self.run
        obstacle = _refusal(q, k, v) or obstacle
        choices = None
        if not run.phase.dense and run.phase.band is not None:
            choices = self._sparse_choices(site, run, q, k, obstacle)
        label = phase_label(run.phase.band)
        record = self.records.setdefault((site.name, label), Record())
        if choices is None:
            own = self.plan.dense == "kernel" and run.where is not None and obstacle is None
            watch = Stopwatch(record, q.device)
            if own:
                mask = self._full_mask(run, q, k)
                out = sparse_attention(q, k, v, mask, precision=self.plan.precision_of(site.name))
            else:
                out = dense()
            watch.stop()
            record.calls += 1
            record.keep += 1.0
            record.kernels.add(self._kernel(site, q) if own else "dense")
            if self.observer is not None:
                out = self.observer(site, run, q, k, v, out)
            return out
        chosen = self._mask(site, run, choices, q, k, v, record)
        watch = Stopwatch(record, q.device)
        out = sparse_attention(
            q,
            k,
            v,
            chosen.mask,
            rest=chosen.rest,
            order=chosen.order,
            kv_length=chosen.kv_length,
            precision=self.plan.precision_of(site.name),
        )
        watch.stop()
        looked = (site.name, run.where.branch if run.where else "", label, run.phase.generation)
        if looked not in run.recalls:
            run.recalls[looked] = sampled_recall(q, k, chosen)
            record.recall.append(run.recalls[looked])
        record.calls += 1
        record.keep += chosen.keep
        record.ratio = self._ratio(site, run, q)
        record.kernels.add(self._kernel(site, q))
        return out

    def _sparse_choices(
        self, site: Site, run: Run, q: Heads, k: KeyHeads, obstacle: str | None
    ) -> tuple[Choice, ...] | None:
        """The choices of a sparse call, or None where the call has to be dense."""
        assert run.phase.band is not None
        choices = self.plan.choices(site.name, run.phase.band)
        if choices is None or all(c.dense for c in choices):
            return None
        reason = run.reason or obstacle
        if reason is None and q.shape[2] != k.shape[2]:
            reason = f"{site.name} has {q.shape[2]} queries and {k.shape[2]} keys"
        if reason is None and run.layout is not None and run.layout.length != q.shape[2]:
            grids = " and ".join(map(str, run.layout.grids)) or "no grid"
            reason = (
                f"{site.name} has {q.shape[2]} tokens, but the layout ({grids}, with"
                f" {run.layout.text_tokens} of text) makes {run.layout.length}; pass layout= to"
                " accel.enable"
            )
        ratio = self._ratio(site, run, q)
        if reason is None and ratio is not None and ratio >= self.plan.dense_ratio(site.name):
            reason = f"dense attention is predicted to be faster at {site.name}"
        if reason is None:
            return choices
        self._runs_dense(reason)
        return None

    def _ratio(self, site: Site, run: Run, q: Heads) -> float | None:
        """The plan's prediction for this call, if it has one for calls like it."""
        assert run.phase.band is not None
        dtype = str(q.dtype).removeprefix("torch.")
        return self.plan.ratio(site.name, run.phase.band, q.shape[2], q.device.type, dtype)

    def _kernel(self, site: Site, q: Heads) -> str:
        """What the summary calls accel's kernel here; a precision below the model's is told."""
        backend, allowed = resolve_backend("auto", q.device), self.plan.precision_of(site.name)
        precision = resolve_precision(allowed, backend, q.dtype, q.device)
        return backend if precision == "full" else f"{backend} {precision}"

    def _full_mask(self, run: Run, q: Heads, k: KeyHeads) -> BlockMask:
        lengths = (q.shape[1], q.shape[2], k.shape[2])
        key = (lengths, q.device)
        if key not in run.full:
            run.full[key] = BlockMask.full(
                lengths[0],
                block=self.plan.block,
                q_length=lengths[1],
                kv_length=lengths[2],
                device=q.device,
            )
        return run.full[key]

    def _runs_dense(self, reason: str) -> None:
        """Say once, count always; in strict mode refuse."""
        if self.strict:
            raise AccelError(f"strict: {reason}")
        if not self.notices[reason]:
            logger.warning("accel runs dense: %s", reason)
        self.notices[reason] += 1

    def _mask(
        self,
        site: Site,
        run: Run,
        choices: tuple[Choice, ...],
        q: Heads,
        k: KeyHeads,
        v: KeyHeads,
        record: Record,
    ) -> SiteMask:
        assert run.layout is not None
        assert run.where is not None
        online = any(c.online for c in choices)
        # static masks are shared by all sites and branches with the same choices
        owner = (site.name, run.where.branch) if online else None
        generation = run.phase.generation if online else None
        key = (owner, choices, generation, q.shape[0] if online else None, q.device)
        chosen = run.masks.get(key)
        if chosen is None:
            if online:
                stale = [o for o in run.masks if o[0] == owner]
                for old in stale:
                    del run.masks[old]
            watch = Stopwatch(record, q.device, mask=True)
            rows = (owner, q.shape[0], q.device)
            lse = run.lse.pop(rows, {})
            if self.plan.schedule.looks_again(run.phase):
                run.lse[rows] = lse
            chosen = run.masks[key] = site_mask(
                choices,
                q,
                k,
                v,
                layout=run.layout,
                block=self.plan.block,
                lse=lse,
                patterns=run.patterns,
                precision=self.plan.precision_of(site.name),
            )
            watch.stop()
        return chosen


def _leaps(last: Where | None, where: Where) -> bool:
    """Whether steps were left out that no scheduler vouches for: it may be another run."""
    return last is not None and where.run is None and where.step > last.step + 1


def _stands_still(turns: Counter[str], branch: str) -> bool:
    """Whether a step has more calls than guidance makes: then nobody steps the scheduler."""
    return turns[branch] > (1 if branch else UNNAMED_CALLS)


def _refusal(*tensors: Tensor) -> str | None:
    """What about the tensors of a call no sparse kernel can do."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return "the call needs gradients, which the sparse kernels do not give"
    if tensors[0].dtype not in DTYPES:
        return f"the model computes in {tensors[0].dtype}, which the sparse kernels do not"
    if tensors[0].shape[-1] > MAX_DIM:
        return f"the head dim is {tensors[0].shape[-1]}; the sparse kernels take up to {MAX_DIM}"
    return None
