"""The stand-ins of ``pooling.py`` on a GPU: one pass over keys and values for means or slopes.

Both take what 8-bit attention changes: keys lose ``shift``, values and slopes are in ``unit``s.
"""

from math import ceil
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor

from accel.kernels.pooling import TAYLOR_GROUP
from accel.kernels.tiles_triton import (
    batch_and_head,
    block_sum,
    load_rows,
    order_stride,
    rows_of_block,
    source_head,
    valid_length,
)

__all__ = ["block_slopes", "pool_blocks"]


def pool_blocks(
    k: Float[Tensor, "batch kv_heads tokens dim"],
    v: Float[Tensor, "batch kv_heads tokens dim"],
    *,
    block: int,
    lengths: Int[Tensor, " batch"] | None = None,
    order: Int[Tensor, "orders tokens"] | None = None,
    shift: Float32[Tensor, "batch pooled_heads dim"] | None = None,
    unit: Float32[Tensor, "batch pooled_heads dim"] | None = None,
) -> tuple[
    Float[Tensor, "batch pooled_heads blocks dim"],
    Float[Tensor, "batch pooled_heads blocks dim"],
    Float32[Tensor, "batch pooled_heads blocks"],
]:
    """``k̄_j - shift``, ``v̄_j / unit`` and ``ln n_j``: ``pooling.pool_blocks`` else."""
    batch, kv_heads, tokens, dim = k.shape
    heads = kv_heads if order is None else max(kv_heads, order.shape[0])
    blocks = ceil(tokens / block)
    k_mean, v_mean = (
        torch.empty(batch, heads, blocks, dim, dtype=k.dtype, device=k.device) for _ in "kv"
    )
    log_count = torch.empty(batch, heads, blocks, dtype=torch.float32, device=k.device)
    means_kernel[(blocks, batch * heads)](
        k,
        v,
        k_mean,
        v_mean,
        log_count,
        shift,
        unit,
        lengths,
        order,
        *k.stride()[:3],
        *v.stride()[:3],
        order_stride(order),
        tokens,
        heads,
        kv_heads,
        **_sizes(dim, block),
        num_warps=4,
    )
    return k_mean, v_mean, log_count


def block_slopes(
    k: Float[Tensor, "batch kv_heads tokens dim"],
    v: Float[Tensor, "batch kv_heads tokens dim"],
    stands_in: Bool[Tensor, "mask_batch heads blocks"],
    *,
    block: int,
    lengths: Int[Tensor, " batch"] | None = None,
    order: Int[Tensor, "orders tokens"] | None = None,
    unit: Float32[Tensor, "batch pooled_heads dim"] | None = None,
) -> Float[Tensor, "batch heads groups dim dim"]:
    """``pooling.block_slopes``, columns in ``unit``s."""
    batch, kv_heads, tokens, dim = k.shape
    mask_batch, heads, blocks = stands_in.shape
    groups = ceil(blocks / TAYLOR_GROUP)
    slopes = torch.empty(batch, heads, groups, dim, dim, dtype=k.dtype, device=k.device)
    sizes = _sizes(dim, block)
    columns = min(sizes["BD"], 64)
    slopes_kernel[(groups, batch * heads, ceil(dim / columns))](
        k,
        v,
        stands_in.contiguous(),
        slopes,
        unit,
        lengths,
        order,
        *k.stride()[:3],
        *v.stride()[:3],
        order_stride(order),
        tokens,
        heads,
        kv_heads,
        1 if unit is None else unit.shape[1],
        mask_batch,
        blocks,
        GROUP=TAYLOR_GROUP,
        BC=columns,
        UPCAST=triton.knobs.runtime.interpret,
        **sizes,
        num_warps=8 if sizes["BD"] > 64 else 4,
    )
    return slopes


def _sizes(dim: int, block: int) -> dict[str, int]:
    return {
        "DIM": dim,
        "KV_BLOCK": block,
        "BN": min(64, max(16, triton.next_power_of_2(block))),
        "BD": max(16, triton.next_power_of_2(dim)),
    }


@triton.jit
@no_type_check
def means_kernel(
    p_k,
    p_v,
    p_k_mean,
    p_v_mean,
    p_log_count,
    p_shift,
    p_unit,
    p_lengths,
    p_order,
    s_k_batch,
    s_k_head,
    s_k_token,
    s_v_batch,
    s_v_head,
    s_v_token,
    s_order_head,
    tokens,
    heads,
    kv_heads,
    DIM: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """One block of one head."""
    i_block = tl.program_id(0)
    i_batch, i_head = batch_and_head(heads)
    i_kv_head = source_head(i_head, heads, kv_heads)
    p_k += i_batch * s_k_batch + i_kv_head * s_k_head
    p_v += i_batch * s_v_batch + i_kv_head * s_v_head
    length = valid_length(p_lengths, i_batch, tokens)
    o_order = i_head * s_order_head
    o_d = tl.arange(0, BD)
    m_d = o_d < DIM
    b_k, count = block_sum(
        p_k, s_k_token, p_order, o_order, i_block, tokens, length, DIM, KV_BLOCK, BN, BD
    )
    b_v, _ = block_sum(
        p_v, s_v_token, p_order, o_order, i_block, tokens, length, DIM, KV_BLOCK, BN, BD
    )
    some = tl.maximum(count, 1.0)
    b_k, b_v = b_k / some, b_v / some
    o_head = (i_batch * heads + i_head) * DIM
    if p_shift is not None:
        b_k -= tl.load(p_shift + o_head + o_d, m_d, other=0.0)
    if p_unit is not None:
        b_v = b_v / tl.load(p_unit + o_head + o_d, m_d, other=1.0)
    i_out = (i_batch * heads + i_head) * tl.num_programs(0) + i_block
    tl.store(p_k_mean + i_out * DIM + o_d, b_k.to(p_k_mean.dtype.element_ty), m_d)
    tl.store(p_v_mean + i_out * DIM + o_d, b_v.to(p_v_mean.dtype.element_ty), m_d)
    tl.store(p_log_count + i_out, tl.where(count > 0, tl.log(some), float("-inf")))


@triton.jit
@no_type_check
def slopes_kernel(
    p_k,
    p_v,
    p_stands_in,
    p_slopes,
    p_unit,
    p_lengths,
    p_order,
    s_k_batch,
    s_k_head,
    s_k_token,
    s_v_batch,
    s_v_head,
    s_v_token,
    s_order_head,
    tokens,
    heads,
    kv_heads,
    unit_heads,
    mask_batch,
    blocks,
    DIM: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BC: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Some columns of the slope of one group of one head."""
    i_group = tl.program_id(0)
    i_batch, i_head = batch_and_head(heads)
    i_kv_head = source_head(i_head, heads, kv_heads)
    p_k += i_batch * s_k_batch + i_kv_head * s_k_head
    p_v += i_batch * s_v_batch + i_kv_head * s_v_head
    p_stands_in += (i_batch.to(tl.int32) % mask_batch * heads + i_head) * blocks
    length = valid_length(p_lengths, i_batch, tokens)
    o_order = i_head * s_order_head
    o_d = tl.arange(0, BD)
    o_c = tl.program_id(2) * BC + tl.arange(0, BC)
    b_acc = tl.zeros([BD, BC], tl.float32)
    taken = 0.0
    for i_block in range(i_group * GROUP, tl.minimum(i_group * GROUP + GROUP, blocks)):
        if tl.load(p_stands_in + i_block) != 0:
            b_mean, count = block_sum(
                p_k, s_k_token, p_order, o_order, i_block, tokens, length, DIM, KV_BLOCK, BN, BD
            )
            b_mean = b_mean / tl.maximum(count, 1.0)
            taken += (count > 0).to(tl.float32)
            for start in range(0, KV_BLOCK, BN):
                o_in = start + tl.arange(0, BN)
                o_t, _, m_t = rows_of_block(
                    p_order, o_order, i_block, o_in, tokens, length, KV_BLOCK
                )
                b_k = load_rows(p_k, o_t, s_k_token, m_t, o_d, DIM, True)
                b_k = tl.where(m_t[:, None], b_k - b_mean[None, :], 0.0)  # [BN, BD]
                b_v = load_rows(p_v, o_t, s_v_token, m_t, o_c, DIM, UPCAST)  # [BN, BC]
                b_k = tl.trans(b_k.to(b_v.dtype))
                b_acc = tl.dot(b_k, b_v, b_acc, input_precision="ieee")
    b_acc = b_acc / (tl.maximum(taken, 1.0) * KV_BLOCK)
    if p_unit is not None:
        i_unit = (i_batch * unit_heads + source_head(i_head, heads, unit_heads)) * DIM
        b_acc = b_acc / tl.load(p_unit + i_unit + o_c, o_c < DIM, other=1.0)[None, :]
    p_slopes += ((i_batch * heads + i_head) * tl.num_programs(0) + i_group) * DIM * DIM
    p_rows = p_slopes + o_d[:, None] * DIM + o_c[None, :]
    m_out = (o_d < DIM)[:, None] & (o_c < DIM)[None, :]
    tl.store(p_rows, b_acc.to(p_slopes.dtype.element_ty), m_out)
