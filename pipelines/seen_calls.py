"""The queries and keys of SDPA calls, seen as they are made: after norms and rotary positions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from accel.intercept_calls import ARGUMENTS

__all__ = ["Seen", "SeenCalls"]

SDPA = F.scaled_dot_product_attention


class Seen(NamedTuple):
    """One call. q, k: [batch, heads, tokens, dim]; mask: added to logits, or False where a key is
    hidden; scale: of the logits.
    """

    q: Tensor
    k: Tensor
    mask: Tensor | None
    scale: float


class SeenCalls(TorchFunctionMode):
    """While the mode is on, self-attention calls are counted, and the last one is at hand.

    It is on in this thread alone, and the compiler follows it. at: numbers of calls that stay at
    hand as well, in `kept`.
    """

    def __init__(self, at: frozenset[int] = frozenset()) -> None:
        super().__init__()
        self.count = 0
        self.last: Seen | None = None
        self.kept: dict[int, Seen] = {}
        self._at = at

    def call(self, make: Callable[[], Tensor], device: torch.device) -> Tensor:
        """The output of a call, as `make` gives it."""
        return make()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not SDPA:
            return func(*args, **kwargs)
        call = {**dict(zip(ARGUMENTS, args, strict=False)), **kwargs}
        q, k, scale = call["query"], call["key"], call.get("scale")
        if q.ndim == 4 and q.shape[2] == k.shape[2]:
            own = q.shape[3] ** -0.5 if scale is None else scale
            self.last = Seen(q, k, call.get("attn_mask"), own)
            if self.count in self._at:
                self.kept[self.count] = self.last
            self.count += 1
        return self.call(lambda: func(*args, **kwargs), q.device)
