"""What `accel.enable` takes for a plan: a `Plan`, a file, a recipe, a folder or a repository."""

import os
from pathlib import Path
from typing import Any

from torch import nn

from accel.errors import PlanError, nearest
from accel.geometry import Geometry
from accel.pipelines.adapters import sites_of
from accel.plan import Plan
from accel.plan_hub import looks_like_repository
from accel.recipes import RECIPES, recipe

__all__ = ["resolved"]


def resolved(plan: Any, model: nn.Module) -> Plan:
    """The plan that is meant, checked against the model. Raises PlanError."""
    geometry = Geometry(type(model).__name__, tuple(sites_of(model)))
    if isinstance(plan, str) and plan in RECIPES:
        plan = recipe(plan, geometry)
    elif isinstance(plan, (str, os.PathLike)):
        plan = _loaded(plan)
    if not isinstance(plan, Plan):
        raise PlanError(f"a plan is a Plan, a path, a recipe or a hub name, not {plan!r:.80}")
    return plan.check(geometry)


def _loaded(name: str | os.PathLike[str]) -> Plan:
    path = Path(name)
    if path.is_file() or (path.suffix == ".json" and not path.is_dir()):
        return Plan.load(path)
    if path.is_dir() or looks_like_repository(name):
        return Plan.from_pretrained(name)
    raise PlanError(
        f"there is no recipe and no plan file {str(name)!r}; {nearest(str(name), RECIPES)}"
    )
