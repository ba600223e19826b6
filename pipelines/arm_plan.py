"""The plans of an arm: how they come from a recipe, and what one says of itself."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from accel.cost import cost_sentence, dense_speedup
from accel.pipelines.adapters import by_denoiser, denoisers_of, geometry_of
from accel.pipelines.calibration import calibrated_recipe
from accel.pipelines.host import Host
from accel.pipelines.recipe_specs import RecipeSpec
from accel.plan import Plan
from accel.recipes import RECIPES, recipe


def recipe_plans(
    host: Host,
    name: str,
    folder: Path,
    precision: str = "",
    parameters: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Plan]:
    """The plan of a recipe for each denoiser, as `enable` takes them.

    One that chooses by a calibration is made by what is in `folder`, or calibrated there.
    precision: what it computes in where it does not say, "" for the model's own. parameters:
    override the method's defaults.
    """
    given = RecipeSpec(name, parameters).parameters
    models = denoisers_of(host.pipe)
    if RECIPES[name].demand is not None:
        plans = [calibrated_recipe(host, name, folder, **given)] * len(models)
    else:
        plans = [recipe(name, geometry_of(model), **given) for model in models]
    if precision:
        # what a recipe says itself of other precisions is the method's
        plans = [replace(p, precision=precision) if p.precision == "full" else p for p in plans]
    return by_denoiser(host.pipe, plans)


def origin_of_plan(plan: Plan) -> dict[str, Any] | None:
    """The grid and the number of steps that the plan was searched at; None where it has none."""
    made = plan.made_at
    if made.grid is None or made.steps is None:
        return None
    return {"grid": list(made.grid), "steps": made.steps}


def predictions_of(plan: Plan | None) -> dict[str, Any]:
    """Speed-ups over the host's dense that a priced plan expects: its own, and dense recipes'; and
    from what, in words.
    """
    found: dict[str, Any] = {
        "predicted_speedup": None,
        "predicted_dense": {},
        "predicted_from": None,
    }
    if plan is not None and "speedup" in plan.expected:
        found["predicted_speedup"] = plan.expected["speedup"]
        found["predicted_from"] = cost_sentence(plan.expected)
        for precision in plan.expected.get("dense_ratio", ()):
            found["predicted_dense"][precision] = dense_speedup(plan.expected, precision)
    return found


def steps_of_all(plan: Plan | None, steps: int) -> int:
    """At least `steps`: as many as a group of blocks needs for its cache to be filled and used."""
    cache = None if plan is None else plan.cache
    return steps if cache is None else max(steps, cache.delay + 3)
