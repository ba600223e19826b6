"""One search: prepare, evolve, measure the front whole, and choose the plan that was asked for."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from accel.cost import cost_sentence
from accel.cost_calibration import Calibration, calibrated
from accel.errors import AccelError
from accel.files import write_atomically
from accel.hardware import HERE
from accel.pipelines.calibration import calibrated_recipe
from accel.pipelines.compare_arm import peak_memory_bytes, reset_peak_memory
from accel.pipelines.host import Host, ModelConfig
from accel.pipelines.provenance import device_name, versions
from accel.plan import Plan
from accel.recipes import recipe
from accel.search.front import spread, unbeaten, within
from accel.search.genome import Genome
from accel.search.measure import Bench, Measured
from accel.search.objective import Objective
from accel.search.picture import draw_front, draw_heads
from accel.search.prepare import Known, plan_of, prepare
from accel.search.settings import SearchSettings
from accel.search.study import Done, Trials, one_at_a_time, open_storage

OWN_DENSE = "own dense"


@dataclass(frozen=True, slots=True)
class Point:
    """A plan that was measured whole. trial: its number in the study, None for a recipe."""

    name: str
    plan: Plan
    measured: Measured
    trial: int | None = None

    @property
    def predicted_seconds(self) -> float | None:
        return self.plan.expected.get("seconds")

    def to_dict(self, path: str) -> dict[str, Any]:
        return {
            "plan": path,
            "trial": self.trial,
            "predicted_seconds": self.predicted_seconds,
            "measured_seconds": self.measured.seconds,
            "predicted_speedup": self.plan.expected.get("speedup"),
            "measured_speedup": self.measured.speedup,
            "psnr": self.measured.psnr,
        }


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a search found. points: the front, measured whole, by falling time; dense: accel's own
    dense attention beside it, where plans use it; error: of predictions, in words.
    """

    plan: Plan
    chosen: Point
    points: tuple[Point, ...]
    recipes: tuple[Point, ...]
    dense: Measured | None
    trials: tuple[Done, ...]
    fastest_dense: float
    prediction: Calibration | None

    @property
    def best_dense_speedup(self) -> float:
        """Of the fastest dense generation over the host's own, measured."""
        return max(1.0, self.dense.speedup if self.dense else 1.0)


class Search:
    """The search of one model; what each stage makes is kept in `folder` and not made again."""

    def __init__(self, model: ModelConfig, settings: SearchSettings, folder: Path) -> None:
        settings.check_steps(int(model.call["num_inference_steps"]))
        self.settings = settings
        self.folder = folder
        self.host = Host(model)

    def run(self) -> Outcome:
        """Prepare once for all workers, evolve together, and finish: the first who is through."""
        with one_at_a_time(self.folder / ".prepare.lock"):
            known = prepare(self.host, self.settings, self.folder)
        trials = self._trials(known)
        self._evolve(known, trials)
        with one_at_a_time(self.folder / ".finish.lock"):
            return self._finish(known, trials.finished)

    def _trials(self, known: Known) -> Trials:
        evolution = self.settings.evolution
        if evolution.warm:
            first = warm_start(known, self._repair(known), evolution.population)
        else:
            first = cold_start(known, self._repair(known), evolution.population, self.settings.seed)
        provenance = {
            "prepared": known.digest,
            "prices and errors": known.fingerprint(),
            "levels": evolution.levels,
            "dense_starts": list(self.settings.dense_starts),
            "population": evolution.population,
            "fidelity": evolution.fidelity,
            "steps": evolution.steps,
            "prompts": evolution.prompts,
            "time_limit": evolution.time_limit,
            "warm": evolution.warm,
            "seed": self.settings.seed,
        }
        return Trials(
            open_storage(evolution.storage, self.folder),
            evolution.study or self.host.config.name,
            known.genes,
            provenance,
            first,
            repair=self._repair(known),
            seed=self.settings.seed,
            lock=self.folder / ".study.lock",
            memory=evolution.memory,
        )

    def _repair(self, known: Known) -> Callable[[Genome], Genome]:
        """Moves genomes to where plans are worth trying: time gets dearer, level by level, until
        they are predicted to be faster than the fastest dense run by the limit.

        Where not even the highest levels are, there is no limit.
        """
        genes, resolver = known.genes, known.resolver
        limit = self.settings.evolution.time_limit * resolver.fastest_dense

        def repaired(genome: Genome) -> Genome:
            moved = genome
            for _ in range(genes.levels):
                if resolver.resolve(moved).time <= limit:
                    return moved
                moved = genes.with_levels(moved, 1)
            return genome

        return repaired

    def _evolve(self, known: Known, trials: Trials) -> None:
        """Bring the study to its number of trials."""
        evolution = self.settings.evolution
        judge = Objective(
            self.host,
            self.folder,
            known.digest,
            fidelity=evolution.fidelity,
            steps=evolution.steps,
            seed=self.settings.seed,
        )
        prompts = self.host.config.calibration[: evolution.prompts]
        device = self.host.device

        def evaluate(genome: Genome) -> list[float]:
            resolved = known.resolver.resolve(genome)
            plan = plan_of(known, resolved, self.settings, self.host, "trial", genome)
            time = plan.expected["seconds"] / known.dense_seconds
            reset_peak_memory(device)
            if evolution.fidelity == "profile":
                quality = plan.expected["quality"]
            else:
                quality = judge(plan, prompts)
            memory = [float(peak_memory_bytes(device))] if evolution.memory else []
            return [time, quality, *memory]

        finished = len(trials.finished)
        with tqdm(
            total=max(evolution.trials, finished),
            initial=finished,
            desc="evolving",
            unit="trial",
            disable=finished >= evolution.trials,
        ) as bar:

            def told(done: Done) -> None:
                found = trials.finished
                bar.update(len(found) - bar.n)
                bar.set_postfix_str(self._best(known, found))

            trials.run(evolution.trials, evaluate, told)

    def _best(self, known: Known, found: list[Done]) -> str:
        """The best so far within the budget, for the progress bar."""
        best = self._wanted(known, found)
        return f"best {best.values[1]:.1f} dB at {_relative(best, known):.2f} of dense"

    def _wanted(self, known: Known, found: list[Done]) -> Done:
        return within(
            found,
            lambda d: _relative(d, known),
            lambda d: d.values[1],
            most_time=self.settings.budget.time,
        )

    def _finish(self, known: Known, found: list[Done]) -> Outcome:
        """Measure the front, and choose."""
        if not found:
            raise AccelError("the study has no finished trial; search.trials is at least 1")
        front = unbeaten(found, lambda d: d.values[0], lambda d: d.values[1])
        wanted = self._wanted(known, found)
        tried = {d.number: d for d in spread(front, self.settings.points, lambda d: d.values[0])}
        tried[wanted.number] = wanted
        plans = {
            f"{self.host.config.name}-{d.number:03d}": plan_of(
                known,
                known.resolver.resolve(d.genome),
                self.settings,
                self.host,
                f"{self.host.config.name}-{d.number:03d}",
                d.genome,
            )
            for d in tried.values()
        }
        numbers = dict(zip(plans, tried, strict=True))
        others = self._recipes(known)
        own = self._own_dense(known, plans)
        bench = Bench(
            self.host,
            Objective(
                self.host,
                self.folder,
                known.digest,
                fidelity="whole",
                steps=self.host.steps,
                seed=self.settings.seed,
            ),
            self.folder / f"measured-{known.digest}.json",
            self.settings.seed,
        )
        prompts = self.host.config.calibration
        measured = bench.measure({**own, **plans, **others}, prompts, "measuring")
        points = [Point(n, p, measured[n], numbers[n]) for n, p in plans.items()]
        recipes = [Point(n, p, measured[n]) for n, p in others.items()]
        dense = measured.get(OWN_DENSE)
        chosen = self._choose(known, points, numbers_wanted=wanted.number)
        prediction = self._prediction([*points, *recipes])
        points = [_with_measured(p, dense, prediction) for p in points]
        chosen = next(p for p in points if p.name == chosen.name)
        kept = unbeaten(points, lambda p: 1 / p.measured.speedup, lambda p: p.measured.psnr)
        outcome = Outcome(
            chosen.plan,
            chosen,
            tuple(kept),
            tuple(recipes),
            dense,
            tuple(found),
            known.resolver.fastest_dense,
            prediction,
        )
        self._write(known, outcome)
        return outcome

    def _choose(self, known: Known, points: list[Point], numbers_wanted: int) -> Point:
        """The plan of the budget: by predicted time, or by the PSNR that was measured."""
        least = self.settings.budget.psnr
        if least is None:
            return next(p for p in points if p.trial == numbers_wanted)
        return within(
            points,
            lambda p: 1 / p.measured.speedup,
            lambda p: p.measured.psnr,
            most_time=1.0,
            least_quality=least,
        )

    def _recipes(self, known: Known) -> dict[str, Plan]:
        return {
            name: known_price(known, calibrated_recipe(self.host, name, self.folder))
            for name in self.settings.recipes
        }

    def _own_dense(self, known: Known, plans: Mapping[str, Plan]) -> dict[str, Plan]:
        """Accel's own dense attention, where it is the fastest dense run to compare with."""
        if not any(plan.dense == "kernel" for plan in plans.values()):
            return {}
        word = "full" if self.settings.precisions[0] == "full" else "half"
        return {OWN_DENSE: recipe(word, known.geometry)}

    def _prediction(self, points: list[Point]) -> Calibration | None:
        """How far predictions were from what was measured; None for costs of another device."""
        pairs = [
            (p.predicted_seconds, p.measured.seconds)
            for p in points
            if p.predicted_seconds is not None
        ]
        if self.settings.hardware != HERE or len(pairs) < 4:
            return None
        # every other one in order of time, so that both halves span the front
        ordered = sorted(pairs)
        return calibrated(ordered[::2], ordered[1::2])

    def _write(self, known: Known, outcome: Outcome) -> None:
        """front.json, the plan files it names, and the pictures."""
        listed = []
        for point in outcome.points:
            path = point.plan.save(self.folder / "plans" / f"{point.name}.json")
            listed.append(point.to_dict(f"plans/{path.name}"))
        front = {
            "schema": 1,
            "model": self.host.config.name,
            "points": listed,
            "recipes": [p.to_dict(p.name) for p in outcome.recipes],
            "own_dense_speedup": outcome.dense.speedup if outcome.dense else None,
            "dense_seconds": known.dense_seconds,
            "trials": len(outcome.trials),
            "chosen": outcome.chosen.name,
            "prediction": None if outcome.prediction is None else str(outcome.prediction),
            "calibration": list(self.host.config.calibration),
            "seed": self.settings.seed,
            "device": device_name(self.host.device),
            "versions": versions("optuna"),
        }
        write_atomically(self.folder / "front.json", json.dumps(front, indent=1))
        draw_front(outcome, known.dense_seconds, self.folder / "front.png")
        draw_heads(outcome.plan, self.folder / "heads.png")


def warm_start(known: Known, repair: Any, population: int) -> list[Genome]:
    """Plans of one level everywhere, evenly spaced: the front of the calibration."""
    levels = known.genes.levels
    ranks = [1 + round(i * (levels - 2) / (population - 1)) for i in range(population)]
    return list(dict.fromkeys(repair(known.genes.uniform(level)) for level in ranks))


def cold_start(known: Known, repair: Any, population: int, seed: int) -> list[Genome]:
    """Random genomes: what evolution begins with when nothing was calibrated for it."""
    from random import Random

    rng = Random(f"{seed} cold")
    return list(dict.fromkeys(repair(known.genes.random(rng)) for _ in range(population)))


def known_price(known: Known, plan: Plan) -> Plan:
    """A recipe with its prediction where its block is that of the tables, else as it is."""
    shape = next(iter(known.tables.values())).shape
    if plan.block != shape.block or not set(plan.precisions) <= known.tables.keys():
        return plan
    return known.priced(plan)


def _relative(done: Done, known: Known) -> float:
    """Predicted time of a trial as a fraction of the fastest dense run."""
    return done.values[0] / known.resolver.fastest_dense


def _with_measured(point: Point, dense: Measured | None, prediction: Calibration | None) -> Point:
    expected = {
        **point.plan.expected,
        "psnr": point.measured.psnr,
        "measured_psnr": point.measured.psnr,
        "measured_seconds": point.measured.seconds,
        "measured_speedup": point.measured.speedup,
    }
    if dense is not None:
        expected["measured_speedup_over_own_dense"] = point.measured.speedup / dense.speedup
    if prediction is not None:
        expected["prediction"] = str(prediction)
    return replace(point, plan=replace(point.plan, expected=expected))


def describe(outcome: Outcome, settings: SearchSettings) -> Iterable[str]:
    """What a person wants to know of a finished search, line by line."""
    best, points = outcome.best_dense_speedup, outcome.points
    chosen = outcome.chosen
    slowest, fastest = points[0].measured, points[-1].measured
    yield (
        f"front: {len(points)} plans measured, of {len(outcome.trials)} trials:"
        f" {slowest.speedup / best:.2f}x at {slowest.psnr:.1f} dB to {fastest.speedup / best:.2f}x"
        f" at {fastest.psnr:.1f} dB, over the fastest dense"
    )
    yield (
        f"plan {chosen.plan.name!r} ({chosen.plan.digest}): it would generate in"
        f" {chosen.measured.seconds:.1f} s, {chosen.measured.speedup:.2f} times as fast as the"
        f" host's dense attention and {chosen.measured.speedup / best:.2f} times the fastest dense"
        f" here, at {chosen.measured.psnr:.1f} dB (on {len(chosen.measured.by_prompt)} calibration"
        " prompts)"
    )
    limit = settings.budget
    if limit.psnr is not None and chosen.measured.psnr < limit.psnr:
        yield (
            f"the budget of {limit.psnr:g} dB is not reached: this is the best plan of the front;"
            " make schedule.dense_start larger, or add candidates that keep more to the space"
        )
    took = chosen.plan.expected["seconds"] / chosen.plan.expected["dense_seconds"]
    if limit.psnr is None and took / outcome.fastest_dense > limit.time + 0.01:
        yield (
            f"the budget of {limit.time:g} is not reached: this is the fastest plan of the front;"
            " make schedule.dense_start smaller, or add cheaper candidates to the space"
        )
    said = cost_sentence(chosen.plan.expected)
    yield f"costs: {said}" + (f"; {outcome.prediction}" if outcome.prediction else "")
