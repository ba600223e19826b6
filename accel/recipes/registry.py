"""The registry of recipes: published methods, each a function from a model's geometry to a plan.

Some methods decide by formula, or while the model runs: they need the geometry alone. Others choose
per site, head and step band by what they saw of the model beforehand; such a recipe says with a
`Demand` what has to be calibrated, and takes the `Profile` that came of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any

from accel.choice import Choice
from accel.errors import PlanError, nearest
from accel.geometry import Geometry
from accel.plan import Plan
from accel.profile import Profile
from accel.schedule import Schedule


@dataclass(frozen=True, slots=True)
class Demand:
    """What a recipe has to see before it can choose: these candidates, in the bands of `schedule`,
    selected in blocks of `block`.

    precision: in which the run goes on with candidates; see `sparse_attention`.
    orders: of which the statistics of the attention map are wanted (`accel.map_statistics`).
    precisions: of which the error of dense attention is wanted.
    mass: the weight by which `best_orders` finds the order of each head in which its block mass is
        wanted; None for no mass.
    tolerance: error of a site that the run goes on with, by the cheapest candidates as far as it
        allows, so that later layers and steps see what has built up (DiTFastAttnV2, arXiv
        2503.22796); at 0 the run goes on dense.
    """

    candidates: tuple[Choice, ...]
    schedule: Schedule
    block: tuple[int, int]
    precision: str = "full"
    orders: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    mass: float | None = None
    tolerance: float = 0.0

    @property
    def asked(self) -> dict[str, Any]:
        """What a profile is of besides its rows, as JSON has it. A tolerance is no part of it: it
        steers how the run went on, and errors found with another one are errors of these rows.
        """
        return {
            "block": list(self.block),
            "schedule": self.schedule.to_dict(),
            "precision": self.precision,
            "mass": self.mass,
        }

    def check(self, profile: Profile, geometry: Geometry) -> None:
        """Refuse, naming what is missing, a profile of something else than what was asked."""
        for what in ("candidates", "orders", "precisions"):
            if getattr(profile, what) != getattr(self, what):
                raise PlanError(
                    f"the profile was calibrated for other {what} than the recipe chooses from;"
                    " calibrate with the recipe's own parameters"
                )
        for site in geometry.sites:
            bands = profile.bands(site.name)
            if bands != list(range(self.schedule.n_bands)):
                raise PlanError(
                    f"the profile knows bands {bands} of {site.name!r}, the recipe asks for"
                    f" {self.schedule.n_bands}; calibrate with the recipe's own parameters, and"
                    " with steps enough for every band"
                )
        for name, wanted in self.asked.items():
            if name not in profile.asked:
                raise PlanError(
                    f"the profile does not say for which {name} it was calibrated; calibrate again"
                )
            if profile.asked[name] != wanted:
                raise PlanError(
                    f"the profile was calibrated for {name} {profile.asked[name]!r:.200}, the"
                    f" recipe asks for {wanted!r:.200}; calibrate with the recipe's own parameters"
                )


@dataclass(frozen=True, slots=True)
class Recipe:
    """A published method.

    plan: (geometry, **parameters), or (geometry, profile, **parameters) of one with a demand.
    demand: (geometry, **those of the parameters that it names), which all have their defaults from
        the plan; None for a method that needs no calibration.
    frames, text, vision: what kinds of model it is for: those that generate frames (images too)
        or texts, and those that see images.
    """

    plan: Callable[..., Plan]
    demand: Callable[..., Demand] | None = None
    frames: bool = True
    text: bool = False
    vision: bool = False


RECIPES: dict[str, Recipe] = {}


def published(
    function: Callable[..., Plan] | None = None,
    *,
    demand: Callable[..., Demand] | None = None,
    frames: bool = True,
    text: bool = False,
    vision: bool = False,
) -> Callable[..., Any]:
    """Decorator: the recipe is called like its function."""

    def add(function: Callable[..., Plan]) -> Callable[..., Plan]:
        if function.__name__ in RECIPES:
            raise ValueError(f"there is a recipe {function.__name__!r} already")
        RECIPES[function.__name__] = Recipe(function, demand, frames, text, vision)
        return function

    return add if function is None else add(function)


def recipe(
    name: str, geometry: Geometry, profile: Profile | None = None, **parameters: Any
) -> Plan:
    """The plan of recipe `name` for a model; parameters override the method's defaults.

    profile: what was calibrated for it, where the method has a demand.
    """
    found = _known(name)
    if found.demand is not None and profile is None:
        raise PlanError(
            f"recipe {name!r} chooses by a calibration of the model; make its plan with"
            f" accel-search recipe={name}"
        )
    asked = demand(name, geometry, **parameters)
    if asked is None:
        return _checked(name, lambda: found.plan(geometry, **parameters))
    assert profile is not None
    asked.check(profile, geometry)
    return _checked(name, lambda: found.plan(geometry, profile, **parameters))


def demand(name: str, geometry: Geometry, **parameters: Any) -> Demand | None:
    """What recipe `name` has to see of a model; None for one that needs no calibration."""
    found = _known(name)
    asked = found.demand
    if asked is None:
        return None

    def make() -> Demand:
        given = signature(found.plan).bind(geometry, None, **parameters)
        given.apply_defaults()
        read = list(signature(asked).parameters)[1:]
        return asked(geometry, **{name: given.arguments[name] for name in read})

    return _checked(name, make)


def _known(name: str) -> Recipe:
    if name not in RECIPES:
        raise PlanError(f"there is no recipe {name!r}; {nearest(name, RECIPES)}")
    return RECIPES[name]


def _checked(name: str, make: Callable[[], Any]) -> Any:
    """What `make` gives; bad parameters are errors of the recipe that has them."""
    try:
        return make()
    except PlanError:
        raise
    except (TypeError, ValueError) as error:
        raise PlanError(f"recipe {name!r}: {error}") from error


def behind(dense_sites: int, geometry: Geometry, choice: Choice) -> dict[str, Any]:
    """The choice for every head of all sites but the first so many, in one band."""
    if not 0 <= dense_sites < len(geometry.sites):
        raise PlanError(
            f"dense_sites is {dense_sites}; the model has {len(geometry.sites)} sites, and one at"
            " least has to be sparse"
        )
    return {s.name: ((choice,) * s.heads,) for s in geometry.sites[dense_sites:]}
