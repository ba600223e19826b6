"""What plans will cost here: one dense generation with timed sites, and a table of prices."""

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from accel.choice import DENSE, Choice
from accel.cost import CostTable, Shape, fastest_dense, measure, price
from accel.errors import AccelError
from accel.estimators import Estimator
from accel.files import write_atomically
from accel.geometry import Geometry
from accel.layout import Layout
from accel.pipelines.adapters import denoisers_of, geometry_of
from accel.pipelines.enable import enabled, session_of
from accel.pipelines.host import Host
from accel.plan import Plan
from accel.schedule import Schedule


@dataclass(frozen=True, slots=True)
class Baseline:
    """A dense generation: its seconds, the part of them in each site, its layout and branches."""

    seconds: float
    share: dict[str, float]
    layout: Layout
    branches: int
    steps: int

    @property
    def total_share(self) -> float:
        return sum(self.share.values())


def dense_plan(geometry: Geometry) -> Plan:
    """A plan under which every site runs the user's own dense attention, and is timed."""
    return Plan.uniform("dense", geometry, DENSE)


def measure_baseline(host: Host, prompt: str, seed: int) -> Baseline:
    """One dense generation after a short warm-up, with every site's attention timed."""
    model = denoisers_of(host.pipe)[0]
    host.generate(prompt, seed, num_inference_steps=2)
    with enabled(host.pipe, dense_plan(geometry_of(model))):
        start = time.perf_counter()
        host.generate(prompt, seed)
        seconds = time.perf_counter() - start
        session = session_of(model)
        share = {site.name: 0.0 for site in session.geometry.sites}
        for (site, _), record in session.records.items():
            record.settle()
            share[site] += sum(record.seconds) / seconds
        run = session.run
    if run.layout is None or not run.layout.grids:
        raise AccelError("the layout of the model's call could not be read; see accel.enable")
    return Baseline(seconds, share, run.layout, len(run.first_branches), host.steps)


def load_or_measure_baseline(host: Host, prompt: str, seed: int, path: Path) -> Baseline:
    """The baseline kept in `path`, or a new one, which is kept there."""
    if path.is_file():
        data = json.loads(path.read_text())
        return Baseline(layout=Layout.of(tuple(data.pop("grid"))), **data)
    made = measure_baseline(host, prompt, seed)
    data = asdict(made)
    data.pop("layout")
    write_atomically(path, json.dumps({**data, "grid": made.layout.grid}))
    return made


def load_or_measure_costs(
    host: Host,
    layout: Layout,
    block: tuple[int, int],
    choices: Iterable[Choice],
    path: Path,
    rounds: int = 5,
    precision: str = "full",
) -> CostTable:
    """The table kept in `path`; what it lacks of this shape and these estimators is measured."""
    site = geometry_of(host.pipe).sites[0]
    shape = Shape(
        tokens=layout.length,
        heads=site.heads,
        head_dim=site.head_dim,
        dtype=host.config.dtype,
        device=host.device.type,
        block=block,
        precision=precision,
    )
    wanted = {c.select.work: c.select for c in choices if isinstance(c.select, Estimator)}
    known = CostTable.load(path) if path.is_file() else None
    if known is not None and known.shape != shape:
        known = None
    missing = [e for work, e in wanted.items() if known is None or work not in known.select]
    if known is not None and not missing:
        return known

    def progress(jobs: Iterator[Any]) -> Iterator[Any]:
        return iter(tqdm(list(jobs), desc="measuring costs", unit="price"))

    table = measure(
        shape,
        estimators=tuple(missing),
        layout=layout,
        rounds=rounds,
        known=known,
        progress=progress,
    )
    table.save(path)
    return table


def priced(host: Host, plan: Plan, baseline: Baseline, folder: Path, rounds: int = 5) -> Plan:
    """`plan` with its predicted time in `expected`, its dense calls on what is faster here.

    Tables of costs are kept in `folder`, one per block and precision.
    """
    choices = {c for bands in plan.sites.values() for heads in bands for c in heads}
    tables = {}
    for word in plan.precisions:
        path = folder / f"costs-{plan.block[0]}x{plan.block[1]}-{word}.json"
        tables[word] = load_or_measure_costs(
            host, baseline.layout, plan.block, choices, path, rounds, word
        )
    return price(
        fastest_dense(plan, tables),
        tables,
        layout=baseline.layout,
        steps=baseline.steps,
        share=baseline.total_share,
    )


def warm_up_steps(schedule: Schedule, limit: int) -> int:
    """The fewest steps, at least two, of which one is sparse; two for a schedule without any."""
    for steps in range(2, limit + 1):
        if any(not schedule.phase(step, steps).dense for step in range(steps)):
            return steps
    return 2
