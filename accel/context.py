"""Where in a run a denoiser call stands: step, number of steps, guidance branch.

Sources, in this order: what the caller says (`with accel.step(i, n): ...`), the cache context that
a diffusers pipeline attaches to the call, the index of the pipeline's scheduler, and for schedulers
without one the call's own timestep (`accel.timesteps`). All are public; none costs a device
synchronisation.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from accel.timesteps import StepCounter, position

BRANCHES = {
    "cond": "cond",
    "pred_cond": "cond",
    "uncond": "uncond",
    "pred_uncond": "uncond",
    "cond_uncond": "batched",
}


@dataclass(frozen=True, slots=True)
class Where:
    """Step `step` (from 0) of `total`, in guidance branch `branch` ("" when there is only one).

    run: an object that every run has a new one of (the timesteps of its scheduler), None where
        nothing tells runs apart.
    block: of a text that is made block by block, its number, and step and steps in it.
    endless: nobody knows how many blocks follow, so that progress is of each of them.
    assumed: the step is where the scheduler stands, which is the truth only if somebody steps it,
        or was counted.
    """

    step: int
    total: int
    branch: str = ""
    run: Any = field(default=None, compare=False, repr=False)
    block: tuple[int, int, int] | None = field(default=None, compare=False, repr=False)
    endless: bool = field(default=False, compare=False, repr=False)
    assumed: bool = field(default=False, compare=False, repr=False)


_said = threading.local()


@contextmanager
def step(index: int, total: int, branch: str = "") -> Iterator[None]:
    """Say where a custom denoising loop stands: step `index` (from 0) of `total`.

    Holds for the calling thread, for every denoiser called inside the block. Guidance as several
    calls of one step belongs inside one block, or names its branches. A loop that leaves out steps
    has its masks made anew after each gap.

    >>> for i, t in enumerate(timesteps):            # doctest: +SKIP
    ...     with accel.step(i, len(timesteps)):
    ...         velocity = transformer(latents, t, prompt)
    """
    if not 0 <= index < total:
        raise ValueError(f"accel.step({index}, {total}): the step must be within 0 .. {total - 1}")
    with standing(Where(index, total, branch)):
        yield


@contextmanager
def standing(where: Where) -> Iterator[None]:
    """`step` for a loop that also tells its runs apart."""
    before = getattr(_said, "where", None)
    _said.where = where
    try:
        yield
    finally:
        _said.where = before


def locate(
    cache_context: Any, scheduler: Any, timestep: Any = None, counter: StepCounter | None = None
) -> Where | None:
    """The place of the current call, or None when no source knows it.

    cache_context: diffusers' `CacheContext` or None; scheduler: the pipeline's scheduler or None.
    timestep: of the call; counter: of the calls so far, for a timestep that is not found.
    A scheduler that has not stepped yet stands at its begin index. One whose steps were never set
    knows nothing: its timesteps are those of training.
    """
    said = getattr(_said, "where", None)
    if said is not None:
        return said
    name = getattr(cache_context, "name", None) or ""
    branch = BRANCHES.get(name, name)
    index = getattr(cache_context, "step_index", None)
    total = getattr(cache_context, "num_inference_steps", None)
    timesteps = getattr(scheduler, "timesteps", None)
    if getattr(scheduler, "num_inference_steps", None) is None:
        timesteps = None
    assumed = False
    if index is None and timesteps is not None:
        if hasattr(scheduler, "step_index"):
            index, assumed = scheduler.step_index, True
            if index is None:
                index = scheduler.begin_index or 0
        else:
            index = position(timestep, timesteps)
            if index is None and counter is not None:
                index, assumed = counter.index(timestep, timesteps, branch), True
        total = None
    if total is None:
        total = None if timesteps is None else len(timesteps)
    if index is None or total is None or not 0 <= index < total:
        return None
    return Where(int(index), int(total), branch, run=timesteps, assumed=assumed)
