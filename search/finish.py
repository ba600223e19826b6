"""The end of a search: the front generated whole, the plan that was asked for, and pictures."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accel.cost import cost_sentence
from accel.cost_calibration import Calibration, calibrated
from accel.errors import AccelError
from accel.files import write_atomically
from accel.hardware import HERE
from accel.pipelines.calibration import calibrated_recipe
from accel.pipelines.host import Host
from accel.pipelines.provenance import device_name, versions
from accel.pipelines.trade_off import hypervolume, unbeaten
from accel.plan import Plan
from accel.recipes import recipe
from accel.search.front import spread, within
from accel.search.measure import Bench, Measured
from accel.search.objective import Objective
from accel.search.picture import draw_front, draw_heads
from accel.search.prepare import Known, plan_of
from accel.search.settings import SearchSettings
from accel.search.study import Done

OWN_DENSE = "own dense"
CLOSER = 1  # plans that are measured to come closer to a budget of quality


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

    @property
    def time(self) -> float:
        """As a fraction of the host's dense generation beside it."""
        return 1 / self.measured.speedup

    @property
    def psnr(self) -> float:
        return self.measured.psnr

    def to_dict(self, path: str) -> dict[str, Any]:
        return {
            "plan": path,
            "trial": self.trial,
            "predicted_seconds": self.predicted_seconds,
            "measured_seconds": self.measured.seconds,
            "predicted_speedup": self.plan.expected.get("speedup"),
            "measured_speedup": self.measured.speedup,
            "psnr": self.psnr,
        }


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a search found. points: the front, measured whole, by falling time; recipes: beside it;
    dense: accel's own dense attention, where plans use it; fastest_dense: predicted time of the
    fastest dense generation, as a fraction of the host's; prediction: how far predictions were off.
    """

    chosen: Point
    points: tuple[Point, ...]
    recipes: tuple[Point, ...]
    dense: Measured | None
    trials: tuple[Done, ...]
    fastest_dense: float
    prediction: Calibration | None

    @property
    def plan(self) -> Plan:
        return self.chosen.plan

    @property
    def hypervolume(self) -> float:
        """Of all trials, in dB: what they dominate up to the time of the fastest dense, from 0 to
        50 dB of what trials are judged by. It tells studies of one model apart.
        """
        points = [(_time(done) / self.fastest_dense, _quality(done)) for done in self.trials]
        return hypervolume(points, floor=0.0)

    @property
    def best_dense_speedup(self) -> float:
        """Of the fastest dense generation over the host's own, measured."""
        return max(1.0, self.dense.speedup if self.dense else 1.0)


class Finish:
    """Measures what a study found, on the calibration prompts; each plan and prompt once."""

    def __init__(self, host: Host, settings: SearchSettings, folder: Path, known: Known) -> None:
        self._host = host
        self._settings = settings
        self._folder = folder
        self._known = known
        whole = Objective(
            host, folder, known.digest, fidelity="whole", steps=host.steps, seed=settings.seed
        )
        path = folder / f"measured-{known.digest}.json"
        self._bench = Bench(host, whole, path, settings.seed)

    def outcome(self, found: Sequence[Done]) -> Outcome:
        """Measure the front, choose, and write all there is to look at."""
        if not found:
            raise AccelError("the study has no finished trial; search.trials is at least 1")
        front = unbeaten(found, _time, _quality)[::-1]
        tried = spread(front, self._settings.points, _time)
        wanted = self._within_time(found)
        if wanted is not None and wanted not in tried:
            tried.append(wanted)
        plans = {self._name(done): self._plan(done) for done in tried}
        others = self._recipes()
        own = self._own_dense(plans.values())
        measured = self._measure({**own, **plans, **others})
        points = [
            Point(name, plan, measured[name], done.number)
            for (name, plan), done in zip(plans.items(), tried, strict=True)
        ]
        if wanted is None:
            points = self._closer(points, front)
        recipes = [Point(name, plan, measured[name]) for name, plan in others.items()]
        prediction = self._prediction([*points, *recipes])
        dense = measured.get(OWN_DENSE)
        points = [_with_measured(p, dense, prediction) for p in points]
        outcome = Outcome(
            self._chosen(points, wanted),
            tuple(unbeaten(points, lambda p: p.time, lambda p: p.psnr)[::-1]),
            tuple(recipes),
            dense,
            tuple(found),
            self._known.resolver.fastest_dense,
            prediction,
        )
        self._write(outcome)
        return outcome

    def _within_time(self, found: Sequence[Done]) -> Done | None:
        """The trial that a budget of time takes; None for a budget of quality."""
        most = self._settings.budget.time
        if most is None:
            return None
        fastest = self._known.resolver.fastest_dense
        return within(found, lambda d: _time(d) / fastest, _quality, most_time=most)

    def _chosen(self, points: Sequence[Point], wanted: Done | None) -> Point:
        if wanted is not None:
            return next(p for p in points if p.trial == wanted.number)
        least = self._settings.budget.psnr
        return within(
            points, lambda p: p.time, lambda p: p.psnr, most_time=1.0, least_quality=least
        )

    def _closer(self, points: list[Point], front: Sequence[Done]) -> list[Point]:
        """The points, and some more between the fastest that is good enough and the next one."""
        for _ in range(CLOSER):
            good = [p for p in points if p.psnr >= self._settings.budget.psnr]
            best = min(good, key=lambda p: p.time, default=None)
            faster = [p for p in points if best is None or p.time < best.time]
            following = max(faster, key=lambda p: p.time, default=None)
            if best is None or following is None:
                return points
            known = {p.trial for p in points}
            times = sorted(p.plan.expected["seconds"] for p in (best, following))
            between = [
                done
                for done in front
                if done.number not in known
                and times[0] < _time(done) * self._known.dense_seconds < times[1]
            ]
            if not between:
                return points
            done = between[len(between) // 2]
            plan, name = self._plan(done), self._name(done)
            points = [*points, Point(name, plan, self._measure({name: plan})[name], done.number)]
        return points

    def _measure(self, plans: Mapping[str, Plan]) -> dict[str, Measured]:
        return self._bench.measure(plans, self._host.config.calibrated_on, "measuring")

    def _name(self, done: Done) -> str:
        return f"{self._host.config.name}-{done.number:03d}"

    def _plan(self, done: Done) -> Plan:
        resolved = self._known.resolver.resolve(done.genome)
        name = self._name(done)
        return plan_of(self._known, resolved, self._settings, self._host, name, done.genome)

    def _recipes(self) -> dict[str, Plan]:
        """Published methods, priced where their blocks and precision are those of the tables."""
        plans = {}
        tables = self._known.tables
        block = next(iter(tables.values())).shape.block
        for name in self._settings.recipes:
            plan = calibrated_recipe(self._host, name, self._folder, seed=self._settings.seed)
            priced = plan.block == block and set(plan.precisions) <= tables.keys()
            plans[name] = self._known.priced(plan) if priced else plan
        return plans

    def _own_dense(self, plans: Iterable[Plan]) -> dict[str, Plan]:
        """Accel's own dense attention, where it is the fastest dense run to compare with."""
        if not any(plan.dense == "kernel" for plan in plans):
            return {}
        word = "full" if self._settings.precisions[0] == "full" else "half"
        return {OWN_DENSE: recipe(word, self._known.geometry)}

    def _prediction(self, points: Sequence[Point]) -> Calibration | None:
        """How far predictions were from what was measured; None for costs of another device."""
        pairs = sorted(
            (p.predicted_seconds, p.measured.seconds)
            for p in points
            if p.predicted_seconds is not None
        )
        if self._settings.hardware != HERE or len(pairs) < 4:
            return None
        # every other one in order of time, so that both halves span the front
        return calibrated(pairs[::2], pairs[1::2])

    def _write(self, outcome: Outcome) -> None:
        """front.json, the plan files it names, and the pictures."""
        listed = []
        for point in outcome.points:
            path = point.plan.save(self._folder / "plans" / f"{point.name}.json")
            listed.append(point.to_dict(f"plans/{path.name}"))
        front = {
            "schema": 1,
            "model": self._host.config.name,
            "points": listed,
            "recipes": [p.to_dict(p.name) for p in outcome.recipes],
            "own_dense_speedup": outcome.dense.speedup if outcome.dense else None,
            "dense_seconds": self._known.dense_seconds,
            "trials": len(outcome.trials),
            "hypervolume": outcome.hypervolume,
            "chosen": outcome.chosen.name,
            "prediction": None if outcome.prediction is None else str(outcome.prediction),
            "calibration": list(self._host.config.calibrated_on),
            "seed": self._settings.seed,
            "device": device_name(self._host.device),
            "versions": versions("optuna"),
        }
        write_atomically(self._folder / "front.json", json.dumps(front, indent=1))
        draw_front(outcome, self._known.dense_seconds, self._folder / "front.png")
        draw_heads(outcome.plan, self._folder / "heads.png")


def _time(done: Done) -> float:
    """Predicted, as a fraction of the host's dense generation."""
    return done.values[0]


def _quality(done: Done) -> float:
    return done.values[1]


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
    yield f"hypervolume of the trials: {outcome.hypervolume:.2f} dB"
    limit = settings.budget
    if limit.time is None and chosen.psnr < limit.psnr:
        yield (
            f"the budget of {limit.psnr:g} dB is not reached: this is the best plan of the front;"
            " make schedule.dense_start larger, or add candidates that keep more to the space"
        )
    took = chosen.plan.expected["seconds"] / chosen.plan.expected["dense_seconds"]
    if limit.time is not None and took / outcome.fastest_dense > limit.time + 0.01:
        yield (
            f"the budget of {limit.time:g} is not reached: this is the fastest plan of the front;"
            " make schedule.dense_start smaller, or add cheaper candidates to the space"
        )
    said = cost_sentence(chosen.plan.expected)
    yield f"costs: {said}" + (f"; {outcome.prediction}" if outcome.prediction else "")
