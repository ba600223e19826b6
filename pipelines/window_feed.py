"""A plan's cache for diffusers' `LLaDA2Pipeline`, which calls its model with all tokens up to the
end of the current block in every step, and reads the logits of that block alone.

The first call of a run is whole and fills the cache. In the later ones the model gets the block's
tokens; when a block begins, those of the block before it pass through the model once more, as they
were committed. Exact for models that are causal from block to block (LLaDA2, SDAR); for others an
approximation, as Fast-dLLM's prefix cache is.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from accel.context import Where, standing
from accel.errors import AccelError
from accel.layout import Layout
from accel.pipelines.call_feed import CallFeed
from accel.pipelines.text_models import layouts_of
from accel.text_step import TextStep, current, text_step
from accel.token_cache import TokenCache

__all__ = ["WindowFeed", "feeds_windows"]


def feeds_windows(pipeline: Any) -> bool:
    """Whether a pipeline calls its model as this module has it."""
    return any(cls.__name__ == "LLaDA2Pipeline" for cls in type(pipeline).__mro__)


class WindowFeed(CallFeed):
    """Follows the calls of one model by one pipeline. `undo` takes all of it away.

    plan_cache: the cache of the plan that is enabled at the moment; None: every call is whole.
    """

    def __init__(self, model: nn.Module, pipeline: Any, plan_cache: Callable[[], Any]) -> None:
        self._scheduler, self._plan_cache = pipeline.scheduler, plan_cache
        self._inside = False
        self._run: object = object()
        self._steps: int = self._scheduler.config.num_inference_steps
        self._block: int = self._scheduler.config.block_length
        self._restart()
        self._set_timesteps = self._scheduler.set_timesteps
        self._scheduler.set_timesteps = self._begin
        super().__init__(model)

    def undo(self) -> None:
        self._scheduler.__dict__.pop("set_timesteps", None)
        super().undo()

    def _begin(self, num_inference_steps: int, *args: Any, **kwargs: Any) -> None:
        """`set_timesteps`, which a run begins with: it says how long blocks are."""
        self._set_timesteps(num_inference_steps, *args, **kwargs)
        self._steps = num_inference_steps
        self._block = kwargs.get("block_length") or self._scheduler.config.block_length
        self._restart()

    def _restart(self) -> None:
        self._run, self._window, self._turn, self._held = object(), 0, 0, 0

    def _before(self, model: nn.Module, args: Any, kwargs: Any) -> Any:
        if self._inside or current() is not None or not args:
            return None
        tokens, mask = args[0], kwargs.get("attention_mask")
        window = tokens.shape[1]
        self._device = tokens.device
        if window < self._window:
            self._restart()
        new = window != self._window
        self._turn = 0 if new else self._turn + 1
        self._window = window
        cache: TokenCache | None = self._plan_cache()
        index, last = window // self._block - 1, self._steps - 1
        step = min(self._turn, last)
        where = Where(
            index * self._steps + step,
            (index + 1) * self._steps,
            run=self._run,
            block=(index, step, self._steps),
            endless=True,
        )
        layouts = layouts_of(tokens, mask)
        start = window - self._block
        real = None if mask is None or bool((mask != 0).all()) else mask != 0
        again = cache is not None and cache.refresh is not None and self._turn % cache.refresh == 0
        if cache is None or not self._held or (again and self._turn):
            filled = cache is not None and cache.holds
            self._held = window if filled else 0
            block, live = (start, window), (0, window)
            whole = TextStep(layouts, block, live, valid=real, fills=filled, ordered=True)
            self._enter(where, whole)
            return None
        if cache.feed != "block" or cache.keep < 1 or cache.external != "attend":
            raise AccelError(
                "LLaDA2Pipeline sees no tokens after its block, so its cache is the exact one:"
                f" feed 'block', keep 1 and external 'attend', not {cache}"
            )
        if new and self._held < window:
            # as many blocks as passed since: those that were frozen by an end of text make none
            self._inside = True
            try:
                for begin in range(self._held - self._block, start, self._block):
                    own, more = self._cut(args, kwargs, begin)
                    with standing(where), text_step(self._fed(layouts, begin, real)):
                        model(*own, **more)
            finally:
                self._inside = False
        self._held = window
        self._enter(where, self._fed(layouts, start, real))
        return self._cut(args, kwargs, start)

    def _fed(self, layouts: tuple[Layout, ...], start: int, real: Tensor | None) -> TextStep:
        stop = start + self._block
        places = torch.arange(start, stop, device=self._device)[None]
        keys = None if real is None else real[:, :stop]
        return TextStep(layouts, (start, stop), (0, stop), places, keys=keys, ordered=True)

    def _cut(self, args: Any, kwargs: Any, start: int) -> tuple[Any, dict[str, Any]]:
        """The arguments of a call with the tokens of one block."""
        stop = start + self._block
        more = {k: v for k, v in kwargs.items() if k != "attention_mask"}
        if isinstance(more.get("position_ids"), Tensor):
            more["position_ids"] = more["position_ids"][:, start:stop]
        return (args[0][:, start:stop], *args[1:]), more

    def _enter(self, where: Where, step: TextStep) -> None:
        self._stack.enter_context(standing(where))
        self._stack.enter_context(text_step(step))

    def _after(self, *_: Any) -> None:
        if not self._inside:
            super()._after()
