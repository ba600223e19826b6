"""Times of jobs measured in turn, so that a busy machine or a warm chip shifts all alike."""

import time
from collections.abc import Callable, Hashable, Mapping
from math import ceil, inf
from typing import TypeVar

import torch

__all__ = ["in_turns", "quantile", "warm_up"]

Job = Callable[[], object]
Name = TypeVar("Name", bound=Hashable)


def in_turns(
    jobs: Mapping[Name, Job],
    device: torch.device,
    *,
    rounds: int,
    repeats: Mapping[Name, int] | None = None,
    limit_s: float | None = None,
) -> dict[Name, list[float]]:
    """Seconds of one call of every job, one entry a round; entry i of all is of the same round.

    A round visits every job, every other one backwards. Jobs run once before the rounds, unless
    `repeats` says that they are warm (see `warm_up`), and how many calls a sample is the mean of.
    limit_s: no round begins after so many seconds of rounds, once there are three. CUDA events
    measure on a GPU, the clock elsewhere.
    """
    if repeats is None:
        repeats = {name: warm_up(job, device) for name, job in jobs.items()}
    times: dict[Name, list[float]] = {name: [] for name in jobs}
    began = time.perf_counter()
    for turn in range(rounds):
        if limit_s is not None and turn >= 3 and time.perf_counter() - began > limit_s:
            break
        for name in list(jobs)[:: 1 if turn % 2 == 0 else -1]:
            times[name].append(_sample(jobs[name], repeats[name], device))
    return times


def warm_up(job: Job, device: torch.device, *, seconds: float = 0.0, sample_s: float = 0.0) -> int:
    """Run a job once and for so many seconds; returns how many of its calls fill `sample_s`."""
    began, fastest = time.perf_counter(), inf
    while True:
        fastest = min(fastest, _sample(job, 1, device))
        if time.perf_counter() - began >= seconds:
            return max(1, ceil(sample_s / max(fastest, 1e-9)))


def quantile(values: list[float], share: float) -> float:
    """The value below which `share` of the values lie, linear between neighbours."""
    return float(torch.tensor(values, dtype=torch.float64).quantile(share))


def _sample(job: Job, repeats: int, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(repeats):
            job()
        return (time.perf_counter() - start) / repeats
    # what waits in the queue is no part of the sample
    torch.cuda.synchronize(device)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream = torch.cuda.current_stream(device)
    first.record(stream)
    for _ in range(repeats):
        job()
    last.record(stream)
    last.synchronize()
    return first.elapsed_time(last) / 1000 / repeats
