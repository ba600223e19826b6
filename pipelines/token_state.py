"""What one block of a vision transformer leaves for the next: how tokens are grouped."""

from typing import NamedTuple

from torch import Tensor

from accel.backward import in_backward
from accel.errors import AccelError
from accel.pipelines.between_blocks import Entered, HandedOn
from accel.token_groups import Groups

__all__ = ["Carried", "States"]


class Carried(NamedTuple):
    """groups: of the tokens that enter a block, None before the first reduction; spread: all
    patches enter, as the block before it gave them back; whole: this one gives them back too.
    """

    groups: Groups | None
    spread: bool
    whole: bool


class _Next(NamedTuple):
    block: int
    groups: Groups | None
    whole: bool


class States:
    """Of one model."""

    def __init__(self) -> None:
        self._next = HandedOn()
        self._entered = Entered()
        self._length = 0

    def enter(self, block: int, x: Tensor, whole: bool, again: bool) -> Carried:
        """What enters a block. again: blocks may be computed again."""
        if again and in_backward():
            known = self._entered.find(x, block)
            if known is not None:
                return known
        groups, spread = None, False
        left: _Next | None = self._next.get()
        if block == 0:
            self._length = x.shape[1]
        elif left is not None and left.block == block:
            groups, spread = left.groups, left.whole
        elif x.shape[1] != self._length:  # else somebody runs the model from here on
            raise AccelError(
                f"block {block} was called with {x.shape[1]} tokens, and nothing is known of them;"
                " call the model as a whole, or leave `tokens` out of the plan"
            )
        carried = Carried(groups, spread, whole)
        if again:
            self._entered.put(x, carried, block)
        return carried

    def leave(self, block: int, groups: Groups | None, *, whole: bool) -> None:
        """What a block leaves, beside its output."""
        self._next.put(_Next(block + 1, groups, whole))

    def end(self) -> None:
        """No block follows."""
        self._next.put(None)
