"""A plan's cache for models that keep the keys of their prefix themselves (DiffusionGemma).

Such a model denoises a canvas whose queries see the keys of everything before it, which stay as
they are until the next canvas, and their own. A cache then thins out the prefix: `keep` of it is
chosen at every site by the canvas' queries after `delay` steps of each canvas (Sparse-dLLM), or
what the canvas saw of it is merged with what it sees of itself (`external: frozen`, FlashBlock).
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from accel.context import Where, standing
from accel.layout import Layout
from accel.pipelines.call_feed import CallFeed
from accel.text_step import TextStep, current, text_step
from accel.token_cache import TokenCache

__all__ = ["PrefixFeed", "has_prefix"]


def has_prefix(pipeline: Any) -> bool:
    """Whether a pipeline calls its model as this module has it."""
    return any(cls.__name__ == "DiffusionGemmaPipeline" for cls in type(pipeline).__mro__)


class PrefixFeed(CallFeed):
    """Follows the calls of one model. `undo` takes all of it away.

    plan_cache: the cache of the plan that is enabled at the moment.
    """

    def __init__(self, model: nn.Module, pipeline: Any, plan_cache: Callable[[], Any]) -> None:
        self._scheduler, self._plan_cache = pipeline.scheduler, plan_cache
        self._run, self._index = object(), 0
        self._canvas: tuple[int, int] | None = None
        self._turn = 0
        super().__init__(model)

    def _before(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        keys, canvas = kwargs.get("past_key_values"), kwargs.get("decoder_input_ids")
        if current() is not None or keys is None or not isinstance(canvas, Tensor):
            return
        seen = (id(keys), int(keys.get_seq_length()))
        if self._canvas is None or self._canvas[0] != seen[0] or seen[1] < self._canvas[1]:
            self._run, self._index = object(), -1
        if seen != self._canvas:
            self._turn, self._index = -1, self._index + 1
        self._turn, self._canvas = self._turn + 1, seen
        cache: TokenCache | None = self._plan_cache()
        length = canvas.shape[1]
        whole = cache is None or cache.whole(self._turn)
        step = TextStep(
            (Layout.of((1, 1, length)),),
            (0, length),
            (0, length),
            fills=cache is not None and whole and cache.holds,
            beside="whole" if whole else "thinned",
        )
        steps = self._scheduler.num_inference_steps
        at = min(self._turn, steps - 1)
        where = Where(at, steps, run=self._run, block=(self._index, at, steps), endless=True)
        self._stack.enter_context(standing(where))
        self._stack.enter_context(text_step(step))
