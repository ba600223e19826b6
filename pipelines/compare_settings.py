"""What a comparison is asked for, checked before anything is spent on it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from accel.errors import AccelError, nearest
from accel.pipelines.caches import CacheSpec
from accel.pipelines.compare_arms import (
    DENSE,
    KINDS,
    ArmSpec,
    check_names,
    combined_arms,
    dense_arms,
    recipe_arm,
)
from accel.pipelines.host import DTYPES, ModelConfig
from accel.pipelines.outputs import output_of
from accel.pipelines.paths import find_path
from accel.pipelines.recipe_specs import OWN_DENSE, named_recipes
from accel.untrusted import check_whole, finite


@dataclass(frozen=True)
class CompareSettings:
    """What a comparison is asked for; see `configs/compare.yaml`.

    plans, fronts, caches: as `named_plans`, `named_fronts` and `named_caches` read them; recipes:
    names, or names with what they are, which are read here. output: the model's.
    """

    plans: Mapping[str, str]
    recipes: Any
    prompts: int | Sequence[str]
    dtypes: Sequence[str]
    fronts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    caches: Mapping[str, CacheSpec] = field(default_factory=dict)
    combined: Any = ()
    rounds: int = 3
    timing_prompts: int = 2
    seed: int = 0
    predict: bool = False
    baselines: Sequence[str] = ("dense",)
    arms_timeout_s: int | float = 1800
    loaded_at_once: int = 8
    command: str = ""
    output: str = "frames"

    def __post_init__(self) -> None:
        for name in ("dtypes", "baselines"):
            object.__setattr__(self, name, texts(name, getattr(self, name)))
        if not isinstance(self.prompts, int):
            object.__setattr__(self, "prompts", texts("prompts", self.prompts))
            if not self.prompts:
                raise AccelError("prompts is empty; give a number or a list of texts")
        kind = output_of(self.output)
        recipes = self.recipes
        if not isinstance(recipes, Mapping):
            recipes = texts("recipes", recipes)
        object.__setattr__(self, "recipes", named_recipes(recipes, kind.serves, kind.name))
        if (self.caches or self.combined) and not kind.caches:
            raise AccelError(
                "caches and combined are for diffusers' caches, which know nothing of a model of"
                f" {kind.name}; what such a model keeps between calls is part of a plan, as in"
                " recipes=[sparse_dllm]"
            )
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
        # the baselines stay loaded, and beside them at least one other arm
        check_whole("loaded_at_once", self.loaded_at_once, len(self.baselines) + 1)
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
        return dense_arms(self.baselines)

    @property
    def arms(self) -> tuple[ArmSpec, ...]:
        """The baselines, plans, fronts, recipes, caches and plans with caches, by kind."""
        plans = [ArmSpec.of(name, find_path(p)) for name, p in self.plans.items()]
        for name, files in self.fronts.items():
            for number, file in enumerate(files, 1):
                plans.append(ArmSpec.of(f"{name}-{number}", file, "front", name))
        plans += [recipe_arm(name, spec, self.baselines) for name, spec in self.recipes.items()]
        arms = [*self.dense_arms, *plans]
        for name, spec in self.caches.items():
            arms.append(ArmSpec(name, kind="cache", cache=spec.identity))
        known = {arm.name: arm for arm in (*self.dense_arms[1:], *plans)}
        arms += combined_arms(self.combined, known, self.caches)
        check_names(arms)
        return tuple(sorted(arms, key=lambda arm: list(KINDS).index(arm.kind)))

    @property
    def groups(self) -> tuple[tuple[ArmSpec, ...], ...]:
        """Arms that are loaded at once: the baselines with as many of the others as there is room
        for.
        """
        dense, others = self.dense_arms, self.arms[len(self.baselines) :]
        room = self.loaded_at_once - len(dense)
        parts = [others[at : at + room] for at in range(0, len(others), room)]
        return tuple((*dense, *part) for part in parts) or (dense,)

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
