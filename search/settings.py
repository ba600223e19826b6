"""What a search is asked for, checked before anything is spent on it; see `configs/search.yaml`."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from accel.choice import Choice
from accel.errors import AccelError, PlanError, nearest
from accel.hardware import HERE, CostSource
from accel.kernels.arguments import PRECISIONS
from accel.plan import check_block
from accel.recipes import RECIPES
from accel.schedule import Schedule
from accel.search.objective import FIDELITIES
from accel.untrusted import check_whole, finite


@dataclass(frozen=True, slots=True)
class Budget:
    """Which plan of the front is wanted: the fastest of at least `psnr` dB, or, with `time`, the
    best of at most that fraction of the fastest dense generation. Of a text model: the fastest that
    loses at most `accuracy` of what dense decoding gets right.
    """

    psnr: int | float = 32.0
    time: int | float | None = None
    accuracy: int | float = 0.01

    def __post_init__(self) -> None:
        if self.time is not None and (not finite(self.time) or not 0 < self.time <= 1):
            raise AccelError(
                f"budget.time is {self.time!r}; it is a fraction of the dense time, in (0, 1]"
            )
        if not finite(self.accuracy) or not 0 <= self.accuracy < 1:
            raise AccelError(
                f"budget.accuracy is {self.accuracy!r}; it is a share that may be lost, in [0, 1)"
            )
        if not finite(self.psnr) or self.psnr <= 0:
            raise AccelError(f"budget.psnr is {self.psnr!r}; it is a number of dB above 0")


@dataclass(frozen=True, slots=True)
class Evolution:
    """How the front is refined.

    trials: finished ones that the study shall have; population: size of a generation; levels: how
    many prices of time a gene tells apart; fidelity, steps: what a trial is judged by (see
    `objective`); prompts: calibration prompts that a trial generates; warm: whether the first
    generation is the front of the calibration, else random genomes; time_limit: the slowest plan
    worth trying, as a fraction of the fastest dense; floor: the lowest predicted quality worth
    trying, in dB; memory: whether peak memory is a third
    objective; storage, study: of Optuna, "" for a journal in the output folder and the model's
    name; fresh: whether the study's name gets an ending of its own for all that its values depend
    on, so that a study of other code, settings or prices is left alone.
    """

    trials: int = 36
    population: int = 12
    levels: int = 24
    fidelity: str = "steps"
    steps: int = 10
    prompts: int = 1
    warm: bool = True
    time_limit: int | float = 0.95
    floor: int | float = 5.0
    memory: bool = False
    storage: str = ""
    study: str = ""
    fresh: bool = False

    def __post_init__(self) -> None:
        for name, least in (("trials", 0), ("population", 2), ("levels", 3), ("steps", 2)):
            check_whole(f"search.{name}", getattr(self, name), least)
        check_whole("search.prompts", self.prompts, 1)
        if self.fidelity not in FIDELITIES:
            known = nearest(self.fidelity, FIDELITIES)
            raise AccelError(f"search.fidelity {self.fidelity!r} is unknown; {known}")
        if not finite(self.floor):
            raise AccelError(f"search.floor is {self.floor!r}; it is a number of dB")
        if not finite(self.time_limit) or not 0 < self.time_limit <= 1:
            raise AccelError(
                f"search.time_limit is {self.time_limit!r}; it is a fraction of the fastest dense"
                " time, in (0, 1]"
            )


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """Everything a search is asked for.

    space: groups of what heads choose from; schedule, block: of the plans; dense_starts: further
    shares of a run that may be dense before it; precisions: what arithmetic sparse attention may
    use; rows, tolerance, seed: of the calibration; points: plans of the front that are measured
    whole; recipes: measured beside them.
    """

    space: Mapping[str, Any]
    schedule: Schedule
    budget: Budget = field(default_factory=Budget)
    evolution: Evolution = field(default_factory=Evolution)
    block: tuple[int, int] = (128, 64)
    dense_starts: Sequence[float] = ()
    precisions: Sequence[str] = ("full",)
    rows: int = 128
    tolerance: int | float = 0.02
    cost_rounds: int = 5
    points: int = 6
    recipes: Sequence[str] = ()
    seed: int = 1000
    hardware: CostSource = HERE

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", check_block(self.block))
        words = (self.precisions,) if isinstance(self.precisions, str) else tuple(self.precisions)
        object.__setattr__(self, "precisions", words)
        if not words:
            raise AccelError(f"precisions is empty; take some of {', '.join(PRECISIONS)}")
        for word in words:
            if word not in PRECISIONS:
                raise AccelError(f"precision {word!r} is unknown; {nearest(str(word), PRECISIONS)}")
        first = self.schedule.dense_start
        for start in self.dense_starts:
            if not finite(start) or not first <= start < 1:
                raise AccelError(
                    f"dense_starts has {start!r}; they are fractions from schedule.dense_start,"
                    f" {first}, at which the calibration begins, to below 1"
                )
        starts = tuple(dict.fromkeys((first, *sorted(self.dense_starts))))
        object.__setattr__(self, "dense_starts", starts)
        object.__setattr__(self, "recipes", tuple(self.recipes))
        for name in self.recipes:
            if name not in RECIPES:
                raise PlanError(f"there is no recipe {name!r}; {nearest(name, RECIPES)}")
        for name, least in (("rows", 1), ("cost_rounds", 1), ("seed", 0), ("points", 1)):
            check_whole(name, getattr(self, name), least)
        if not finite(self.tolerance) or self.tolerance < 0:
            raise AccelError(f"tolerance is {self.tolerance!r}; it is a number, at least 0")

    def check_steps(self, steps: int) -> None:
        """Refuse a schedule with a band that holds no step of a run of `steps`."""
        bands = {self.schedule.phase(step, steps).band for step in range(steps)}
        for band in range(self.schedule.n_bands):
            if band not in bands:
                raise AccelError(
                    f"band {band} of the schedule holds none of the {steps} steps; look at"
                    " schedule.bands, dense_start and dense_end"
                )


def candidates_of(space: Mapping[str, Any]) -> tuple[Choice, ...]:
    """Every select with every order and every rest of its group; each once."""
    found: dict[Choice, None] = {}
    for number, group in enumerate(space.get("groups", ())):
        missing = {"select", "orders", "rests"} - set(group)
        if missing:
            raise AccelError(f"space.groups[{number}] lacks {', '.join(sorted(missing))}")
        for select, order, rest in itertools.product(
            group["select"], group["orders"], group["rests"]
        ):
            found[Choice.from_dict({"select": select, "order": order, "rest": rest})] = None
    if not found:
        raise AccelError("the space has no candidate; see configs/space/video.yaml")
    return tuple(found)
