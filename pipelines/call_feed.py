"""What follows the calls of a model by a pipeline with a loop of its own, and says what each is."""

from contextlib import ExitStack
from typing import Any

from torch import nn

__all__ = ["CallFeed"]


class CallFeed:
    """A hook before every call of one model and one after it. `undo` takes them away.

    `_before` may change the arguments, and enters contexts that hold for the call into `_stack`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._stack = ExitStack()
        self._hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._after, always_call=True),
        ]

    @property
    def hook_ids(self) -> tuple[int, ...]:
        return tuple(hook.id for hook in self._hooks)

    def undo(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _before(self, model: nn.Module, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError

    def _after(self, *_: Any) -> None:
        self._stack.close()
