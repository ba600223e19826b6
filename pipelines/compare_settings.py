"""What a comparison is asked for, checked before anything is spent on it."""

import json
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
    scaled_arms,
    set_up,
)
from accel.pipelines.host import DTYPES, ModelConfig
from accel.pipelines.output import Output
from accel.pipelines.outputs import output_of
from accel.pipelines.paths import find_path
from accel.pipelines.recipe_specs import named_recipes
from accel.untrusted import check_whole, finite


@dataclass(frozen=True)
class CompareSettings:
    """What a comparison is asked for; see `configs/compare.yaml`.

    plans, fronts, caches: as `named_plans`, `named_fronts` and `named_caches` read them; recipes:
    names, or names with what they are, which are read here. prompts: None for as many as the
    output has it, the first eight or all. output: the model's. scaled: by what inputs are made
    smaller, one number or several; fastest: the baseline that inputs are made smaller for.
    compiled: the arms besides baselines whose models are compiled, or whether all are; compile:
    options of `torch.compile`.
    """

    plans: Mapping[str, str]
    recipes: Any
    prompts: int | Sequence[str] | None
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
    scaled: Any = ()
    fastest: str = ""
    compiled: bool | Sequence[str] = False
    compile: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("dtypes", "baselines"):
            object.__setattr__(self, name, texts(name, getattr(self, name)))
        if self.prompts is not None and not isinstance(self.prompts, int):
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
        self._check_baselines(kind)
        self._check_rivals(kind)
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

    def _check_baselines(self, kind: Output) -> None:
        if self.baselines and self.baselines[0] in kind.names_of_dense:
            object.__setattr__(self, "baselines", (DENSE.name, *self.baselines[1:]))
        if not self.baselines or self.baselines[0] != DENSE.name:
            raise AccelError(
                f"baselines is {list(self.baselines)}; it begins with {DENSE.name!r}, the host's"
                " own attention, against which quality is measured"
            )
        for name in self.baselines[1:]:
            if name not in kind.baselines:
                raise AccelError(f"there is no baseline {name!r}; {nearest(name, kind.baselines)}")

    def _check_rivals(self, kind: Output) -> None:
        """What is set of smaller inputs and of compiled models."""
        scaled = [self.scaled] if isinstance(self.scaled, int | float) else self.scaled
        object.__setattr__(self, "scaled", tuple(scaled or ()))
        for scale in self.scaled:
            if not finite(scale) or not 0 < scale < 1:
                raise AccelError(f"scaled has {scale!r}; inputs are made smaller, by 0.75, say")
        if not isinstance(self.compiled, bool):
            object.__setattr__(self, "compiled", texts("compiled", self.compiled))
        if not kind.scales and (self.scaled or self.compiled or self.compile):
            raise AccelError(
                f"scaled, compiled and compile are for models that see images, not of {kind.name}"
            )
        if self.compiled and "compiled" not in self.baselines:
            raise AccelError(
                f"compiled is {self.compiled!r}, but baselines are {list(self.baselines)}; add"
                " 'compiled' to them, or a plan is credited with what the compiler gains"
            )

    @property
    def dense_arms(self) -> tuple[ArmSpec, ...]:
        """Arms that leave nothing out; speed is measured against the fastest of them."""
        return dense_arms(self.baselines, output_of(self.output), self.compile)

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
        dense = {arm.name: json.loads(arm.setup or "{}") for arm in self.dense_arms}
        arms = [a if a.kind == "dense" else set_up(a, self._setup_of(a.name)) for a in arms]
        arms += scaled_arms(self.scaled, dense[self.fastest or self.baselines[-1]])
        check_names(arms)
        names = [arm.name for arm in arms]
        for name in () if isinstance(self.compiled, bool) else self.compiled:
            if name not in names:
                raise AccelError(f"compiled has {name!r}, which is no arm; {nearest(name, names)}")
        return tuple(sorted(arms, key=lambda arm: list(KINDS).index(arm.kind)))

    def _setup_of(self, arm: str) -> dict[str, Any] | None:
        """How the model of a plan is set up: as a baseline is that it is measured against, so that
        only what the plan does is credited to it.
        """
        kind = output_of(self.output)
        whole = self.compiled if isinstance(self.compiled, bool) else arm in self.compiled
        name = "compiled" if whole else "fused"
        return kind.setup(name, self.compile) if name in self.baselines else None

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
        if self.prompts is None:
            return model.prompts[: output_of(self.output).first]
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
