"""Swin's attention inside windows by accel's own kernel, where that is faster: on a GPU.

The host's way writes the logits of every head to memory several times (its `fused_attn` is off by
default), and copies a mask for each window; the kernel reads the bias and the masks as they are.
Projections and the bias are the host's own.
"""

from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from accel.kernels.arguments import DTYPES, MAX_DIM
from accel.kernels.window_attention import window_attention

__all__ = ["fused", "runs_fused"]


def runs_fused(attn: Any, x: Tensor) -> bool:
    """Whether the kernel computes this call: of Swin v1, on CUDA, without a gradient or dropout."""
    return (
        x.is_cuda
        and find_spec("triton") is not None
        and hasattr(attn, "relative_position_bias_table")
        and not torch.is_grad_enabled()
        and not (attn.training and attn.attn_drop.p > 0)
        and x.dtype in DTYPES
        and attn.qkv.out_features <= 3 * attn.num_heads * MAX_DIM
    )


def fused(
    attn: Any,
    x: Float[Tensor, "windows size channels"],
    masks: Float[Tensor, "kinds size size"] | None,
    kind: Int[Tensor, " windows"],
) -> Float[Tensor, "windows size channels"]:
    """``attn(x, mask=masks[kind])`` of a Swin v1's `WindowAttention`."""
    count, size, _ = x.shape
    qkv = attn.qkv(x).view(1, count * size, 3, attn.num_heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    # already gathered, window after window
    windows = torch.arange(count * size, device=x.device).view(1, count, size)
    chosen = None if masks is None else kind[None]
    bias = attn._get_rel_pos_bias()[0]
    out = window_attention(q, k, v, windows, bias=bias, masks=masks, kind=chosen, scale=attn.scale)
    return attn.proj_drop(attn.proj(out.transpose(1, 2).reshape(count, size, -1)))
