"""Published methods, each as a function from a model's geometry to a plan; a file each.

Shares and dense steps default to the papers'; where a paper counts steps, the schedule here holds
the same fraction of the run. The block does not: it is (128, 64), the tile of the kernel, unless a
recipe says otherwise (AdaSpa's paper has 64 tokens). What else departs is said at the recipe.
"""

from importlib import import_module
from pkgutil import iter_modules

from accel.recipes.registry import RECIPES, Demand, Recipe, demand, recipe

__all__ = ["RECIPES", "Demand", "Recipe", "demand", "recipe"]

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
