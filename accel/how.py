"""The settings of an attention call besides its queries, keys and values."""

from math import isclose
from typing import NamedTuple

from torch import Tensor

from accel import function_modes
from accel.key_padding import valid_of

__all__ = ["How"]


class How(NamedTuple):
    """The settings of an attention call, in the order of diffusers' dispatcher and of SDPA."""

    mask: Tensor | None
    dropout: float
    causal: bool
    scale: float | None
    gqa: bool

    def valid(self, k: Tensor, tokens_first: bool) -> Tensor | None:
        """The keys that the mask leaves, where it is a mask of keys."""
        if self.mask is None:
            return None
        return valid_of(self.mask, k.shape[0], k.shape[1 if tokens_first else 2])

    def scaled(self, q: Tensor) -> Tensor:
        """Queries whose logits, scaled by dim ** -0.5 as kernels do, are those of the call."""
        own = q.shape[-1] ** -0.5
        if self.scale is None or isclose(self.scale, own):
            return q
        return q * (self.scale / own)

    def obstacle(self, valid: Tensor | None) -> str | None:
        """What no sparse kernel can do of them."""
        if self.mask is not None and valid is None:
            return "the call has an attention mask that is no mask of padding keys"
        if self.causal or self.dropout > 0:
            return "the call is causal or drops out, which the sparse kernels do not"
        if function_modes.in_force():
            return "a function mode of torch may replace attention here (perturbed guidance does)"
        return None
