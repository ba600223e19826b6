"""The arms of a comparison: dense, plans, fronts of plans, recipes, caches, and plans with caches.

An arm's `identity` names what it does; its measurements are kept under it (`compare_book`).
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accel.errors import AccelError, PlanError, nearest
from accel.pipelines.caches import CacheSpec
from accel.pipelines.output import Output
from accel.pipelines.paths import find_path
from accel.pipelines.recipe_specs import HALF, OWN_DENSE, RecipeSpec
from accel.plan import Plan
from accel.plan_hub import HUB_FILE, fetched, looks_like_repository
from accel.recipes import RECIPES
from accel.untrusted import refuse_constant, table, typed

# what an arm is, in the order of tables, and what many of a kind are called
KINDS = {
    "dense": "dense",
    "plan": "plans",
    "front": "fronts",
    "recipe": "recipes",
    "cache": "caches",
    "plan + cache": "plan + cache",
    "scaled": "smaller inputs",
}


@dataclass(frozen=True, slots=True)
class ArmSpec:
    """One arm. plan: a plan file, the name of a recipe, or None for an arm without one.

    identity: names what the plan does and expects, since it runs dense where it expects dense to
    be faster; what cannot be read has only its path. cache: `CacheSpec.identity`, or "". front:
    the front that the plan is a point of, or "". precision: what a recipe computes in where it
    says nothing itself, or "" for the model's own. parameters: those of a recipe that are given, as
    JSON, or "". setup: what is done to the model first (`Output.setup`), as JSON, or "".
    """

    name: str
    plan: str | None = None
    identity: str = ""
    kind: str = "dense"
    cache: str = ""
    front: str = ""
    precision: str = ""
    parameters: str = ""
    setup: str = ""

    @classmethod
    def of(cls, name: str, plan: str, kind: str = "plan", front: str = "") -> "ArmSpec":
        identity, path = plan, Path(plan)
        if path.exists():
            with suppress(PlanError):
                found = Plan.load(path / HUB_FILE if path.is_dir() else path)
                expected = json.dumps(found.expected, sort_keys=True)
                identity = f"{found.digest} {expected}"
        return cls(name, plan, identity, kind, front=front)

    def with_cache(self, name: str, spec: CacheSpec) -> "ArmSpec":
        """The same plan and this cache at once; of accel's dense it is the cache on that kernel."""
        named = f"{self.name}+{name}"
        kind = "cache" if self.kind == "dense" else "plan + cache"
        return replace(self, name=named, kind=kind, cache=spec.identity, front="")

    def computed_in(self, precision: str) -> "ArmSpec":
        """The same recipe with accel's kernels in another precision: another arm."""
        return replace(self, precision=precision, identity=f"{self.identity} in {precision}")

    @property
    def calibrated(self) -> bool:
        """Whether its plan or its cache chooses by a calibration of the model."""
        if self.cache and json.loads(self.cache)["cache"] == "magcache":
            return True
        return self.plan in RECIPES and RECIPES[self.plan].demand is not None


DENSE = ArmSpec("dense")


def dense_arms(
    baselines: Sequence[str], kind: Output, options: Mapping[str, Any]
) -> tuple[ArmSpec, ...]:
    """Arms that leave nothing out, the host as it is first. options: of compiling."""

    def arm(name: str) -> ArmSpec:
        setup = kind.setup(name, options)
        made = ArmSpec.of(name, name, "dense") if setup is None else ArmSpec(name)
        return set_up(made, setup)

    return (DENSE, *map(arm, baselines[1:]))


def scaled_arms(scales: Sequence[float], setup: Mapping[str, Any]) -> list[ArmSpec]:
    """The dense model, set up so, on smaller inputs: what a plan has to beat to be of use."""
    return [
        set_up(ArmSpec(f"scaled-{scale:g}", kind="scaled"), {**setup, "scale": scale})
        for scale in scales
    ]


def set_up(arm: ArmSpec, setup: Mapping[str, Any] | None) -> ArmSpec:
    """The same arm with its model set up first."""
    return replace(arm, setup=json.dumps(dict(setup), sort_keys=True)) if setup else arm


def recipe_arm(name: str, spec: RecipeSpec, baselines: Sequence[str]) -> ArmSpec:
    """The arm of a recipe, with 16-bit operands where a baseline has them.

    Published methods choose blocks, and say nothing of arithmetic. Searched plans may compute with
    16-bit operands and are held against dense that does: what that alone gives is no merit of a
    selection, and no method is to be without it. A recipe that is dense is its precision.
    """
    arm = ArmSpec(name, spec.recipe, spec.identity, "recipe")
    if spec.parameters:
        arm = replace(arm, parameters=json.dumps(dict(spec.parameters), sort_keys=True))
    return arm.computed_in(HALF) if HALF in baselines and spec.recipe not in OWN_DENSE else arm


def named_caches(caches: Any) -> dict[str, CacheSpec]:
    """`caches` of the configuration (nothing, a name, a list of them, or names with what they
    are) by name.
    """
    if caches is None:
        return {}
    if isinstance(caches, Mapping):
        return {str(name): CacheSpec.of(what) for name, what in caches.items()}
    specs = [CacheSpec.of(one) for one in ([caches] if isinstance(caches, str) else caches)]
    named = {spec.kind: spec for spec in specs}
    if len(named) != len(specs):
        raise AccelError(f"two caches have the same name among {caches}; caches={{name: cache}}")
    return named


def named_plans(plan: Any) -> dict[str, str]:
    """`plan` of the configuration (nothing, a path or hub repository, a list, or names with them)
    by name.

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
    return {str(name): _readable(str(name), str(path)) for name, path in plan.items()}


def _readable(name: str, path: str) -> str:
    """The path of a plan; of a hub repository that of a copy, which is of one commit.

    What a repository holds may change under its name. All that a comparison does with a plan it
    does with the copy, whose content names the arm.
    """
    here = Path(find_path(path))
    if path.endswith(".json"):
        if not here.is_file():
            raise AccelError(f"plan {name!r}: there is no file {path!r}")
        Plan.load(here)
    elif not here.exists() and looks_like_repository(path):
        path = str(fetched(path))
        Plan.load(path)
    return path


def named_fronts(front: Any) -> dict[str, tuple[str, ...]]:
    """`front` of the configuration (nothing, a path, or names with paths): the plan files of each.

    One that is not named is called "front". All files are read once here.
    """
    if front is None or front == "":
        return {}
    if not isinstance(front, Mapping):
        front = {"front": front}
    for name in front:
        if name in KINDS.values():
            raise AccelError(f"a front cannot be called {name!r}, as other arms together are")
    return {str(name): read_front(str(path)) for name, path in front.items()}


def read_front(path: str) -> tuple[str, ...]:
    """The plan files of a front that accel-search wrote, in its order; names are relative to it."""
    file = Path(find_path(path))
    if not file.is_file():
        raise AccelError(f"front: there is no file {path!r}")
    try:
        data = json.loads(file.read_text(encoding="utf-8"), parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise AccelError(f"front {path!r} is not a whole JSON file: {error}") from error
    points = typed("points", table(f"front {path!r}", data, None, {"points"})["points"], list)
    if not points:
        raise AccelError(f"front {path!r} has no points")
    plans = []
    for point in points:
        name = typed("plan", table("a point of the front", point, None, {"plan"})["plan"], str)
        plan = file.parent / name
        if Path(name).is_absolute() or ".." in Path(name).parts or not plan.is_file():
            raise AccelError(f"front {path!r}: there is no plan file {name!r} beside it")
        Plan.load(plan)
        plans.append(str(plan))
    return tuple(plans)


def combined_arms(
    combined: Any, plans: Mapping[str, ArmSpec], caches: Mapping[str, CacheSpec]
) -> list[ArmSpec]:
    """Arms of a plan with a cache. combined: [{plan: name of an arm, cache: name}, ...], or "all":
    every one of the comparison's plans, its fronts and recipes aside, with every one of its caches.
    """
    if combined == "all":
        chosen = [arm for arm in plans.values() if arm.kind == "plan"]
        return [arm.with_cache(name, spec) for arm in chosen for name, spec in caches.items()]
    arms = []
    for pair in combined or ():
        if not isinstance(pair, Mapping) or set(pair) != {"plan", "cache"}:
            raise AccelError(f"combined has {pair!r:.80}; it is 'all' or a list of {{plan, cache}}")
        plan, cache = str(pair["plan"]), pair["cache"]
        if plan not in plans:
            raise AccelError(f"combined: there is no plan {plan!r}; {nearest(plan, plans)}")
        spec = caches[cache] if cache in caches else CacheSpec.of(cache)
        arms.append(plans[plan].with_cache(str(cache), spec))
    return arms


def check_names(arms: Iterable[ArmSpec]) -> None:
    """Names are folders, so each is there once."""
    names = [arm.name for arm in arms]
    for name in names:
        if names.count(name) > 1 or not name or set(name) & set("/\\:"):
            raise AccelError(f"an arm cannot be called {name!r}; name it: plan={{name: path}}")
