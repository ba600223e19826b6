"""A search that judges plans by what a model is for: evolve genomes on some calibration tasks,
measure the front on all of them, and choose.

What is generated, and how that is timed and judged, is a bench's; what genomes mean is the genes'.
`text_search` and `image_search` bring both.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, ClassVar, Protocol, runtime_checkable

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tqdm import tqdm

from accel.errors import AccelError
from accel.files import write_atomically
from accel.geometry import Geometry
from accel.pipelines.adapters import denoisers_of, geometry_of
from accel.pipelines.calibration import fingerprint
from accel.pipelines.host import Host
from accel.pipelines.provenance import code_digest, device_name, versions
from accel.plan import Plan
from accel.search.front import spread
from accel.search.genome import Genome
from accel.search.settings import Evolution
from accel.search.study import (
    ATTEMPTS,
    MAXIMIZE,
    Done,
    Trials,
    one_at_a_time,
    open_storage,
)
from accel.search.worth import Worth

__all__ = ["Outcome", "Point", "TaskBench", "TaskGenes", "TaskSearch", "TaskSettings", "describe"]

HERE = Path(__file__).parent


@runtime_checkable
class TaskGenes(Protocol):
    """What genomes mean: `text_genes` and `keep_genes` have it."""

    @property
    def values(self) -> Mapping[str, Any]: ...

    @property
    def sizes(self) -> dict[str, int]: ...

    def to_params(self, genome: Genome) -> dict[str, int]: ...

    def from_params(self, params: Mapping[str, int]) -> Genome: ...

    def random(self, rng: Random) -> Genome: ...

    def child(self, one: Genome, other: Genome, rng: Random) -> Genome: ...

    def nearest(self, wanted: Mapping[str, Any]) -> Genome: ...

    def repaired(self, genome: Genome) -> Genome: ...

    def plan(self, genome: Genome, geometry: Geometry, name: str, **provenance: Any) -> Plan: ...


@runtime_checkable
class TaskBench(Protocol):
    """What plans are worth on tasks; nothing is generated twice."""

    def dense(self, tasks: Sequence[Any]) -> Worth: ...

    def trial(self, plan: Plan, tasks: Sequence[Any]) -> Worth: ...

    def measure(self, plan: Plan, tasks: Sequence[Any]) -> Worth: ...


@dataclass(frozen=True, slots=True)
class TaskSettings:
    """What a search by tasks is asked for.

    genes: of the space; first: settings that the first generation has; evolution.prompts: how many
    calibration tasks a trial generates, of a text model of each kind. loss: how much of the
    accuracy of dense the chosen plan may lose at most; points: plans of the front that are
    measured on all calibration tasks.
    """

    genes: TaskGenes
    first: Sequence[Mapping[str, Any]]
    evolution: Evolution
    loss: float = 0.01
    points: int = 6
    seed: int = 1000


@dataclass(frozen=True, slots=True)
class Point:
    """A plan that was measured on all calibration tasks."""

    plan: Plan
    worth: Worth
    trial: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a search found. points: the front, by falling time; chosen: one of them; dense: of the
    untouched model on the same tasks.
    """

    chosen: Point
    points: tuple[Point, ...]
    dense: Worth
    trials: int


class TaskSearch:
    """The search of one model; what each stage makes is kept in `folder`.

    tasks: of the calibration; some: how many of the first ones a trial generates; told: what values
    depend on besides model, weights and device.
    """

    # files of search/ that values depend on
    code: ClassVar[tuple[str, ...]] = ("study", "task_search", "worth")

    def __init__(
        self,
        host: Host,
        settings: TaskSettings,
        folder: Path,
        tasks: Sequence[Any],
        some: int,
        **told: Any,
    ) -> None:
        self.settings, self.folder = settings, folder
        self.host, self.tasks, self.some = host, list(tasks), list(tasks)[:some]
        denoiser = denoisers_of(self.host.pipe)[0]
        self.geometry: Geometry = geometry_of(denoiser)
        told |= {
            "device": device_name(self.host.device),
            "versions": versions("optuna"),
            "code": code_digest(*(HERE / f"{name}.py" for name in self.code), *host.kind.sources),
            "model": {**asdict(host.config), "prompts": (), "calibration": ()},
            "weights": fingerprint(denoiser),
            "seed": settings.seed,
        }
        text = json.dumps(told, sort_keys=True, default=str)
        self.key = hashlib.sha256(text.encode()).hexdigest()[:12]
        self.bench = self._bench()

    def _bench(self) -> TaskBench:
        raise NotImplementedError

    def more(self, outcome: "Outcome") -> Iterable[str]:
        """What else a person wants to know of this kind of model."""
        return ()

    def run(self) -> Outcome:
        """Look at dense once, evolve together with other workers, and finish."""
        with one_at_a_time(self.folder / ".prepare.lock"):
            self.bench.dense(self.some)
        trials = self._trials()
        self._evolve(trials)
        with one_at_a_time(self.folder / ".finish.lock"):
            return self._finish(trials.finished)

    def plan(self, genome: Genome, name: str) -> Plan:
        """The plan of a genome, with how it was made."""
        model = self.host.config
        plan = self.settings.genes.plan(
            genome,
            self.geometry,
            name,
            made_by="accel-search",
            model_path=model.path,
            call=dict(model.call),
            seed=self.settings.seed,
            dtype=model.dtype,
            device=device_name(self.host.device),
            versions=versions("optuna"),
        )
        return plan

    def _trials(self) -> Trials:
        evolution, genes = self.settings.evolution, self.settings.genes
        first = [genes.repaired(genes.nearest(wanted)) for wanted in self.settings.first]
        rng = Random(f"{self.settings.seed} first")
        if not evolution.warm:
            first = []
        for _ in range(ATTEMPTS):  # a small space may not have so many
            if len(set(first)) >= evolution.population:
                break
            first.append(genes.repaired(genes.random(rng)))
        name = evolution.study or self.host.config.name
        told = {"key": self.key, "prompts": evolution.prompts, "genes": repr(genes.values)}
        own = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:8]
        return Trials(
            open_storage(evolution.storage, self.folder),
            f"{name}-{own}" if evolution.fresh else name,
            genes,
            told,
            list(dict.fromkeys(first)),
            repair=genes.repaired,
            seed=self.settings.seed,
            lock=self.folder / ".study.lock",
            third=MAXIMIZE,
        )

    def _evolve(self, trials: Trials) -> None:
        wanted, finished = self.settings.evolution.trials, len(trials.finished)

        def evaluate(genome: Genome) -> list[float]:
            worth = self.bench.trial(self.plan(genome, "trial"), self.some)
            return [worth.time, worth.accuracy, worth.agreement]

        with tqdm(
            total=max(wanted, finished),
            initial=finished,
            desc="evolving",
            unit="trial",
            disable=finished >= wanted,
        ) as bar:

            def told(done: Done) -> None:
                found = trials.finished
                bar.update(len(found) - bar.n)
                most = max(d.values[1] for d in found)
                good = [d for d in found if d.values[1] >= most - self.settings.loss]
                best = min(good, key=lambda d: d.values[0])
                bar.set_postfix_str(f"best {1 / best.values[0]:.1f}x at {best.values[1]:.1%}")

            trials.run(wanted, evaluate, told)

    def _finish(self, found: Sequence[Done]) -> Outcome:
        if not found:
            raise AccelError("the study has no finished trial; search.trials is at least 1")
        front = sorted(undominated(found), key=lambda d: -d.values[0])
        # a lucky trial above dense asks no more of the others than dense does
        best = max(d.values[1] for d in found)
        good = min(best, self.bench.dense(self.some).accuracy) - self.settings.loss
        # the fast ones that are good are what is asked for; the others show the trade-off
        asked = [d for d in front if d.values[1] >= good][-self.settings.points :]
        tried = {d.number: d for d in [*asked, *spread(front, self.settings.points, _time)]}
        dense = self.bench.dense(self.tasks)
        points = []
        for done in tqdm(sorted(tried.values(), key=lambda d: -d.values[0]), desc="measuring"):
            plan = self.plan(done.genome, f"{self.host.config.name}-{done.number:03d}")
            worth = self.bench.measure(plan, self.tasks)
            told = {**plan.provenance, "measured": worth.to_dict(), "tasks": len(self.tasks)}
            points.append(Point(replace(plan, provenance=told), worth, done.number))
        points.sort(key=lambda p: -p.worth.time)
        least = dense.accuracy - self.settings.loss
        right = [p for p in points if p.worth.accuracy >= least]
        if right:
            chosen = min(right, key=lambda p: p.worth.time)
        else:
            chosen = max(points, key=lambda p: p.worth.accuracy)
        outcome = Outcome(chosen, tuple(points), dense, len(found))
        self._write(outcome)
        return outcome

    def _write(self, outcome: Outcome) -> None:
        """front.json, the plan files it names, and the picture."""
        listed = []
        for point in outcome.points:
            path = point.plan.save(self.folder / "plans" / f"{point.plan.name}.json")
            listed.append(
                {"plan": f"plans/{path.name}", "trial": point.trial, **point.worth.to_dict()}
            )
        front = {
            "schema": 1,
            "model": self.host.config.name,
            "points": listed,
            "dense": outcome.dense.to_dict(),
            "trials": outcome.trials,
            "chosen": outcome.chosen.plan.name,
            "tasks": len(self.tasks),
            "seed": self.settings.seed,
            "device": device_name(self.host.device),
            "versions": versions("optuna"),
        }
        write_atomically(self.folder / "front.json", json.dumps(front, indent=1))
        _draw(outcome, self.folder / "front.png")


def undominated(found: Iterable[Done]) -> list[Done]:
    """Trials that no other one equals or beats in time, accuracy and agreement at once."""
    unique = {done.values: done for done in reversed(list(found))}

    def beats(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
        return one[0] <= other[0] and one[1] >= other[1] and one[2] >= other[2]

    return [
        done
        for values, done in unique.items()
        if not any(beats(other, values) for other in unique if other != values)
    ]


def _time(done: Done) -> float:
    return done.values[0]


def _draw(outcome: Outcome, path: Path) -> None:
    """A PNG: accuracy and agreement over the speed-up, the chosen plan by name."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    faster = [1 / p.worth.time for p in outcome.points]
    for name, colour in (("accuracy", "#0f766e"), ("agreement", "#94a3b8")):
        values = [100 * getattr(p.worth, name) for p in outcome.points]
        axes.plot(faster, values, "o-", color=colour, label=f"{name}, {outcome.trials} trials")
    axes.axhline(100 * outcome.dense.accuracy, color="#1e293b", lw=1, label="accuracy of dense")
    chosen = outcome.chosen
    axes.annotate(
        chosen.plan.name,
        (1 / chosen.worth.time, 100 * chosen.worth.accuracy),
        xytext=(0, -14),
        textcoords="offset points",
        ha="center",
    )
    axes.set(xlabel="times as fast as dense", ylabel="%")
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomically(path, buffer.getvalue())


def describe(outcome: Outcome, settings: TaskSettings) -> Iterable[str]:
    """What a person wants to know of a finished search, line by line."""
    chosen, dense = outcome.chosen, outcome.dense
    slow, fast = outcome.points[0].worth, outcome.points[-1].worth
    yield (
        f"front: {len(outcome.points)} plans measured, of {outcome.trials} trials:"
        f" {1 / slow.time:.1f}x at {slow.accuracy:.1%} to {1 / fast.time:.1f}x at"
        f" {fast.accuracy:.1%}; dense has {dense.accuracy:.1%}"
    )
    worth = chosen.worth
    yield (
        f"plan {chosen.plan.name!r} ({chosen.plan.digest}): {1 / worth.time:.1f} times as fast as"
        f" dense, {worth.accuracy:.1%} right, {worth.agreement:.1%} as dense has it,"
        f" {worth.calls:.0f} calls"
    )
    if worth.accuracy < dense.accuracy - settings.loss:
        yield (
            f"no plan loses at most {settings.loss:.1%}: this is the best of the front; add values"
            " to the space that compute more, or take more trials"
        )
