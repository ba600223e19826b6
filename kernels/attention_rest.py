r"""Attention's Triton kernel for blocks that are not kept: each enters the softmax as one key.

Under ``mean`` and ``taylor`` block j, with mean key k̄_j, mean value v̄_j and n_j valid tokens, has
the logit and the value

    s_j = log2 e · scale · q k̄_jᵀ + log2 n_j;  v̄_j

taken in tiles of blocks by the online softmax. Under ``taylor`` a tile is one group of blocks, so
that the query tile, scaled by the group's weight, times the group's slope goes straight into acc.
"""

from typing import no_type_check

import triton
import triton.language as tl

from accel.kernels.tiles_triton import load_rows, softmax_step

__all__ = ["stand_ins"]


@triton.jit
@no_type_check
def stand_ins(
    b_q,
    b_acc,
    b_l,
    b_m,
    p_q,
    o_token,
    s_q_token,
    m_m,
    p_k_mean,
    p_v_mean,
    p_log_count,
    p_kept,
    p_slopes,
    kv_blocks,
    scale_log2,
    DIM: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    LIFT: tl.constexpr,
    SLOPES: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The blocks that are not kept, each as one key; pointers stand at this head's or row's."""
    # wide tiles leave few registers; products that no tensor core computes are unrolled
    FEW: tl.constexpr = BD > 128 or p_q.dtype.element_ty.primitive_bitwidth == 32
    MOST: tl.constexpr = 16 if FEW else 64
    BC: tl.constexpr = MOST if BD > MOST else BD
    o_d = tl.arange(0, BD)
    for start in range(0, kv_blocks, BT):
        o_j = start + tl.arange(0, BT)
        m_j = o_j < kv_blocks
        b_k = load_rows(p_k_mean, o_j, DIM, m_j, o_d, DIM, UPCAST)  # [BT, BD]
        b_v = load_rows(p_v_mean, o_j, DIM, m_j, o_d, DIM, UPCAST)
        b_bias = tl.load(p_log_count + o_j, m_j, other=float("-inf")) * 1.4426950408889634
        m_out = tl.load(p_kept + o_j, m_j, other=1) == 0
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2  # [BM, BT]
        b_s += tl.where(m_out, b_bias, float("-inf"))[None, :]
        b_p, b_alpha, b_l, b_m = softmax_step(b_s, 1.0, b_l, b_m, False, LIFT)
        b_acc = b_acc * b_alpha[:, None]
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision="ieee")
        if SLOPES:
            # slopes are divided by the block size: weights of n_j tokens become those of a block
            m_in = m_out & (b_bias > float("-inf"))
            b_share = tl.where(m_in, KV_BLOCK * tl.exp2(-b_bias), 0.0)  # [BT]
            b_r = tl.sum(b_p * b_share[None, :], 1) * (scale_log2 * 0.6931471805599453)  # [BM]
            # q a second time, a few channels at once, as the whole slope is large
            for c in tl.range(0, DIM, BC, num_stages=1):
                o_c = c + tl.arange(0, BC)
                b_part = load_rows(p_q, o_token, s_q_token, m_m, o_c, DIM, True)
                b_part *= b_r[:, None]  # [BM, BC]
                b_slope = load_rows(p_slopes, o_c, DIM, o_c < DIM, o_d, DIM, UPCAST)  # [BC, BD]
                b_acc = tl.dot(b_part.to(b_slope.dtype), b_slope, b_acc, input_precision="ieee")
            p_slopes += DIM * DIM
    return b_acc, b_l, b_m
