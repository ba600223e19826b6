"""Attention masks that only say which keys are padding."""

from typing import Any, no_type_check

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor

__all__ = ["KeyPadding", "valid_of"]


def valid_of(mask: Tensor, batch: int, tokens: int) -> Bool[Tensor, "batch tokens"] | None:
    """The keys that a mask leaves, where it is boolean, the same for all heads and all queries:
    `[batch or 1, 1, 1, tokens]`; None for every other mask.
    """
    if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1:] != (1, 1, tokens):
        return None
    return mask[:, 0, 0].expand(batch, tokens)


class KeyPadding:
    """Goes through the code of an attention processor in the place of a mask of keys and stays a
    vector for each sample, where that code would make a matrix of it.

    HunyuanVideo 1.5 makes one of tokens x tokens for every sample, in every layer and step:
    2.6 GB at 51,275 tokens. It differs from this mask in the rows of padding alone, which nothing
    reads. Of a tensor it has what such code asks for: shape, `bool`, and the methods that lay
    rows and columns over each other, which all give it back.
    """

    __slots__ = ("mask", "shape", "valid")

    # a compiler sees these made and used, and cannot follow what would check their types

    @no_type_check
    def __init__(self, valid: Bool[Tensor, "batch tokens"]) -> None:
        self.valid = valid
        self.shape = valid.shape
        self.mask = valid[:, None, None]  # for attention

    @no_type_check
    def _itself(self, *_):
        return self

    bool = view = repeat = transpose = __and__ = _itself

    @staticmethod
    def pad(x: Any, pad: Any, mode: str = "constant", value: Any = None) -> Any:
        """`torch.nn.functional.pad`, also of these."""
        if isinstance(x, KeyPadding):
            return KeyPadding(F.pad(x.valid, pad, mode, value))
        return F.pad(x, pad, mode, value)
