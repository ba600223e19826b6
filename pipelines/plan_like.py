"""What `accel.enable` takes for a plan: a `Plan`, a file, a recipe, a folder or a repository."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from accel.errors import PlanError, nearest
from accel.geometry import Geometry
from accel.intercept_calls import CallInterception
from accel.intercept_interface import InterfaceInterception
from accel.pipelines.adapters import Adapter, adapter_of, sites_of
from accel.pipelines.token_blocks import TokenInterception
from accel.pipelines.window_blocks import WindowInterception
from accel.plan import Plan
from accel.plan_hub import looks_like_repository
from accel.recipes import RECIPES, recipe
from accel.schedule import Schedule

__all__ = ["resolved"]

# parts of a plan that only some kinds of interception look at
_TEXT = (InterfaceInterception, CallInterception)
_READ = {
    "windows": (WindowInterception,),
    "tokens": (TokenInterception,),
    "cache": _TEXT,
    "decoding": _TEXT,
}


def resolved(plan: Any, model: nn.Module) -> Plan:
    """The plan that is meant, checked against the model. Raises PlanError.

    A recipe for a model of which a call is a whole run is that of its first sparse step.
    """
    adapter = adapter_of(model)
    geometry = Geometry(type(model).__name__, tuple(sites_of(model)))
    if isinstance(plan, str) and plan in RECIPES:
        plan = recipe(plan, geometry)
        plan = _at_once(plan) if adapter.single else plan
    elif isinstance(plan, (str, os.PathLike)):
        plan = _loaded(plan)
    if not isinstance(plan, Plan):
        raise PlanError(f"a plan is a Plan, a path, a recipe or a hub name, not {plan!r:.80}")
    _refuse_parts(plan, adapter, geometry.model)
    schedule = plan.schedule
    for name in ("dense_start", "dense_end"):
        if adapter.single and 0 < getattr(schedule, name) < 1:
            raise PlanError(
                f"plan {plan.name!r} has {name} {getattr(schedule, name):g}, but one call of a"
                f" {geometry.model} is a whole run, of which no part is dense; give {name} 0"
            )
    return plan.check(geometry)


def _at_once(plan: Plan) -> Plan:
    """The plan with the choices of its first band, and no dense step before it."""
    sites = {site: bands[:1] for site, bands in plan.sites.items()}
    dense = plan.schedule.dense_start == 1
    return replace(plan, sites=sites, schedule=Schedule(dense_start=1.0 if dense else 0.0))


def _refuse_parts(plan: Plan, adapter: Adapter, model: str) -> None:
    """Refuse a plan with parts that nothing reads in such a model: windows of one without, caches
    of one that generates no text.
    """
    for part, interceptions in _READ.items():
        if getattr(plan, part) is not None and adapter.intercept not in interceptions:
            raise PlanError(
                f"plan {plan.name!r} has `{part}`, which does nothing in a {model};"
                f" leave `{part}` out"
            )


def _loaded(name: str | os.PathLike[str]) -> Plan:
    path = Path(name)
    if path.is_file() or (path.suffix == ".json" and not path.is_dir()):
        return Plan.load(path)
    if path.is_dir() or looks_like_repository(name):
        return Plan.from_pretrained(name)
    raise PlanError(
        f"there is no recipe and no plan file {str(name)!r}; {nearest(str(name), RECIPES)}"
    )
