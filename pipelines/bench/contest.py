"""Rivals for one job: each is checked first, and those that pass are timed in turn."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import cycle
from math import isfinite
from statistics import median
from typing import TypeVar

import torch
from torch import Tensor

from accel.pipelines.bench.case import BenchSettings
from accel.pipelines.bench.gate import Gate
from accel.pipelines.bench.inputs import Inputs
from accel.timing import Job, in_turns, warm_up

Run = Callable[[Tensor, Tensor, Tensor], Tensor]
Key = TypeVar("Key")


@dataclass(frozen=True, slots=True, eq=False)
class Rival:
    """make: gives the job, on q, k and v; precision: what arithmetic it is allowed; contiguous:
    it gets its inputs head by head, and their conversion is no part of its time.
    """

    make: Callable[[], Run]
    precision: str = "full"
    contiguous: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a rival. seconds: one entry a round, none where it was not timed. price: its
    time as a multiple of the baseline's, the median of paired ratios. note: why there is no time,
    or what the first call took where it was no call like the others.
    """

    seconds: tuple[float, ...] = ()
    price: float | None = None
    error: float | None = None
    limit: float | None = None
    note: str = ""


def contest(
    rivals: Mapping[Key, Rival],
    gate: Gate,
    inputs: list[Inputs],
    settings: BenchSettings,
    baseline: Run | None,
) -> dict[Key, Outcome]:
    """The outcome of every rival; one that cannot be made, fails or is wrong harms no other.

    baseline: the dense attention that takes its turn with them, already checked; None: no prices.
    """
    outcomes: dict[Key, Outcome] = {}
    firsts: dict[Key, float] = {}
    jobs: dict[Key | None, Job] = {}
    repeats: dict[Key | None, int] = {}
    for key, rival in rivals.items():
        try:
            some = _head_by_head(inputs) if rival.contiguous else inputs
            start = time.perf_counter()
            run = rival.make()
            result = run(*some[0])
            _finish(settings.device)
            firsts[key] = time.perf_counter() - start
            error, limit = gate.error(result), gate.limit(rival.precision)
            del result
            job = _rotated(run, some)
            passed = error <= limit  # never so for NaN
            calls = _warmed(job, settings) if passed else 0
        except Exception as problem:  # a rival is anybody's code
            outcomes[key] = Outcome(note=reason(problem))
            continue
        outcomes[key] = Outcome(
            error=error if isfinite(error) else None,
            limit=limit,
            note="" if passed else f"not timed: its error is {error:.1e}, the limit {limit:.1e}",
        )
        if passed:
            jobs[key], repeats[key] = job, calls
    if not jobs:
        return outcomes
    if baseline is not None:
        jobs[None] = _rotated(baseline, inputs)
        repeats[None] = _warmed(jobs[None], settings)
    times = in_turns(
        jobs,
        settings.device,
        rounds=settings.rounds,
        repeats=repeats,
        limit_s=settings.limit_s,
    )
    dense = times.pop(None, None)
    for key, outcome in outcomes.items():
        if key in times:
            seconds = times[key]
            pairs = None if dense is None else zip(seconds, dense, strict=True)
            outcomes[key] = replace(
                outcome,
                seconds=tuple(seconds),
                price=None if pairs is None else median(a / b for a, b in pairs),
                note=_compile_time(firsts[key], median(seconds)),
            )
    return outcomes


def _warmed(job: Job, settings: BenchSettings) -> int:
    """How many calls make a sample of a job, which is warm then."""
    seconds, sample_s = settings.warm_up_ms / 1000, settings.sample_ms / 1000
    return warm_up(job, settings.device, seconds=seconds, sample_s=sample_s)


def _finish(device: torch.device) -> None:
    """Wait until what fails on the device has failed."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _rotated(run: Run, inputs: list[Inputs]) -> Job:
    # the first have been looked at already
    turn = cycle([*inputs[1:], inputs[0]])
    return lambda: run(*next(turn))


def _head_by_head(inputs: list[Inputs]) -> list[Inputs]:
    return [(q.contiguous(), k.contiguous(), v.contiguous()) for q, k, v in inputs]


def _compile_time(first: float, usual: float) -> str:
    return f"first call {first:.1f} s" if first > 1 + 5 * usual else ""


def reason(problem: Exception) -> str:
    """One line that names what a rival failed of."""
    lines = str(problem).strip().splitlines()
    return f"{type(problem).__name__}: {lines[0] if lines else ''}"[:160]
