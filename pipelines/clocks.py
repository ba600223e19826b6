"""Which scheduler tells the step, where several pipelines share one denoiser."""

import weakref
from collections.abc import Callable
from typing import Any


class Clocks:
    """The schedulers of the pipelines that accel was enabled on for one denoiser.

    Pipelines are not kept alive, and may be given other schedulers at any time.
    """

    def __init__(self, pipelines: tuple[Callable[[], Any], ...] = ()) -> None:
        self._pipelines = pipelines
        self._seen = {id(s): _state(s) for s in self._schedulers()}
        self._last: Any = None

    def with_pipeline(self, target: Any) -> "Clocks":
        """These and the scheduler of `target`, if it is a pipeline."""
        known = any(pipeline() is target for pipeline in self._pipelines)
        if known or not hasattr(target, "scheduler"):
            return Clocks(self._pipelines)
        try:
            # the denoiser must not keep its pipeline alive
            pipeline: Callable[[], Any] = weakref.ref(target)
        except TypeError:

            def pipeline() -> Any:
                return target

        return Clocks((*self._pipelines, pipeline))

    def running(self) -> Any:
        """The scheduler of the run that a call belongs to, None where that cannot be told.

        Of several it is the one whose timesteps were set since the last call, else the one that
        stepped, else the one of the last call. One that came to its end is not running; where that
        leaves one alone, it is the one.
        """
        schedulers = self._schedulers()
        if len(schedulers) < 2:
            return schedulers[0] if schedulers else None
        states = {id(s): _state(s) for s in schedulers}
        seen, self._seen = self._seen, states
        before = {key: seen.get(key, (None, None)) for key in states}
        open_ = [s for s in schedulers if _is_open(s)]
        began = [s for s in open_ if before[id(s)][0] is not states[id(s)][0]]
        stepped = [s for s in open_ if before[id(s)][1] != states[id(s)][1]]
        chosen = began or stepped or [s for s in open_ if s is self._last] or open_
        self._last = chosen[0] if len(chosen) == 1 else None
        return self._last

    def _schedulers(self) -> list[Any]:
        found = (getattr(pipeline(), "scheduler", None) for pipeline in self._pipelines)
        return list({id(s): s for s in found if s is not None}.values())


def _state(scheduler: Any) -> tuple[Any, Any]:
    return getattr(scheduler, "timesteps", None), getattr(scheduler, "step_index", None)


def _is_open(scheduler: Any) -> bool:
    timesteps, index = _state(scheduler)
    if timesteps is None or getattr(scheduler, "num_inference_steps", None) is None:
        return False
    return index is None or index < len(timesteps)
