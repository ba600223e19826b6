"""Attention maps of a few heads, and the blocks that a plan keeps of them.

The generation is dense up to the step that is looked at, so that the maps are those of the model
itself. Masks are made where the plan would make them: at the first sparse step, at every new band
and at every refresh. A map is the mean attention between cells of tokens, in the order of the head.
"""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from accel.choice import DENSE
from accel.files import write_atomically
from accel.geometry import Site
from accel.kernels.block_mass import block_mass
from accel.masks import SiteMask, sampled_recall, site_mask
from accel.pipelines.adapters import by_denoiser, denoisers_of
from accel.pipelines.enable import disable, enable, session_of
from accel.pipelines.host import Host
from accel.plan import Plan
from accel.router import Run
from accel.schedule import Phase, Schedule

MAX_SITES, MAX_HEADS = 3, 4
MAX_CELLS = 160  # per side of a map, as far as the blocks of the plan allow


class _Seen(Exception):
    """Ends a generation whose wanted step is over."""


def look(host: Host, plans: list[Plan], prompt: str, seed: int, path: Path) -> dict[str, Any]:
    """Write the maps of up to 3 sites with 4 heads each to `path` (npz); says what was looked at.

    Step: the middle of the sparse ones; branch: the conditional one. Of a pipeline with two
    denoisers, the one that is at work in that step.
    """
    schedule = plans[0].schedule
    at, making = looked_at(schedule, host.steps)
    if at is None:
        return {"step": None, "maps": []}
    observers = [_Observer(plan, at, making) for plan in plans]
    dense = [
        replace(plan, schedule=replace(plan.schedule, dense_start=1.0, dense_end=0.0))
        for plan in plans
    ]
    disable(host.pipe)
    try:
        enable(host.pipe, by_denoiser(host.pipe, dense))
        for model, observer in zip(denoisers_of(host.pipe), observers, strict=True):
            session_of(model).observer = observer
        host.generate(prompt, seed, callback_on_step_end=_stop_after(at))
    except _Seen:
        pass
    finally:
        disable(host.pipe)
        enable(host.pipe, by_denoiser(host.pipe, plans), check=False, guard=False)
    maps = [one for observer in observers for one in observer.maps]
    buffer = io.BytesIO()
    arrays = {f"{key}-{i}": one.pop(key) for i, one in enumerate(maps) for key in ("mass", "keep")}
    np.savez_compressed(buffer, **arrays)
    write_atomically(path, buffer.getvalue())
    return {"step": at, "steps": host.steps, "prompt": prompt, "maps": maps}


def looked_at(schedule: Schedule, steps: int) -> tuple[int | None, frozenset[int]]:
    """The middle sparse step (None without one), and the steps up to it at which masks are made."""
    sparse = [s for s in range(steps) if not schedule.phase(s, steps).dense]
    if not sparse:
        return None, frozenset()
    at = sparse[len(sparse) // 2]
    making, last = [], None
    for step in sparse[: sparse.index(at) + 1]:
        phase = schedule.phase(step, steps)
        if phase != last:
            making.append(step)
        last = phase
    return at, frozenset(making)


def _stop_after(at: int) -> Any:
    def stop(pipe: Any, step: int, timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
        if step >= at:
            raise _Seen
        return state

    return stop


class _Observer:
    """Follows one denoiser: makes masks where the plan would, and draws maps at step `at`."""

    def __init__(self, plan: Plan, at: int, making: frozenset[int]) -> None:
        self._plan = plan
        self._at = at
        self._making = making
        self._wanted = _spread(list(plan.sites), MAX_SITES)
        self._masks: dict[str, SiteMask] = {}
        self._lse: dict[str, dict[int, Tensor]] = {}
        self.maps: list[dict[str, Any]] = []

    def __call__(
        self, site: Site, run: Run, q: Tensor, k: Tensor, v: Tensor, out: Tensor
    ) -> Tensor:
        where, layout = run.where, run.layout
        if where is None or layout is None or where.branch == "uncond":
            return out
        if where.step not in self._making | {self._at}:
            return out
        q, k, v = q[-1:], k[-1:], v[-1:]
        phase: Phase = self._plan.schedule.phase(where.step, where.total)
        choices = self._plan.choices(site.name, phase.band or 0) or (DENSE,) * site.heads
        if where.step in self._making:
            self._masks[site.name] = site_mask(
                choices,
                q,
                k,
                v,
                layout=layout,
                block=self._plan.block,
                lse=self._lse.setdefault(site.name, {}),
            )
        if where.step == self._at and site.name in self._wanted:
            self._draw(site, choices, q, k)
        return out

    def _draw(self, site: Site, choices: tuple[Any, ...], q: Tensor, k: Tensor) -> None:
        chosen = self._masks[site.name]
        recall = sampled_recall(q, k, chosen)
        keep = chosen.mask.to_dense()[0]
        q_block, kv_block = chosen.mask.block
        cell = (_cell(q.shape[2], q_block), _cell(q.shape[2], kv_block))
        mass, _ = block_mass(q, k, block=cell, order=chosen.order)
        for head in _spread(list(range(site.heads)), MAX_HEADS):
            self.maps.append(
                {
                    "site": site.name,
                    "head": head,
                    "choice": choices[head].name,
                    "tokens": q.shape[2],
                    "cell": cell,
                    "block": chosen.mask.block,
                    "recall": float(recall[head]),
                    "mass": (mass[0, head] / (cell[0] * cell[1])).cpu().numpy(),
                    "keep": keep[head].cpu().numpy(),
                }
            )


def _cell(tokens: int, block: int) -> int:
    """A power of two, at most the block's side and at least 16, for about MAX_CELLS cells."""
    cell = block
    while cell > 16 and tokens / cell < MAX_CELLS / 2:
        cell //= 2
    return cell


def _spread(items: list[Any], count: int) -> list[Any]:
    """At most `count` of the items, evenly spaced, the first and the last among them."""
    if len(items) <= count:
        return items
    return [items[i] for i in np.linspace(0, len(items) - 1, count).round().astype(int)]
