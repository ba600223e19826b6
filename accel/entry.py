"""The start of a denoiser call, in eager and in compiled models.

What a session does there depends on step, plan and layout, so that in a compiled model it is behind
one opaque operation, as attention is (`accel.intercept`).
"""

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from accel.call_values import Packed, pack, unpack

__all__ = ["UNSAFE", "Entry"]

# A captured CUDA graph would replay the decisions of the step it was captured in.
UNSAFE = (torch.Tag.cudagraph_unsafe,)

_numbers = itertools.count()
# an operation gets a number, because it cannot take an object; entries live as long as their models
_entries: "weakref.WeakValueDictionary[int, Entry]" = weakref.WeakValueDictionary()


class Entry:
    """The start of a denoiser call: `begin(values)` tells the session where it stands, by the
    values of some of the call's arguments.
    """

    def __init__(self, begin: Callable[[Sequence[Any]], None]) -> None:
        self._begin = begin
        number = next(_numbers)
        self.number = torch.tensor(number, device="cpu")  # a tensor, as sites are named
        _entries[number] = self

    def __call__(self, first: Tensor, values: Sequence[Any]) -> Tensor:
        """Pass a tensor of the call through; it comes back unchanged."""
        if torch.compiler.is_compiling():
            packed = pack(values)
            return torch.ops.accel.enter(
                first, packed.shape, packed.tensors, packed.numbers, self.number
            )
        self._begin(values)
        return first


@torch.library.custom_op("accel::enter", mutates_args=(), tags=UNSAFE)
def _enter(
    first: Tensor, shape: str, tensors: list[Tensor], numbers: list[int], entry: Tensor
) -> Tensor:
    _entries[int(entry)]._begin(unpack(Packed(shape, tensors, numbers)))
    return first.clone()


@_enter.register_fake
def _(first: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(first)


def _note_lengths(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    # torch takes a list without elements for one of tensors
    ctx.tensors, ctx.numbers = len(inputs[2]), None if inputs[3] else []


def _pass_back(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return grad, None, [None] * ctx.tensors, ctx.numbers, None


# latents may be what is differentiated by
_enter.register_autograd(_pass_back, setup_context=_note_lengths)
