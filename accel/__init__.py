"""accel: sparse attention plans for diffusion and vision transformers, on unmodified models.

The public names are resolved on first use, so that `import accel` needs neither triton, CUDA nor
diffusers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "AccelError": "accel.errors",
    "PlanError": "accel.errors",
    "Layout": "accel.layout",
    "Plan": "accel.plan",
    "Choice": "accel.choice",
    "Schedule": "accel.schedule",
    "recipe": "accel.recipes",
    "recipes": "accel.recipes",
    "step": "accel.context",
    "enable": "accel.pipelines.enable",
    "disable": "accel.pipelines.enable",
    "enabled": "accel.pipelines.enable",
    "summary": "accel.pipelines.enable",
    "geometry_of": "accel.pipelines.adapters",
}

__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from accel import recipes as recipes
    from accel.choice import Choice as Choice
    from accel.context import step as step
    from accel.errors import AccelError as AccelError
    from accel.errors import PlanError as PlanError
    from accel.layout import Layout as Layout
    from accel.pipelines.adapters import geometry_of as geometry_of
    from accel.pipelines.enable import disable as disable
    from accel.pipelines.enable import enable as enable
    from accel.pipelines.enable import enabled as enabled
    from accel.pipelines.enable import summary as summary
    from accel.plan import Plan as Plan
    from accel.recipes import recipe as recipe
    from accel.schedule import Schedule as Schedule


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'accel' has no attribute {name!r}")
    home = import_module(_HOMES[name])
    value = home if home.__name__ == f"accel.{name}" else getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
