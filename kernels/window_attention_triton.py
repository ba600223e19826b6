r"""Attention inside windows in Triton: gather, attend and scatter in one launch.

One program holds a tile of the queries of one window of one head and loops over its keys,

    s = scale q kᵀ + bias[head] + masks[kind of the window],  out = softmax(s) v

so that nothing but rows of q, k, v and out, and tiles of the biases, passes through memory. Tokens
are read and written where they lie.
"""

from math import ceil, log
from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from accel.kernels.tiles_triton import (
    batch_and_head,
    is_interpreted,
    load_rows,
    rows_of,
    softmax_step,
    upcast,
)

__all__ = ["forward", "window_kernel"]


@triton.jit
@no_type_check
def window_kernel(
    p_q,
    p_k,
    p_v,
    p_out,
    p_windows,  # [1 or batch, kept, size]
    p_bias,  # [heads, size, size] or None
    p_masks,  # [kinds, size, size] or None
    p_kind,  # [1 or batch, kept]
    s_q_batch,
    s_q_head,
    s_q_token,
    s_k_batch,
    s_k_head,
    s_k_token,
    s_v_batch,
    s_v_head,
    s_v_token,
    s_out_batch,
    s_out_head,
    s_out_token,
    s_windows,
    s_kind,
    size,
    heads,
    scale_log2,
    DIM: tl.constexpr,
    TILES: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    UPCAST: tl.constexpr,
):
    i_batch, i_head = batch_and_head(heads)
    i_window = tl.program_id(0) // TILES
    p_q += i_batch * s_q_batch + i_head * s_q_head
    p_k += i_batch * s_k_batch + i_head * s_k_head
    p_v += i_batch * s_v_batch + i_head * s_v_head
    p_out += i_batch * s_out_batch + i_head * s_out_head
    p_windows += i_batch * s_windows + i_window.to(tl.int64) * size
    o_m = (tl.program_id(0) % TILES) * BM + tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    m_m = o_m < size
    t_m = tl.load(p_windows + o_m, m_m, other=0).to(tl.int64)
    b_q = load_rows(p_q, t_m, s_q_token, m_m, o_d, DIM, UPCAST)  # [BM, BD]
    if p_masks is not None:
        i_kind = tl.load(p_kind + i_batch * s_kind + i_window).to(tl.int64)
        p_masks += i_kind * size * size

    # a finite pivot keeps rows whose logits are all -inf at 0, not NaN
    b_m = tl.full([BM], -1e30, tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    b_out = tl.zeros([BM, BD], tl.float32)
    for start in range(0, size, BN):
        o_n = start + tl.arange(0, BN)
        m_n = o_n < size
        t_n = tl.load(p_windows + o_n, m_n, other=0).to(tl.int64)
        b_k = load_rows(p_k, t_n, s_k_token, m_n, o_d, DIM, UPCAST)  # [BN, BD]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2  # [BM, BN]
        o_mn = o_m[:, None] * size + o_n[None, :]
        m_mn = m_m[:, None] & m_n[None, :]
        if p_bias is not None:
            b_bias = tl.load(p_bias + i_head * size * size + o_mn, m_mn, other=0.0)
            b_s += b_bias.to(tl.float32) * 1.4426950408889634
        if p_masks is not None:
            b_mask = tl.load(p_masks + o_mn, m_mn, other=0.0)
            b_s += b_mask.to(tl.float32) * 1.4426950408889634
        b_s = tl.where(m_n[None, :], b_s, float("-inf"))
        b_p, b_alpha, b_l, b_m = softmax_step(b_s, 1.0, b_l, b_m, False, 0.0)
        b_v = load_rows(p_v, t_n, s_v_token, m_n, o_d, DIM, UPCAST)  # [BN, BD]
        b_p = upcast(b_p.to(p_v.dtype.element_ty), UPCAST)
        b_out = b_out * b_alpha[:, None] + tl.dot(b_p, b_v, input_precision="ieee")
    b_out = b_out / tl.where(b_l > 0.0, b_l, 1.0)[:, None]
    m_out = m_m[:, None] & (o_d < DIM)[None, :]
    p_rows = p_out + t_m[:, None] * s_out_token + o_d[None, :]
    tl.store(p_rows, b_out.to(p_out.dtype.element_ty), m_out)


class WindowTiles(NamedTuple):
    """Queries of a program, keys it takes at a time, and head dim, padded; and its warps."""

    queries: int
    keys: int
    dim: int
    warps: int

    @classmethod
    def of(cls, size: int, dim: int, element_bytes: int) -> "WindowTiles":
        """Of which no register spills, on sm_80 to sm_100."""
        padded = max(16, triton.next_power_of_2(dim))
        most = max(16, triton.next_power_of_2(size))
        # no tensor core takes full fp32; rows that are not aligned to 16 bytes take more registers
        queries, keys = (32, 32) if element_bytes > 2 else (64, 64 if padded <= 64 else 32)
        if element_bytes > 2 and padded > 128:
            queries = keys = 16
        return cls(min(queries, most), min(keys, most), padded, 8 if most > 32 else 4)


def forward(
    q: Float[Tensor, "batch heads tokens dim"],
    k: Float[Tensor, "batch heads tokens dim"],
    v: Float[Tensor, "batch heads tokens dim"],
    windows: Int[Tensor, "images kept size"],
    *,
    bias: Float[Tensor, "heads size size"] | None,
    masks: Float[Tensor, "kinds size size"] | None,
    kind: Int[Tensor, "images_ kept"] | None,
    scale: float,
) -> Float[Tensor, "batch heads tokens dim"]:
    """``window_attention`` with arguments already checked; the result lies token by token."""
    interpreted = is_interpreted(q)
    batch, heads, tokens, dim = q.shape
    images, kept, size = windows.shape
    tiles = WindowTiles.of(size, dim, q.element_size())
    per_window = ceil(size / tiles.queries)
    q, k, v = (rows_of(x) for x in (q, k, v))
    out = torch.zeros(batch, tokens, heads, dim, dtype=q.dtype, device=q.device).transpose(1, 2)
    window_kernel[(kept * per_window, batch * heads)](
        q,
        k,
        v,
        out,
        windows.contiguous(),
        None if bias is None else bias.contiguous(),
        None if masks is None else masks.contiguous(),
        None if kind is None else kind.contiguous(),
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *out.stride()[:3],
        0 if images == 1 else kept * size,
        0 if kind is None or kind.shape[0] == 1 else kept,
        size,
        heads,
        scale / log(2),
        DIM=dim,
        TILES=per_window,
        BM=tiles.queries,
        BN=tiles.keys,
        BD=tiles.dim,
        UPCAST=interpreted,
        num_warps=tiles.warps,
        num_stages=1,  # windows are short, and what is loaded ahead takes registers
    )
    return out
