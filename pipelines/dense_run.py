"""One dense generation with the denoiser and every site timed: what plans' times count from."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

from torch import Tensor, nn

from accel.baseline import Baseline
from accel.choice import DENSE
from accel.errors import AccelError
from accel.geometry import Geometry, Site
from accel.layouts import Layouts
from accel.pipelines.adapters import denoisers_of, geometry_of
from accel.pipelines.devices import execution_device
from accel.pipelines.enable import enabled, session_of
from accel.pipelines.host import Host
from accel.plan import Plan
from accel.records import Record, Stopwatch
from accel.router import Run

__all__ = ["dense_plan", "measure_baseline"]


def dense_plan(geometry: Geometry) -> Plan:
    """A plan under which every site runs the user's own dense attention, and is timed."""
    return Plan.uniform("dense", geometry, DENSE)


def measure_baseline(host: Host, prompt: str, seed: int) -> Baseline:
    """One dense generation after a short warm-up, with the denoiser and every site timed.

    Calls count by their median, so that one that the machine held up does not decide.
    """
    model = denoisers_of(host.pipe)[0]
    host.generate(prompt, seed, num_inference_steps=2)
    batches: set[int] = set()

    def observe(site: Site, run: Run, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
        batches.add(q.shape[0])
        return out

    with enabled(host.pipe, dense_plan(geometry_of(model))), _timed(model) as whole:
        session = session_of(model)
        session.observer = observe
        start = time.perf_counter()
        host.generate(prompt, seed)
        wall = time.perf_counter() - start
        attention = {site.name: 0.0 for site in session.geometry.sites}
        for (site, _), record in session.records.items():
            record.settle()
            attention[site] += median(record.seconds) * len(record.seconds)
        run = session.run
    whole.settle()
    if run.layouts == Layouts() or not run.layouts.longest.grids:
        raise AccelError("the layout of the model's call could not be read; see accel.enable")
    denoiser = median(whole.seconds) * len(whole.seconds)
    seconds = max(wall - sum(whole.seconds), 0.0) + denoiser
    return Baseline(
        seconds,
        {site: taken / seconds for site, taken in attention.items()},
        run.layouts.longest,
        len(run.first_branches),
        host.steps,
        batch=max(batches),
        denoiser=denoiser,
    )


@contextmanager
def _timed(model: nn.Module) -> Iterator[Record]:
    """While the context is open, the calls of a module are timed into the record."""
    record = Record()
    watches: list[Stopwatch] = []

    def before(module: nn.Module, args: Any) -> None:
        watches.append(Stopwatch(record, execution_device(module)))

    def after(module: nn.Module, args: Any, out: Any) -> None:
        watches.pop().stop()

    hooks = [model.register_forward_pre_hook(before), model.register_forward_hook(after)]
    try:
        yield record
    finally:
        for hook in hooks:
            hook.remove()
