"""Keys and values in 8 bits, for attention with 8-bit tensor cores.

Softmax does not feel a constant on all logits of a row, so the mean key is taken out first, and
with it the channels' offsets that would eat the range of 8 bits (SageAttention, arXiv 2410.02367).
"""

from math import ceil
from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32, Int, Int8
from torch import Tensor

from accel.kernels.pooling import valid_positions
from accel.kernels.tiles_triton import (
    batch_and_head,
    load_rows,
    order_stride,
    rows_of_block,
    source_head,
    to_e4m3,
    valid_length,
)

__all__ = ["Keys8", "Values8", "quantize_keys", "quantize_values"]

# the largest number of e4m3
E4M3_MAX = 448.0
# tokens of one program for values
TILE_TOKENS = 64
# scales of nothing but zeros: never 0, so that -inf times a scale stays -inf
TINY = 1e-12


class Keys8(NamedTuple):
    """``k ≈ values · scale_block + shift``, ordered; rows are aligned to 16 bytes."""

    values: Int8[Tensor, "batch ordered_heads tokens dim"]
    scale: Float32[Tensor, "batch ordered_heads blocks"]
    shift: Float32[Tensor, "batch ordered_heads dim"]


class Values8(NamedTuple):
    """``v ≈ (values · scale)ᵀ``, ordered, channel after channel; aligned to 16 bytes."""

    values: Float[Tensor, "batch ordered_heads dim tokens"]
    scale: Float32[Tensor, "batch ordered_heads dim"]


def quantize_keys(
    k: Float[Tensor, "batch kv_heads tokens dim"],
    *,
    block: int,
    lengths: Int[Tensor, " batch"] | None = None,
    order: Int[Tensor, "orders tokens"] | None = None,
) -> Keys8:
    """``round((k - shift) / scale)``: shift the mean over valid tokens, scale the block's largest.

    ``scale_j = max |k_n - shift| / 127`` over the valid tokens n of block j. Padding becomes 0.
    """
    batch, kv_heads, tokens, dim = k.shape
    heads = kv_heads if order is None else max(kv_heads, order.shape[0])
    valid = valid_positions(k, lengths, None)
    some = k if lengths is None else torch.where(valid[..., None], k, 0.0)
    shift = some.sum(2, dtype=torch.float32) / valid.sum(2).clamp(min=1)[..., None]
    values = torch.empty(
        batch, heads, tokens, ceil(dim / 16) * 16, dtype=torch.int8, device=k.device
    )[..., :dim]
    blocks = ceil(tokens / block)
    scale = torch.empty(batch, heads, blocks, dtype=torch.float32, device=k.device)
    head = torch.arange(heads, device=k.device) * kv_heads // heads
    shift = shift[:, head].contiguous()
    keys_kernel[(blocks, batch * heads)](
        k,
        values,
        scale,
        shift,
        lengths,
        order,
        *k.stride()[:3],
        *values.stride()[:3],
        order_stride(order),
        tokens,
        heads,
        kv_heads,
        DIM=dim,
        KV_BLOCK=block,
        BN=min(64, max(16, triton.next_power_of_2(block))),
        BD=max(16, triton.next_power_of_2(dim)),
        num_warps=4,
    )
    return Keys8(values, scale, shift)


def quantize_values(
    v: Float[Tensor, "batch kv_heads tokens dim"],
    *,
    lengths: Int[Tensor, " batch"] | None = None,
    order: Int[Tensor, "orders tokens"] | None = None,
) -> Values8:
    """``v / scale`` as e4m3, turned; ``scale = max |v_n| / 448`` of each channel, valid n."""
    batch, kv_heads, tokens, dim = v.shape
    heads = kv_heads if order is None else max(kv_heads, order.shape[0])
    tiles = ceil(tokens / TILE_TOKENS)
    sizes = {"DIM": dim, "BN": TILE_TOKENS, "BD": max(16, triton.next_power_of_2(dim))}
    tops = torch.empty(batch, kv_heads, tiles, dim, dtype=torch.float32, device=v.device)
    tops_kernel[(tiles, batch * kv_heads)](
        v, tops, lengths, *v.stride()[:3], tokens, kv_heads, **sizes, num_warps=4
    )
    head = torch.arange(heads, device=v.device) * kv_heads // heads
    scale = (tops.amax(2) / E4M3_MAX).clamp(min=TINY)[:, head].contiguous()
    values = torch.empty(
        batch, heads, dim, ceil(tokens / 16) * 16, dtype=torch.float8_e4m3fn, device=v.device
    )[..., :tokens]
    values_kernel[(tiles, batch * heads)](
        v,
        values,
        scale,
        lengths,
        order,
        *v.stride()[:3],
        *values.stride()[:3],
        order_stride(order),
        tokens,
        heads,
        kv_heads,
        **sizes,
        UPCAST=triton.knobs.runtime.interpret,
        num_warps=4,
    )
    return Values8(values, scale)


@triton.jit
@no_type_check
def keys_kernel(
    p_k,
    p_out,
    p_scale,
    p_shift,
    p_lengths,
    p_order,
    s_k_batch,
    s_k_head,
    s_k_token,
    s_out_batch,
    s_out_head,
    s_out_token,
    s_order_head,
    tokens,
    heads,
    kv_heads,
    DIM: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """One key block of one head: its largest deviation from the shift, then its integers."""
    i_block = tl.program_id(0)
    i_batch, i_head = batch_and_head(heads)
    p_k += i_batch * s_k_batch + source_head(i_head, heads, kv_heads) * s_k_head
    p_out += i_batch * s_out_batch + i_head * s_out_head
    length = valid_length(p_lengths, i_batch, tokens)
    o_d = tl.arange(0, BD)
    b_shift = tl.load(p_shift + (i_batch * heads + i_head) * DIM + o_d, o_d < DIM, other=0.0)
    b_top = tl.zeros([BD], tl.float32)
    b_unit = 1.0
    for PASS in tl.static_range(0, 2):
        for start in range(0, KV_BLOCK, BN):
            o_in = start + tl.arange(0, BN)
            o_t, m_n, m_t = rows_of_block(
                p_order, i_head * s_order_head, i_block, o_in, tokens, length, KV_BLOCK
            )
            b_k = load_rows(p_k, o_t, s_k_token, m_t, o_d, DIM, True)
            b_k = tl.where(m_t[:, None], b_k - b_shift[None, :], 0.0)  # [BN, BD]
            if PASS == 0:
                b_top = tl.maximum(b_top, tl.max(tl.abs(b_k), 0))
            else:
                b_k = b_k / b_unit
                b_k = (b_k + tl.where(b_k < 0, -0.5, 0.5)).to(tl.int8)
                o_n = (i_block * KV_BLOCK + o_in).to(tl.int64)
                p_rows = p_out + o_n[:, None] * s_out_token + o_d[None, :]
                tl.store(p_rows, b_k, m_n[:, None] & (o_d < DIM)[None, :])
        if PASS == 0:
            b_unit = tl.maximum(tl.max(b_top, 0), 1e-12) / 127
            i_scale = (i_batch * heads + i_head) * tl.num_programs(0) + i_block
            tl.store(p_scale + i_scale, b_unit)


@triton.jit
@no_type_check
def tops_kernel(
    p_v,
    p_tops,  # [batch, heads, tiles, DIM]
    p_lengths,
    s_v_batch,
    s_v_head,
    s_v_token,
    tokens,
    heads,
    DIM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """The largest value of every channel in one tile of tokens of one head, whatever its sign."""
    i_batch, i_head = batch_and_head(heads)
    p_v += i_batch * s_v_batch + i_head * s_v_head
    length = valid_length(p_lengths, i_batch, tokens)
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_d = tl.arange(0, BD)
    b_v = load_rows(p_v, o_n.to(tl.int64), s_v_token, o_n < length, o_d, DIM, True)
    i_out = (i_batch * heads + i_head) * tl.num_programs(0) + tl.program_id(0)
    tl.store(p_tops + i_out * DIM + o_d, tl.max(tl.abs(b_v), 0), o_d < DIM)


@triton.jit
@no_type_check
def values_kernel(
    p_v,
    p_out,
    p_scale,  # [batch, heads, DIM]
    p_lengths,
    p_order,
    s_v_batch,
    s_v_head,
    s_v_token,
    s_out_batch,
    s_out_head,
    s_out_channel,
    s_order_head,
    tokens,
    heads,
    kv_heads,
    DIM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile of positions of one ordered head: gathered, scaled, turned."""
    i_tile = tl.program_id(0)
    i_batch, i_head = batch_and_head(heads)
    p_v += i_batch * s_v_batch + source_head(i_head, heads, kv_heads) * s_v_head
    p_out += i_batch * s_out_batch + i_head * s_out_head
    length = valid_length(p_lengths, i_batch, tokens)
    o_in, o_d = tl.arange(0, BN), tl.arange(0, BD)
    o_t, m_n, m_t = rows_of_block(p_order, i_head * s_order_head, i_tile, o_in, tokens, length, BN)
    b_v = load_rows(p_v, o_t, s_v_token, m_t, o_d, DIM, True)  # [BN, BD]
    b_v = b_v / tl.load(p_scale + (i_batch * heads + i_head) * DIM + o_d, o_d < DIM, other=1.0)
    p_columns = p_out + o_d[:, None] * s_out_channel + (i_tile * BN + o_in)[None, :]
    m_out = (o_d < DIM)[:, None] & m_n[None, :]
    tl.store(p_columns, tl.trans(to_e4m3(b_v, UPCAST)), m_out)
