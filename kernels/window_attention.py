"""Attention inside windows of tokens that are gathered from anywhere, and scattered back."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from accel.kernels import dispatch
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
    masks: Float[Tensor, "kinds size_ size_"] | None = None,
    kind: Int[Tensor, "*images kept"] | None = None,
    scale: float | None = None,
    precision: str = "full",
) -> Float[Tensor, "batch heads tokens dim"]:
    """``softmax(scale q kᵀ + bias + masks[kind]) v`` inside each window; 0 for tokens in none.

    Window pruning (SparseViT, arXiv 2303.17605): attention runs in the kept windows alone, whose
    tokens stay where they are.

    windows: natural tokens of every kept window, one list for all batch elements or one each. No
        token is in two windows; windows are of one size.
    bias: added to the logits of every window, as Swin's relative positions are.
    masks, kind: both or none: `masks[kind[i]]` is added to the logits of window i, as Swin's
        shifted windows at the border have it.
    scale: factor on the logits, ``dim ** -0.5`` unless given; precision: as of
        ``sparse_attention``, where there is neither bias nor mask.

    Without a bias it is block-sparse attention in the order of the windows, one block to a window:
    nothing is gathered in memory. With one, on CUDA, one kernel reads and writes tokens where they
    lie; elsewhere, and where a gradient is asked for, windows are gathered for torch's own
    attention, which gives gradients.
    """
    check_tensors(q, k, v)
    batch, heads, tokens, dim = q.shape
    windows = windows if windows.ndim == 3 else windows[None]
    if k.shape[1] != heads:
        raise ValueError(f"k and v must have the {heads} heads of q, got {k.shape[1]}")
    if windows.shape[0] not in (1, batch):
        raise ValueError(
            f"windows must be for 1 or {batch} batch elements, got {tuple(windows.shape)}"
        )
    if bias is not None and bias.shape != (heads, *[windows.shape[2]] * 2):
        raise ValueError(
            f"bias must be {[heads, *[windows.shape[2]] * 2]}, got {tuple(bias.shape)}"
        )
    kind = _checked_kind(windows, masks, kind)
    # a compiler that traces the call has no values to look at
    if windows.device.type == "cpu" and windows.numel() and not torch.compiler.is_compiling():
        _check_tokens(windows, tokens)
    if windows.numel() == 0:
        return torch.zeros_like(q, memory_format=torch.contiguous_format)
    if bias is not None or masks is not None:
        scale = dim**-0.5 if scale is None else scale
        graded = [x for x in (q, k, v, bias) if x is not None and x.requires_grad]
        asks = torch.is_grad_enabled() and bool(graded)
        if not asks and dispatch.runs_triton(q):
            return _window_attention(q, k, v, windows, bias, masks, kind, scale)
        return _gathered(q, k, v, windows.expand(batch, -1, -1), bias, masks, kind, scale)
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


def _checked_kind(windows: Tensor, masks: Tensor | None, kind: Tensor | None) -> Tensor | None:
    """The kind of every window, [1 or batch, kept]."""
    if (masks is None) != (kind is None):
        raise ValueError("masks and kind come together: kind says which mask each window has")
    if masks is None or kind is None:
        return None
    images, kept, size = windows.shape
    if masks.shape[1:] != (size, size):
        raise ValueError(f"masks must be [kinds, {size}, {size}], got {tuple(masks.shape)}")
    kind = kind if kind.ndim == 2 else kind[None]
    if kind.shape not in ((1, kept), (images, kept)):
        raise ValueError(f"kind must be {(images, kept)}, as windows are, got {tuple(kind.shape)}")
    if kind.device.type == "cpu" and kind.numel() and not torch.compiler.is_compiling():
        low, high = (int(x) for x in torch.aminmax(kind))
        if low < 0 or high >= len(masks):
            raise ValueError(f"kind must be of masks 0..{len(masks) - 1}, got {low}..{high}")
    return kind


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


@torch.library.custom_op("accel::window_attention", mutates_args=())
def _window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    windows: Tensor,
    bias: Tensor | None,
    masks: Tensor | None,
    kind: Tensor | None,
    scale: float,
) -> Tensor:
    from accel.kernels.window_attention_triton import forward

    with dispatch.beside(q):
        return forward(q, k, v, windows, bias=bias, masks=masks, kind=kind, scale=scale)


@_window_attention.register_fake
def _(q, k, v, windows, bias, masks, kind, scale):
    batch, heads, tokens, dim = q.shape
    return q.new_empty(batch, tokens, heads, dim).transpose(1, 2)


def _gathered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    windows: Tensor,
    bias: Tensor | None,
    masks: Tensor | None,
    kind: Tensor | None,
    scale: float,
) -> Tensor:
    batch, kept, size = windows.shape
    tokens = windows.flatten(1)[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])
    inner_q, inner_k, inner_v = (
        x.gather(2, tokens).unflatten(2, (kept, size)).transpose(1, 2).flatten(0, 1)
        for x in (q, k, v)
    )
    added = bias
    if masks is not None and kind is not None:
        own = masks.index_select(0, kind.expand(batch, -1).flatten())[:, None]
        added = own if bias is None else own + bias
    added = None if added is None else added.to(q.dtype)
    found = F.scaled_dot_product_attention(inner_q, inner_k, inner_v, attn_mask=added, scale=scale)
    # under autocast it may be of less precision than q
    found = found.to(q.dtype).unflatten(0, (batch, kept)).transpose(1, 2).flatten(2, 3)
    return torch.zeros_like(q, memory_format=torch.contiguous_format).scatter_(2, tokens, found)
