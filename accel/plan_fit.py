"""Whether a plan is one for a model: every departure is an error that names the field."""

from collections.abc import Mapping
from typing import Any

from accel.errors import PlanError, nearest
from accel.geometry import Geometry

__all__ = ["check_fit"]


def check_fit(plan: Any, target: Geometry) -> None:
    """Refuse a `Plan` that is not for the model that `target` describes."""
    if plan.model != target.model:
        raise PlanError(
            f"plan {plan.name!r}: model is {plan.model!r}, but this is a {target.model!r};"
            " make a plan for this model with accel-search"
        )
    if plan.n_sites != len(target.sites):
        raise PlanError(
            f"plan {plan.name!r}: n_sites is {plan.n_sites}, but the model has"
            f" {len(target.sites)} sites; make a plan for this model with accel-search"
        )
    names = [s.name for s in target.sites]
    for site, bands in plan.sites.items():
        if site not in names:
            raise PlanError(
                f"plan {plan.name!r}: sites has {site!r}, which the model does not have;"
                f" {nearest(site, names, 12)}"
            )
        heads = target.site(site).heads
        if len(bands[0]) != heads:
            raise PlanError(
                f"plan {plan.name!r}: sites[{site!r}] is for {len(bands[0])} heads, the model"
                f" has {heads}"
            )
    named = {
        "precision": plan.precision if isinstance(plan.precision, Mapping) else (),
        "windows.keeps": () if plan.windows is None else plan.windows.keeps,
        "tokens.keeps": () if plan.tokens is None else plan.tokens.keeps,
    }
    for field_, keys in named.items():
        for site in keys:
            if site not in names:
                raise PlanError(
                    f"plan {plan.name!r}: {field_} has {site!r}, which the model does not"
                    f" have; {nearest(site, names, 12)}"
                )
    if plan.tokens is not None:
        plan.tokens.check(names)
    if plan.head_dim != target.sites[0].head_dim:
        raise PlanError(
            f"plan {plan.name!r}: head_dim is {plan.head_dim}, the model's is"
            f" {target.sites[0].head_dim}"
        )
