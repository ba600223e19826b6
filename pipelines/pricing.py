"""What plans will cost here: one dense generation with timed sites, and tables of prices.

Both are kept in files, and measured anew where those are of another device, other versions or other
code, or broken. Where `hardware` is not this device they come from a folder that a run elsewhere
made, or from a data sheet.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from accel.baseline import Baseline
from accel.choice import Choice
from accel.cost import CostTable, Shape, fastest_dense, measure, price
from accel.cost_calibration import Pair, calibrated
from accel.estimators import Estimator
from accel.hardware import HERE, CostSource
from accel.layout import Layout
from accel.origin import Origin
from accel.pipelines.adapters import denoisers_of, geometry_of
from accel.pipelines.cost_files import (
    found_baseline,
    found_table,
    kept,
    read_baseline,
    save_baseline,
)
from accel.pipelines.dense_run import dense_plan, measure_baseline
from accel.pipelines.host import Host
from accel.pipelines.provenance import code_digest, device_name, versions
from accel.plan import Plan
from accel.roofline import roofline_baseline, roofline_table
from accel.schedule import Schedule

__all__ = [
    "Baseline",
    "calibrate",
    "cost_tables",
    "dense_plan",
    "load_or_measure_baseline",
    "load_or_measure_costs",
    "measure_baseline",
    "origin_of",
    "priced",
    "save_baseline",
    "warm_up_steps",
]


def origin_of(device: torch.device) -> Origin:
    """Where what is measured now comes from."""
    found = versions()
    return Origin(device_name(device), {n: found[n] for n in ("torch", "triton")}, code_digest())


def load_or_measure_baseline(
    host: Host, prompt: str, seed: int, path: Path, hardware: CostSource = HERE
) -> Baseline:
    """The baseline kept in `path`, or a new one, which is kept there.

    Of other hardware it is the one in its folder of tables, or what its data sheet makes of the
    one measured here.
    """
    here = origin_of(host.device)
    geometry = geometry_of(host.pipe)
    if hardware.table is not None and not Path(hardware.table).is_file():
        return found_baseline(hardware, geometry, host.steps, here)
    found = kept(path, read_baseline)
    made = found[0] if found is not None and found[1] == here else None
    if made is None:
        made = measure_baseline(host, prompt, seed)
        save_baseline(made, path, here)
    if hardware.hardware is None:
        return made
    model = denoisers_of(host.pipe)[0]
    parameters = sum(p.numel() for p in model.parameters())
    return roofline_baseline(made, geometry, parameters, host.config.dtype, hardware.hardware)


def calibrate(fitted: Sequence[Pair], held_out: Sequence[Pair], path: Path) -> Baseline:
    """The baseline kept in `path` with a line from predicted to measured seconds, kept there too.

    fitted, held_out: pairs of what `predict` said before there was a line, and what a generation
    took. Predictions follow the line from then on.
    """
    baseline, origin = read_baseline(path)
    made = replace(baseline, calibration=calibrated(fitted, held_out))
    save_baseline(made, path, origin)
    return made


def load_or_measure_costs(
    host: Host,
    layout: Layout,
    block: tuple[int, int],
    choices: Iterable[Choice],
    path: Path,
    rounds: int = 5,
    precision: str = "full",
    *,
    batch: int = 1,
    hardware: CostSource = HERE,
) -> CostTable:
    """The table kept in `path`; what it lacks of this shape and these estimators is measured.

    Of other hardware it is the one in its folder of tables, or computed from its data sheet.
    """
    site = geometry_of(host.pipe).sites[0]
    shape = Shape(
        tokens=layout.length,
        heads=site.heads,
        head_dim=site.head_dim,
        dtype=host.config.dtype,
        device=host.device.type,
        block=block,
        precision=precision,
        batch=batch,
    )
    wanted = {c.select.work: c.select for c in choices if isinstance(c.select, Estimator)}
    here = origin_of(host.device)
    if hardware.table is not None:
        return found_table(hardware, shape, wanted, here)
    if hardware.hardware is not None:
        shape = replace(shape, device="cuda")
        return roofline_table(shape, hardware.hardware, tuple(wanted.values()))
    known = kept(path, CostTable.load)
    if known is not None and (known.shape, known.origin) != (shape, here):
        known = None
    missing = [e for work, e in wanted.items() if known is None or work not in known.select]
    if known is not None and not missing:
        return known

    def progress(groups: Iterator[Any]) -> Iterator[Any]:
        return iter(tqdm(list(groups), desc="measuring costs", unit="group"))

    found = measure(
        shape,
        estimators=tuple(missing),
        layout=layout,
        rounds=rounds,
        known=known,
        origin=here,
        progress=progress,
    )
    found.save(path)
    return found


def cost_tables(
    host: Host,
    plan: Plan,
    baseline: Baseline,
    folder: Path,
    rounds: int = 5,
    *,
    hardware: CostSource = HERE,
) -> dict[str, CostTable]:
    """Precision -> table, for the block and the choices of a plan; kept in `folder`."""
    choices = {c for bands in plan.sites.values() for heads in bands for c in heads}
    return {
        word: load_or_measure_costs(
            host,
            baseline.layout,
            plan.block,
            choices,
            folder / f"costs-{plan.block[0]}x{plan.block[1]}-{word}.json",
            rounds,
            word,
            batch=baseline.batch,
            hardware=hardware,
        )
        for word in plan.precisions
    }


def priced(
    host: Host,
    plan: Plan,
    baseline: Baseline,
    folder: Path,
    rounds: int = 5,
    *,
    hardware: CostSource = HERE,
    keeps: Mapping[Choice, float] | None = None,
) -> Plan:
    """`plan` with its predicted time in `expected`, its dense calls on what is faster there.

    Tables of costs are kept in `folder`, one per block and precision.
    """
    tables = cost_tables(host, plan, baseline, folder, rounds, hardware=hardware)
    return price(fastest_dense(plan, tables), tables, baseline, keeps=keeps)


def warm_up_steps(schedule: Schedule, limit: int) -> int:
    """The fewest steps, at least two, in which every band that a run of `limit` steps has is met;
    two for a schedule without any.
    """

    def bands(steps: int) -> set[int]:
        found = (schedule.phase(step, steps).band for step in range(steps))
        return {band for band in found if band is not None}

    return next((n for n in range(2, limit + 1) if bands(n) >= bands(limit)), 2)
