"""What one block of a vision transformer leaves for the next: how tokens are grouped.

It cannot ride with the tensor that passes between blocks, so it lives beside the model. A block
that is computed again for its gradients (checkpointing) comes out of order, later, maybe after
other calls of the model; it is known by where in memory its input is, which its checkpoint keeps
alive.
"""

from collections import OrderedDict
from typing import NamedTuple

from torch import Tensor

from accel.backward import in_backward
from accel.errors import AccelError
from accel.token_groups import Groups

__all__ = ["Carried", "States"]

CALLS = 16  # whose blocks may be computed again


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
    """Of one model with so many blocks."""

    def __init__(self, blocks: int) -> None:
        self._most = CALLS * blocks
        self._next: _Next | None = None
        self._entered: OrderedDict[tuple[int, int], Carried] = OrderedDict()
        self._length = 0

    def enter(self, block: int, x: Tensor, whole: bool, again: bool) -> Carried:
        """What enters a block. again: blocks may be computed again."""
        key = (block, x.data_ptr()) if again else None
        if key is not None and in_backward() and key in self._entered:
            return self._entered[key]
        groups, spread = None, False
        if block == 0:
            self._length = x.shape[1]
        elif self._next is not None and self._next.block == block:
            groups, spread = self._next.groups, self._next.whole
        elif x.shape[1] != self._length:  # else somebody runs the model from here on
            raise AccelError(
                f"block {block} was called with {x.shape[1]} tokens, and nothing is known of them:"
                f" more than {CALLS} calls of the model may have been made between a call and its"
                " gradients; go backwards earlier, or leave `tokens` out of the plan"
            )
        carried = Carried(groups, spread, whole)
        if key is not None:
            self._entered.pop(key, None)
            self._entered[key] = carried
            while len(self._entered) > self._most:
                self._entered.popitem(last=False)
        return carried

    def leave(self, block: int, groups: Groups | None, *, whole: bool) -> None:
        """What a block leaves, beside its output."""
        self._next = _Next(block + 1, groups, whole)

    def end(self) -> None:
        """No block follows."""
        self._next = None
