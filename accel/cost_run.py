"""What a generation with a plan takes, step by step and site by site."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from accel.baseline import Baseline
from accel.choice import Choice
from accel.cost_choice import Heads, keep_of, looks, site_price, static_price
from accel.cost_table import CostTable
from accel.errors import AccelError
from accel.pattern import Share
from accel.plan import Plan
from accel.schedule import Phase

__all__ = ["RunCosts", "run_costs"]


class RunCosts(NamedTuple):
    """ratios: site -> band -> price of a sparse call with its part in the making of masks; seconds
    of the generation, and of the host's own dense one; share: of the latter in the sites.
    """

    ratios: dict[str, list[float]]
    seconds: float
    dense_seconds: float
    share: float
    steps: int


def run_costs(
    plan: Plan,
    tables: Mapping[str, CostTable],
    baseline: Baseline,
    steps: int | None,
    keeps: Mapping[Choice, float] | None,
) -> RunCosts | None:
    """The costs of `plan`, or None where a keep or the price of a selection is not known; see
    `accel.cost.predict`.
    """
    unknown = sorted(set(plan.sites) - set(baseline.share))
    if unknown:
        raise AccelError(
            f"the dense generation that times count from has no site {unknown[0]!r}; it is of"
            " another model: measure it again"
        )
    found = _keeps(plan, baseline, keeps)
    if found is None:
        return None
    steps = baseline.steps if steps is None else steps
    phases = [plan.schedule.phase(step, steps) for step in range(steps)]
    seconds = baseline.outside + steps * baseline.rest
    ratios: dict[str, list[float]] = {}
    static: dict[Heads, float] = {}  # seconds of masks that all sites share
    for site, dense_s in baseline.attention.items():
        table = tables[plan.precision_of(site)]
        dense = table.own_dense if plan.dense == "kernel" else 1.0
        bands = plan.sites.get(site)
        if bands is None:
            seconds += steps * dense_s * dense
            continue
        prices = _ratios(bands, phases, found, table, dense, baseline.branches)
        if prices is None:
            return None
        ratios[site] = prices
        for phase in phases:
            ratio = dense if phase.band is None else ratios[site][phase.band]
            seconds += dense_s * min(dense, ratio)
            # a call that is not faster than dense runs dense, and makes no mask
            if phase.band is not None and ratio < dense:
                heads = bands[phase.band]
                if not any(c.online for c in heads):
                    call_s = dense_s / baseline.branches
                    static.setdefault(heads, static_price(heads, table) * call_s)
    seconds += sum(static.values())
    dense_seconds = baseline.dense_seconds(steps)
    attention = steps * sum(baseline.attention.values())
    if baseline.calibration is not None:
        line = baseline.calibration
        attention *= line.scale
        seconds, dense_seconds = line.apply(seconds), line.apply(dense_seconds)
    return RunCosts(ratios, seconds, dense_seconds, min(1.0, attention / dense_seconds), steps)


def _keeps(
    plan: Plan, baseline: Baseline, keeps: Mapping[Choice, float] | None
) -> dict[Choice, float] | None:
    """What every choice of the plan keeps; None where one is not known."""
    found: dict[Choice, float] = {}
    for choice in {c for bands in plan.sites.values() for heads in bands for c in heads}:
        keep = None if keeps is None else keeps.get(choice)
        if keep is None:
            keep = keep_of(choice, baseline.layout, plan.block)
        if keep is None:
            return None
        found[choice] = keep
    return found


def _ratios(
    bands: Sequence[Heads],
    phases: Sequence[Phase],
    keeps: Mapping[Choice, float],
    table: CostTable,
    dense: float,
    branches: int,
) -> list[float] | None:
    """Of every band, the mean price of a call of one site; None where a selection has none."""
    found = []
    looked = looks(bands, phases, table)
    if looked is None:
        return None
    for band, (heads, masks) in enumerate(zip(bands, looked, strict=True)):
        calls = sum(phase.band == band for phase in phases)
        first = bool(calls) and phases[0].band == band
        shared = {
            choice: 1 / branches if choice.select.of == "branch" else first / max(1, calls)
            for choice in heads
            if isinstance(choice.select, Share)
        }
        price = site_price(heads, keeps, table, dense, shared)
        found.append(price + (masks / calls if calls else 0.0))
    return found
