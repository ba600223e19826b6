"""Attention inside windows of tokens that are gathered from anywhere, and scattered back."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from accel.kernels.arguments import check_tensors
from accel.kernels.attention import sparse_attention
from accel.kernels.block_mask import BlockMask

__all__ = ["window_attention"]


def window_attention(
    q: Float[Tensor, "batch heads tokens dim"],
    k: Float[Tensor, "batch heads tokens dim"],
    v: Float[Tensor, "batch heads tokens dim"],
    windows: Int[Tensor, "*images kept size"],
    *,
    bias: Float[Tensor, "heads size_ size_"] | None = None,
    scale: float | None = None,
    precision: str = "full",
) -> Float[Tensor, "batch heads tokens dim"]:
    """``softmax(scale q kᵀ + bias) v`` among the tokens of each window; 0 for tokens in none.

    Window pruning (SparseViT, arXiv 2303.17605): attention runs in the kept windows alone, whose
    tokens stay where they are.

    windows: natural tokens of every kept window, one list for all batch elements or one each. No
        token is in two windows; windows are of one size.
    bias: added to the logits of every window, as Swin's relative positions are.
    scale: factor on the logits, ``dim ** -0.5`` unless given; precision: as of
        ``sparse_attention``.

    Without a bias it is block-sparse attention in the order of the windows, one block to a window:
    nothing is gathered in memory. With one, windows are gathered for torch's own attention.
    """
    check_tensors(q, k, v)
    batch, heads, tokens, _ = q.shape
    windows = windows if windows.ndim == 3 else windows[None]
    if windows.shape[0] not in (1, batch):
        raise ValueError(
            f"windows must be for 1 or {batch} batch elements, got {tuple(windows.shape)}"
        )
    if bias is not None and bias.shape != (heads, *[windows.shape[2]] * 2):
        raise ValueError(
            f"bias must be {[heads, *[windows.shape[2]] * 2]}, got {tuple(bias.shape)}"
        )
    # a compiler that traces the call has no values to look at
    if windows.device.type == "cpu" and windows.numel() and not torch.compiler.is_compiling():
        _check_tokens(windows, tokens)
    if windows.numel() == 0:
        return torch.zeros_like(q, memory_format=torch.contiguous_format)
    if bias is not None:
        return _gathered(q, k, v, windows.expand(batch, -1, -1), bias.to(q.dtype), scale)
    shared = slice(None) if windows.shape[0] == 1 else None
    parts = []
    for b in range(windows.shape[0]):
        some = slice(b, b + 1) if shared is None else shared
        mask, order = _one_block_each(windows[b], heads, tokens)
        parts.append(
            sparse_attention(
                q[some], k[some], v[some], mask, order=order, scale=scale, precision=precision
            )
        )
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _check_tokens(windows: Tensor, tokens: int) -> None:
    low, high = (int(x) for x in torch.aminmax(windows))
    if low < 0 or high >= tokens:
        raise ValueError(f"windows must hold tokens 0..{tokens - 1}, got {low}..{high}")
    for one in windows:
        most, token = torch.bincount(one.flatten()).max(0)
        if most > 1:
            raise ValueError(f"token {int(token)} is in {int(most)} places of the windows")


def _one_block_each(windows: Tensor, heads: int, tokens: int) -> tuple[BlockMask, Tensor]:
    """Windows first and the other tokens behind them; window i attends to block i alone."""
    kept, size = windows.shape
    other = torch.ones(tokens, dtype=torch.bool, device=windows.device)
    other[windows.flatten()] = False
    # the stable sort of a mask is its tokens in order, and waits for no device
    behind = torch.argsort((~other).byte(), stable=True)[: tokens - kept * size]
    block = torch.arange(-(-tokens // size), dtype=torch.int32, device=windows.device)
    mask = BlockMask(
        counts=(block < kept).int().expand(1, heads, -1).contiguous(),
        indices=block[:, None].expand(1, heads, -1, -1).contiguous(),
        block=(size, size),
        q_length=tokens,
        kv_length=tokens,
    )
    return mask, torch.cat([windows.flatten(), behind])


def _gathered(q, k, v, windows: Tensor, bias: Tensor, scale: float | None) -> Tensor:
    batch, kept, size = windows.shape
    tokens = windows.flatten(1)[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])
    inner_q, inner_k, inner_v = (
        x.gather(2, tokens).unflatten(2, (kept, size)).transpose(1, 2).flatten(0, 1)
        for x in (q, k, v)
    )
    found = F.scaled_dot_product_attention(inner_q, inner_k, inner_v, attn_mask=bias, scale=scale)
    found = found.unflatten(0, (batch, kept)).transpose(1, 2).flatten(2, 3)
    return torch.zeros_like(q, memory_format=torch.contiguous_format).scatter_(2, tokens, found)
