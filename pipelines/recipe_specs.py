"""Recipes as arms of a comparison: by their names, or by names of their own with parameters."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import Parameter, signature
from types import MappingProxyType
from typing import Any

from accel.errors import AccelError, PlanError, nearest
from accel.recipes import RECIPES, Recipe

__all__ = ["OWN_DENSE", "RecipeSpec", "named_recipes"]

HALF = "half"
# recipes that leave nothing out, called like the precision they compute in
OWN_DENSE = ("full", HALF)


@dataclass(frozen=True, slots=True)
class RecipeSpec:
    """A recipe with the parameters in which it departs from its paper's."""

    recipe: str
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            raise PlanError(
                f"there is no recipe {self.recipe!r}; {nearest(self.recipe, [*RECIPES, 'all'])}"
            )
        known = parameters_of(self.recipe)
        for name in self.parameters:
            if name not in known:
                raise PlanError(
                    f"recipe {self.recipe!r} has no parameter {name!r}; {nearest(str(name), known)}"
                )
        plain = {k: tuple(v) if isinstance(v, list) else v for k, v in self.parameters.items()}
        object.__setattr__(self, "parameters", MappingProxyType(plain))

    @classmethod
    def of(cls, what: Any) -> "RecipeSpec":
        """From a configuration: a name, or {recipe: name, parameter: value, ...}."""
        if isinstance(what, RecipeSpec):
            return what
        if isinstance(what, str):
            return cls(what)
        if isinstance(what, Mapping) and isinstance(what.get("recipe"), str):
            return cls(what["recipe"], {k: v for k, v in what.items() if k != "recipe"})
        raise AccelError(
            f"a recipe is a name or {{recipe: name, parameter: value}}, not {what!r:.80}"
        )

    @property
    def identity(self) -> str:
        """Names the recipe, and what its parameters are where they are given."""
        given = json.dumps(dict(self.parameters), sort_keys=True)
        return self.recipe if not self.parameters else f"{self.recipe} {given}"


def parameters_of(recipe: str) -> list[str]:
    """What can be set of a recipe."""
    found = signature(RECIPES[recipe].plan).parameters.values()
    return [p.name for p in found if p.kind is Parameter.KEYWORD_ONLY]


def named_recipes(
    recipes: Mapping[str, Any] | Sequence[str], serves: Callable[[Recipe], bool], output: str
) -> dict[str, RecipeSpec]:
    """`recipes` of the configuration (names, or names with what they are) by name.

    `all` stands for every one that leaves something out and serves models of this output.
    """
    if isinstance(recipes, Mapping):
        named = {str(name): RecipeSpec.of(what) for name, what in recipes.items()}
    else:
        everyone = [n for n, r in RECIPES.items() if serves(r) and n not in OWN_DENSE]
        names = [n for name in recipes for n in (everyone if name == "all" else [name])]
        if len(set(names)) < len(names) and "all" not in recipes:
            twice = next(name for name in names if names.count(name) > 1)
            raise AccelError(f"an arm cannot be called {twice!r} twice; recipes={{name: recipe}}")
        named = {name: RecipeSpec(name) for name in names}
    for spec in named.values():
        if not serves(RECIPES[spec.recipe]):
            raise AccelError(
                f"recipe {spec.recipe!r} is not for models of {output}; those are"
                f" {', '.join(n for n, r in RECIPES.items() if serves(r))}"
            )
    return named
