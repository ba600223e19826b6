"""What a comparison is asked for, checked before anything is spent on it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accel.errors import AccelError, PlanError, nearest
from accel.pipelines.compare_book import ArmSpec
from accel.pipelines.host import DTYPES, ModelConfig, find_path
from accel.plan import Plan
from accel.recipes import RECIPES
from accel.untrusted import check_whole, finite

DENSE = ArmSpec("dense")
# recipes that leave nothing out, called like the precision they compute in
OWN_DENSE = ("full", "half")


@dataclass(frozen=True)
class CompareSettings:
    """What a comparison is asked for; see `configs/compare.yaml`."""

    plans: Mapping[str, str]
    recipes: Sequence[str]
    prompts: int | Sequence[str]
    dtypes: Sequence[str]
    rounds: int = 3
    timing_prompts: int = 2
    seed: int = 0
    predict: bool = False
    baselines: Sequence[str] = ("dense",)
    arms_timeout_s: int | float = 1800
    command: str = ""

    def __post_init__(self) -> None:
        for name in ("recipes", "dtypes", "baselines"):
            object.__setattr__(self, name, texts(name, getattr(self, name)))
        if not isinstance(self.prompts, int):
            object.__setattr__(self, "prompts", texts("prompts", self.prompts))
            if not self.prompts:
                raise AccelError("prompts is empty; give a number or a list of texts")
        for name in self.recipes:
            if name not in RECIPES:
                raise PlanError(f"there is no recipe {name!r}; {nearest(name, RECIPES)}")
        if not self.baselines or self.baselines[0] != DENSE.name:
            raise AccelError(
                f"baselines is {list(self.baselines)}; it begins with {DENSE.name!r}, the host's"
                " own attention, against which quality is measured"
            )
        for name in self.baselines[1:]:
            if name not in OWN_DENSE:
                raise AccelError(
                    f"there is no baseline {name!r}; {nearest(name, (DENSE.name, *OWN_DENSE))}"
                )
        for name, least in (("rounds", 1), ("timing_prompts", 1), ("seed", 0)):
            check_whole(name, getattr(self, name), least)
        if not finite(self.arms_timeout_s) or self.arms_timeout_s < 1:
            raise AccelError(
                f"arms_timeout_s is {self.arms_timeout_s!r}; it is a number of seconds, at least 1"
            )
        for dtype in self.dtypes:
            if dtype not in DTYPES:
                raise AccelError(f"dtype {dtype!r} is unknown; {nearest(dtype, DTYPES)}")

    @property
    def dense_arms(self) -> tuple[ArmSpec, ...]:
        """Arms that leave nothing out; speed is measured against the fastest of them."""
        return (DENSE, *(ArmSpec.of(name, name) for name in self.baselines[1:]))

    @property
    def arms(self) -> tuple[ArmSpec, ...]:
        """The baselines, plans and recipes; their names are folders, so each is there once."""
        arms = list(self.dense_arms)
        arms += [ArmSpec.of(name, find_path(p)) for name, p in self.plans.items()]
        arms += [ArmSpec.of(name, name) for name in self.recipes]
        names = [arm.name for arm in arms]
        for name in names:
            if names.count(name) > 1 or not name or set(name) & set("/\\:"):
                raise AccelError(f"an arm cannot be called {name!r}; name it: plan={{name: path}}")
        return tuple(arms)

    def prompts_of(self, model: ModelConfig) -> tuple[str, ...]:
        if not isinstance(self.prompts, int):
            return tuple(self.prompts)
        if not 1 <= self.prompts <= len(model.prompts):
            raise AccelError(
                f"prompts is {self.prompts}; model {model.name!r} has {len(model.prompts)}, or give"
                " a list of texts"
            )
        return model.prompts[: self.prompts]


def texts(name: str, value: Any) -> tuple[str, ...]:
    """A list of texts; nothing is an empty one, and one text is a list of one."""
    found = () if value is None else (value,) if isinstance(value, str) else tuple(value)
    if not all(isinstance(text, str) and text.strip() for text in found):
        raise AccelError(f"{name} is {value!r}; it is a list of texts")
    return found


def named_plans(plan: Any) -> dict[str, str]:
    """`plan` of the configuration (nothing, a path, a list, or names with paths) by name.

    Files are read once here: one that is missing or broken is an error before anything is measured.
    """
    if plan is None or plan == "":
        return {}
    if isinstance(plan, str):
        plan = [plan]
    if not isinstance(plan, Mapping):
        named = {Path(str(path)).stem: str(path) for path in plan}
        if len(named) != len(plan):
            raise AccelError(
                f"two plans have the same name among {list(plan)}; plan={{name: path}}"
            )
        plan = named
    for name, path in plan.items():
        if str(path).endswith(".json"):
            file = Path(find_path(str(path)))
            if not file.is_file():
                raise AccelError(f"plan {name!r}: there is no file {str(path)!r}")
            Plan.load(file)
    return {str(name): str(path) for name, path in plan.items()}
