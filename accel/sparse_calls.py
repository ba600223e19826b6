"""The calls that a plan makes sparse: masks, accel's kernel, and outputs that heads take over.

Whether a call is one of them is decided before (`accel.router`).
"""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from accel.choice import Choice
from accel.geometry import Site
from accel.head_shares import Mine
from accel.judged_masks import judged_mask
from accel.kernels.attention import resolve_backend, resolve_precision, sparse_attention
from accel.layouts import Part, parts_of
from accel.masks import SiteMask
from accel.plan import Plan
from accel.records import Record, Stopwatch
from accel.run_state import Run
from accel.shared_calls import SharedCalls

__all__ = ["SparseCalls"]

Heads = Float[Tensor, "batch heads tokens dim"]
KeyHeads = Float[Tensor, "batch kv_heads kv_tokens dim"]


class SparseCalls:
    """Makes the sparse calls of a plan.

    shared: how calls are made that several ranks share; notice: counts what a mask was made dense
    for.
    """

    def __init__(self, plan: Plan, shared: SharedCalls, notice: Callable[[str], None]) -> None:
        self._plan, self._shared, self._notice = plan, shared, notice

    def __call__(
        self,
        site: Site,
        run: Run,
        choices: tuple[Choice, ...],
        record: Record,
        q: Heads,
        k: KeyHeads,
        v: KeyHeads,
    ) -> Heads | None:
        """The output of a sparse call; None where every head turns out to be dense."""
        assert run.where is not None
        stand_ins = run.outputs.stand_ins(choices, site.name, run.branch, q, v)
        if all(c.dense or h in stand_ins.dense for h, c in enumerate(choices)):
            return None
        found: tuple[Heads, Stopwatch] | None
        if len(stand_ins.given) == len(choices):
            found = torch.empty_like(q), Stopwatch(record, q.device)
        elif run.spread is not None:
            blocks = partial(self._blocks, site, run)
            found = self._shared.blocks(site, run, choices, stand_ins, record, q, k, v, blocks)
        else:
            found = self._blocks(site, run, choices, stand_ins.dense, record, q, k, v)
        if found is None:
            return None
        out, watch = found
        stand_ins.put(out)
        watch.stop()
        record.calls += 1
        whole = q if run.spread is None else run.spread.whole(q)
        record.ratio = self.ratio(site, run, whole)
        return out

    def _blocks(
        self,
        site: Site,
        run: Run,
        choices: tuple[Choice, ...],
        dense: tuple[int, ...],
        record: Record,
        q: Heads,
        k: KeyHeads,
        v: KeyHeads,
        mine: Mine | None = None,
    ) -> tuple[Heads, Stopwatch] | None:
        """What a kernel computes of a sparse call, and the watch that has begun with it; None where
        every head is dense.

        mine: the heads are those, of a site that ranks share; then there is always an output.
        """
        parts: list[tuple[Part, SiteMask]] = []
        for part in parts_of(run.here, q.device):
            of_part = (part.cut(q), part.cut(k), part.cut(v))
            chosen, weak = judged_mask(
                self._plan, run, site, part, choices, dense, record, *of_part, mine
            )
            if weak:
                self._notice(weak)
            if chosen is not None:
                parts.append((part, chosen))
            elif mine is None:
                return None
        if mine is not None and not mine.certain:
            self._shared.weigh(site, run, mine, [chosen for _, chosen in parts], q.device)
        watch = Stopwatch(record, q.device)
        out = None
        for part, chosen in parts:
            result = sparse_attention(
                part.cut(q),
                part.cut(k),
                part.cut(v),
                chosen.mask,
                rest=chosen.rest,
                order=chosen.order,
                kv_length=chosen.kv_length,
                precision=self._plan.precision_of(site.name),
            )
            record.kernels.add(self.kernel(site, q))
            record.keep += chosen.keep / len(parts)
            if result.shape == q.shape:
                out = result
            else:
                out = torch.empty_like(q) if out is None else out
                part.put(out, result)
        return torch.empty_like(q) if out is None else out, watch

    def ratio(self, site: Site, run: Run, q: Heads) -> float | None:
        """The plan's prediction for this call, if it has one for calls like it."""
        assert run.phase.band is not None
        dtype = str(q.dtype).removeprefix("torch.")
        return self._plan.ratio(site.name, run.phase.band, q.shape[2], q.device.type, dtype)

    def kernel(self, site: Site, q: Heads) -> str:
        """What the summary calls accel's kernel here; a precision below the model's is told."""
        backend, allowed = resolve_backend("auto", q.device), self._plan.precision_of(site.name)
        precision = resolve_precision(allowed, backend, q.dtype, q.device)
        return backend if precision == "full" else f"{backend} {precision}"
