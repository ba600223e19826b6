r"""Means of blocks, and the norms of what they leave out, in Triton: one read of the inputs.

One program owns a block of one head. It sums its rows to the mean k̄ and, for keys, runs through
them again (from a cache) for ``G = Σ_n (k_n - k̄)ᵀ v_n``, a strip of columns at a time, of which
only ``Σ G²`` is kept.
"""

from math import ceil
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from accel.kernels.tiles_triton import (
    batch_and_head,
    block_sum,
    is_interpreted,
    load_rows,
    order_stride,
    rows_of,
    rows_of_block,
    source_head,
    valid_length,
)

__all__ = ["block_moments_kernel", "moments"]

# rows of one step; entries of one strip of G, in registers
ROWS, STRIP = 32, 8192


@triton.jit
@no_type_check
def block_moments_kernel(
    p_x,
    p_v,  # None where the means alone are wanted
    p_mean,  # [batch, heads, blocks, DIM]
    p_bias,  # [batch, heads, blocks]
    p_lengths,  # [batch] or None
    p_order,  # [orders, tokens] or None
    s_x_batch,
    s_x_head,
    s_x_token,
    s_v_batch,
    s_v_head,
    s_v_token,
    s_order_head,
    tokens,
    heads,
    source_heads,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
):
    i_block = tl.program_id(0)
    i_batch, i_head = batch_and_head(heads)
    i_source = source_head(i_head, heads, source_heads)
    p_x += i_batch * s_x_batch + i_source * s_x_head
    length = valid_length(p_lengths, i_batch, tokens)
    o_d = tl.arange(0, BD)

    o_head = i_head * s_order_head
    b_sum, count = block_sum(
        p_x, s_x_token, p_order, o_head, i_block, tokens, length, DIM, BLOCK, BT, BD
    )
    b_mean = b_sum / tl.maximum(count, 1.0)  # [BD]
    o_out = (i_batch * heads + i_head) * tl.num_programs(0) + i_block
    tl.store(p_mean + o_out * DIM + o_d, b_mean, o_d < DIM)

    bias = 0.0
    if p_v is not None:
        p_v += i_batch * s_v_batch + i_source * s_v_head
        b_squares = tl.zeros([BD], tl.float32)
        for strip in range(0, DIM, BV):
            o_v = strip + tl.arange(0, BV)
            b_slope = tl.zeros([BD, BV], tl.float32)
            for start in range(0, BLOCK, BT):
                o_in = start + tl.arange(0, BT)
                o_t, _, m_t = rows_of_block(p_order, o_head, i_block, o_in, tokens, length, BLOCK)
                b_x = load_rows(p_x, o_t, s_x_token, m_t, o_d, DIM, True)
                b_x = tl.where(m_t[:, None], b_x - b_mean[None, :], 0.0)  # [BT, BD]
                b_v = load_rows(p_v, o_t, s_v_token, m_t, o_v, DIM, True)  # [BT, BV]
                # three products of tf32 come as near as one of fp32
                b_slope = tl.dot(tl.trans(b_x), b_v, b_slope, input_precision="tf32x3")
            b_squares += tl.sum(b_slope * b_slope, 1)
        bias = tl.log(tl.sqrt(tl.sum(b_squares, 0)) + 1e-5)
    tl.store(p_bias + o_out, tl.where(count > 0.0, bias, float("-inf")))


def moments(
    x: Float[Tensor, "batch source_heads tokens dim"],
    v: Float[Tensor, "batch source_heads tokens dim"] | None,
    *,
    block: int,
    lengths: Int[Tensor, " batch"] | None,
    order: Int[Tensor, "orders tokens"] | None,
) -> tuple[Float[Tensor, "batch heads blocks dim"], Float[Tensor, "batch heads blocks"]]:
    """Means of blocks, and ``ln(‖G‖ + 1e-5)``, 0 without v; -inf where no token is valid.

    An order per query head makes a key head for each.
    """
    is_interpreted(x)
    batch, source_heads, tokens, dim = x.shape
    heads = source_heads if order is None else max(source_heads, order.shape[0])
    x, v = rows_of(x), None if v is None else rows_of(v)
    blocks = ceil(tokens / block)
    means = torch.empty(batch, heads, blocks, dim, dtype=torch.float32, device=x.device)
    bias = torch.empty(batch, heads, blocks, dtype=torch.float32, device=x.device)
    padded = max(16, triton.next_power_of_2(dim))
    block_moments_kernel[(blocks, batch * heads)](
        x,
        v,
        means,
        bias,
        lengths,
        None if order is None else order.contiguous(),
        *x.stride()[:3],
        *(0, 0, 0) if v is None else v.stride()[:3],
        order_stride(order),
        tokens,
        heads,
        source_heads,
        DIM=dim,
        BLOCK=block,
        BT=ROWS,
        BD=padded,
        BV=min(padded, STRIP // padded),
        num_warps=4 if v is None or padded <= 64 else 8,
        # rows of 1 KiB twice are more than the shared memory of sm_89
        num_stages=1 if padded * x.element_size() > 512 else 2,
    )
    return means, bias
