"""The run-time of one denoiser: decides, call by call, between dense attention and a sparse kernel.

A `Session` belongs to one enabled model and to nothing else: no state is shared between models, so
two pipelines in two threads never meet. The state of a run (`accel.run_state`) is dropped when a
new run begins; an interrupted run leaves nothing behind.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from accel.choice import Choice
from accel.context import Where
from accel.errors import AccelError
from accel.geometry import Geometry, Site
from accel.guard import Kind, slower_than_dense, time_dense
from accel.layouts import Layouts, LayoutsLike
from accel.obstacles import misfit, missed, refusal, too_short, unexplained
from accel.own_dense import OwnDense
from accel.plan import Plan
from accel.ranks import Ranks
from accel.records import Record, Stopwatch, phase_label
from accel.run_state import Run
from accel.schedule import Phase
from accel.shared_calls import SharedCalls
from accel.sparse_calls import SparseCalls
from accel.text_calls import TextCalls
from accel.text_step import current

logger = logging.getLogger("accel")

Heads = Float[Tensor, "batch heads tokens dim"]
KeyHeads = Float[Tensor, "batch kv_heads kv_tokens dim"]
UNKNOWN = "the layout of the call is unknown; pass layout= to accel.enable"
Valid = Bool[Tensor, "batch kv_tokens"]
# Sees every dense call (site, run, q, k, v, out) and may put another output in its place.
Observer = Callable[[Site, Run, Tensor, Tensor, Tensor, Tensor], Tensor]


class Session:
    """One plan at work on one model.

    strict: anything that would quietly run dense is an error instead.
    guard: a site whose sparse calls are measured to be slower than its dense ones runs dense for
        the rest of the run (`accel.guard`). In a run without dense steps a few dense calls are made
        for their times alone.

    check_first_call: the first denoiser call runs dense, and everything runs dense after it unless
    it met every site once, with as many keys as queries (`unfit` says which not).
    shared: how calls are made that several ranks share.
    """

    def __init__(
        self, plan: Plan, geometry: Geometry, *, strict: bool = False, guard: bool = False
    ) -> None:
        self.plan = plan
        self.geometry = geometry
        self.strict = strict
        self.guard = guard
        self.run = Run()
        self.records: dict[tuple[str, str], Record] = {}
        self.notices: Counter[str] = Counter()
        self.probe: Counter[str] | None = None
        self.check_first_call = False
        self.unfit: str | None = None
        self.observer: Observer | None = None
        self.shared = SharedCalls(plan)
        self.text = TextCalls(plan)
        self._own_dense = OwnDense(plan)
        self._sparse = SparseCalls(plan, self.shared, self._notice)

    @contextmanager
    def probing(self) -> Iterator[Counter[str]]:
        """While the context is open every site runs dense and is counted, for no run."""
        self.probe, first = Counter(), self.check_first_call
        self.check_first_call = False
        try:
            yield self.probe
        finally:
            self.probe, self.check_first_call = None, first

    def begin(
        self, layout: Layouts | LayoutsLike | None, where: Where | None, why: str = UNKNOWN
    ) -> None:
        """Called at the start of every denoiser call; why: there is no layout."""
        if self.check_first_call:
            if self.probe is None:
                self.probe = Counter()
            else:
                self.unfit = missed(self.geometry, self.probe)
                self.probe, self.check_first_call = None, False
        if self.probe is not None:
            return  # a self-check belongs to no run
        layouts = None if layout is None else Layouts.of(layout)
        if self.run.ends_before(layouts, where):
            self._begin_run()
        elif where is not None and self.run.leaves_out_steps(where):
            self.run.forget()
        run = self.run
        run.begin(layouts)
        run.text = current()
        run.reason = None
        if where is not None:
            if run.said is None:
                self._look_for_sparse_steps(where)
            run.take(where)
        run.placed = where is not None and not (where.assumed and run.stands_still(where.branch))
        if where is None or not run.placed:
            run.phase = Phase(None, 0)
            self._runs_dense(
                "the step is unknown: call the model through its pipeline (one that shares it with"
                " another needs accel.enable too), or wrap the call in `with accel.step(i, n):`"
            )
            return
        run.phase = self.plan.schedule.at(where)
        run.then = self.plan.schedule.after(where)
        if layout is None or self.unfit:
            run.reason = self.unfit or why

    def rests(self, tokens: int, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether a whole run with so many tokens, and no cache, would be the host's own dense
        attention; then the run is begun and told about here, and the model may do it untaken.
        """
        watched = self.probe is not None or self.observer is not None or self.check_first_call
        other = self.plan.cache is not None or self.plan.dense != "host"
        short = self.plan.wants_sparse and too_short(self.plan, tokens, device, dtype)
        if watched or other or not short:
            return False
        self._begin_run()
        self._runs_dense(short)
        return True

    def _begin_run(self) -> None:
        self.run = Run()
        self.records.clear()
        self.shared.dealt.clear()
        self.notices.clear()

    def _look_for_sparse_steps(self, where: Where) -> None:
        """A run too short for its schedule says so at its start."""
        schedule = self.plan.schedule
        _, total = schedule.span(where)
        if self.plan.wants_sparse and not schedule.sparse_steps(total):
            self._runs_dense(
                f"none of the run's {total} steps is sparse with schedule.dense_start"
                f" {schedule.dense_start} and dense_end {schedule.dense_end}; lower them, or take"
                " more steps"
            )

    def attend(
        self,
        site: Site,
        q: Heads,
        k: KeyHeads,
        v: KeyHeads,
        dense: Callable[[], Heads],
        obstacle: str | None,
        valid: Valid | None = None,
        ranks: Ranks | None = None,
    ) -> Heads:
        """The output of one site.

        dense: the user's own attention, for dense phases; obstacle: what about this call no sparse
        kernel can do; valid: the keys that its attention mask leaves, where that is such a mask;
        ranks: that make the call together, each with a part of its tokens.
        """
        if self.probe is not None:
            said = current()
            beside = said is not None and said.beside != ""
            self.probe[site.name] += beside or q.shape[2] == k.shape[2]
            return dense()
        run = self.run
        if run.text is not None:
            how = (valid, dense, obstacle, partial(self._sparse.kernel, site, q))
            found = self.text.attend(site, run, run.text, self.records, q, k, v, *how)
            if found is not None:
                return found
        square = q.shape[2] == k.shape[2]
        if run.calls[site.name] and not square:
            return dense()  # after its self-attention a processor attends to an image (IP-Adapter)
        run.enter(site.name, q.shape[0], counts=square)
        obstacle = refusal(q, k, v) or obstacle
        choices = None
        whole = (q, k)
        run.spread = None
        if ranks is not None:
            if self.observer is not None:
                raise AccelError("a profile needs whole calls; make it where no ranks share them")
            run.spread = self.shared.spread(site, run, ranks, q, k)
        if run.spread is not None:
            whole = (run.spread.whole(q), run.spread.whole(k))
            obstacle = obstacle or run.spread.obstacle(run.here)
            if valid is not None and (site.name, run.branch) not in run.explained:
                valid = run.spread.gathered(valid)
        if not run.phase.dense and run.phase.band is not None:
            choices = self._sparse_choices(site, run, *whole, obstacle, valid)
        label = phase_label(run.phase.band)
        record = self.records.setdefault((site.name, label), Record())
        kernel = "dense"
        if self._own_dense.makes(site, run, whole[0], obstacle, valid):
            own = partial(self._own_dense, site, run, valid is not None)
            if run.spread is not None:
                own = partial(self.shared.dense, run, own)
            kernel, dense = self._sparse.kernel(site, q), partial(own, q, k, v)
        out = None
        if choices is not None:
            out = self._sparse(site, run, choices, record, q, k, v)
            if out is not None and self.guard and ranks is None:
                time_dense(run, site, self._kind(site, q, k), self.records, dense)
        out = self._dense(site, run, record, q, k, v, dense, kernel) if out is None else out
        if run.placed:
            self._keep(site, run, out)
        if run.text is not None and run.text.fills:
            self.text.fill(site, run, run.text, q, k, v)
        return out

    def _dense(
        self,
        site: Site,
        run: Run,
        record: Record,
        q: Heads,
        k: KeyHeads,
        v: KeyHeads,
        dense: Callable[[], Heads],
        kernel: str,
    ) -> Heads:
        """The output of a dense call, by `dense`, which the summary calls `kernel`."""
        watch = Stopwatch(record, q.device)
        out = dense()
        watch.stop()
        record.calls += 1
        record.keep += 1.0
        record.kernels.add(kernel)
        if self.observer is not None:
            out = self.observer(site, run, q, k, v, out)
        return out

    def _kind(self, site: Site, q: Heads, k: KeyHeads) -> Kind:
        own = self.plan.dense == "kernel"
        return Kind.of(q, k, self.plan.precision_of(site.name) if own else None)

    def _keep(self, site: Site, run: Run, out: Heads) -> None:
        """Keep of an output what later calls will take over."""
        choices = [
            () if phase.band is None else self.plan.choices(site.name, phase.band) or ()
            for phase in (run.phase, run.then)
        ]
        run.outputs.keep(site.name, run.branch, out, *choices)

    def _sparse_choices(
        self,
        site: Site,
        run: Run,
        q: Heads,
        k: KeyHeads,
        obstacle: str | None,
        valid: Valid | None,
    ) -> tuple[Choice, ...] | None:
        """The choices of a sparse call, or None where the call has to be dense."""
        assert run.phase.band is not None
        choices = self.plan.choices(site.name, run.phase.band)
        if choices is None or all(c.dense for c in choices):
            return None
        reason = run.reason or obstacle
        if reason is None and q.shape[2] != k.shape[2]:
            reason = f"{site.name} has {q.shape[2]} queries and {k.shape[2]} keys"
        reason = reason or misfit(site, run.here, q) or unexplained(site, run, valid)
        ratio = self._sparse.ratio(site, run, q)
        if reason is None and ratio is not None and ratio >= self.plan.dense_ratio(site.name):
            reason = f"dense attention is predicted to be faster at {site.name}"
        reason = reason or too_short(self.plan, q.shape[2], q.device, q.dtype)
        if reason is not None:
            self._runs_dense(reason)
            return None
        # ranks whose clocks differ would not come to the same
        guarded = self.guard and run.spread is None
        if guarded and self._is_off(site, run, choices, self._kind(site, q, k)):
            return None
        return choices

    def _is_off(self, site: Site, run: Run, choices: tuple[Choice, ...], kind: Kind) -> bool:
        """Whether the site is off for the rest of the run, since it was slower than dense."""
        if site.name not in run.off:
            found = slower_than_dense(self.plan.schedule, run, site, choices, self.records, kind)
            if found is None:
                return False
            run.off[site.name] = (
                f"sparse attention is slower than dense attention at {site.name} here, so it is off"
                " for the rest of the run"
            )
            logger.warning("accel: %s: %s", run.off[site.name], found)
        self._notice(run.off[site.name])
        return True

    def _runs_dense(self, reason: str) -> None:
        """Say once, count always; in strict mode refuse."""
        if self.strict:
            raise AccelError(f"strict: {reason}")
        if not self.notices[reason]:
            logger.warning("accel runs dense: %s", reason)
        self._notice(reason)

    def _notice(self, reason: str) -> None:
        """Count what the plan or its user asked to be made dense: no error in strict mode."""
        self.notices[reason] += 1
