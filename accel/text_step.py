"""What a text pipeline says of each call of its model: which tokens it feeds, and what is kept."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Bool, Int
from torch import Tensor

from accel.layout import Layout

__all__ = ["TextStep", "current", "text_step"]


@dataclass(frozen=True, slots=True, eq=False)
class TextStep:
    """One call of a model in a generation.

    A whole call feeds every token that is computed at all; a place is a token's number in it.

    layouts: of a whole call, for every sample.
    block: places [start, stop) of the tokens that are being decided.
    live: places [start, stop) that calls up to the next whole one may feed.
    fed: places of the tokens that this call feeds, one row for all samples or one for each; a place
        may be there twice. None in a whole call.
    valid: which tokens of a whole call are no padding; None where all are.
    fills: keys and values of this whole call are kept for the calls after it.
    beside: the model keeps the keys of other tokens itself and gives them with the call, before
        those of its own: what the call sees of them, all or what a cache held of them.
    ordered: nothing comes after the block yet, so that a mask which hides what comes after blocks
        is honoured by that.
    keys: of a call that feeds tokens and whose cache holds padding, which live places are none.
    """

    layouts: tuple[Layout, ...]
    block: tuple[int, int]
    live: tuple[int, int]
    fed: Int[Tensor, "rows fed"] | None = None
    valid: Bool[Tensor, "batch tokens"] | None = None
    fills: bool = False
    keys: Bool[Tensor, "batch live"] | None = None
    ordered: bool = False
    beside: Literal["", "whole", "thinned"] = ""

    @property
    def cached(self) -> bool:
        """Whether the call has to do with a cache that knows padding and no other masks."""
        return (self.fed is not None or self.fills or self.beside != "") and not self.ordered


_said = threading.local()


def current() -> TextStep | None:
    """What the pipeline of this thread said of the call that is running."""
    return getattr(_said, "step", None)


@contextmanager
def text_step(step: TextStep) -> Iterator[None]:
    """Say it for the calls inside the block."""
    before = current()
    _said.step = step
    try:
        yield
    finally:
        _said.step = before
