r"""The Triton kernel of block-sparse attention: what one program does, tile by tile.

A program computes one tile of one query block of one head, by the online softmax in base 2: for
every listed key tile with logits :math:`s = \log_2 e \cdot scale \cdot q k^T`,

    m' = max(m, max s);  p = 2^(s - m');  l = 2^(m - m') l + Σ p;  acc = 2^(m - m') acc + p v

and at the end ``out = acc / l``, ``lse = ln 2 · m + ln l``. The scale is no multiplication of its
own: it rides in the one that subtracts m.

Under ``mean`` and ``taylor`` blocks that are not kept enter the same sums first, in
``attention_rest``.

With 8-bit keys the query tile is quantised here, row by row; its scales and the key block's make
one factor per row, which rides where the plain scale did. The keys' mean was taken out of them,
which softmax does not feel and the LSE gets back at the end. With 8-bit values m is lower by
``log2 430``, so that p fills the range of e4m3, and acc, in units of the channels' scales, meets
these scales at the end.

Whole blocks need no mask. Blocks that the end of the keys cuts stand last in their ascending lists
and are taken in a second loop, with masks; so is everything where masks are needed throughout.
"""

from typing import no_type_check

import triton
import triton.language as tl

from accel.kernels.attention_rest import stand_ins
from accel.kernels.tiles_triton import load_rows, softmax_step, to_e4m3, upcast

__all__ = ["attention_kernel"]

# no load is wider for what these divide by, and other numbers would be compiled for: a mask that
# is made anew has a longest list of its own
COUNTED = [
    "works",
    "rows",
    "tokens",
    "kv_tokens",
    "heads",
    "kv_heads",
    "pooled_heads",
    "mask_batch",
    "q_blocks",
    "kv_blocks",
    "max_count",
]


@triton.jit
@no_type_check
def _columns(
    p, s_channel, m_n, DIM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, MASKED: tl.constexpr
):
    """``[BN, BD]`` out of memory that holds channel after channel, 0 where a mask says no."""
    o_d = tl.arange(0, BD)
    p_columns = p + o_d[:, None] * s_channel + tl.arange(0, BN)[None, :]
    m_d = (o_d < DIM)[:, None]
    if MASKED:
        return tl.trans(tl.load(p_columns, m_d & m_n[None, :], other=0.0))
    elif BD != DIM:
        return tl.trans(tl.load(p_columns, m_d, other=0.0))
    else:
        return tl.trans(tl.load(p_columns))


@triton.jit
@no_type_check
def _float(s):
    """Integers of less than 2^22 as fp32: in the mantissa of 1.5 · 2^23, as conversion is slow."""
    return (s + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0


@triton.jit
@no_type_check
def _whole_blocks(p_list, count, blocks):
    """How many entries of an ascending list lie below ``blocks``."""
    low, high = count * 0, count
    while low < high:
        middle = (low + high) // 2
        below = tl.load(p_list + middle) < blocks
        low, high = tl.where(below, middle + 1, low), tl.where(below, high, middle)
    return low


@triton.jit(do_not_specialize=COUNTED)
@no_type_check
def attention_kernel(
    p_q,
    p_k,
    p_v,
    p_out,
    p_lse,
    p_counts,
    p_indices,
    p_longest,
    p_lengths,  # [batch] or None
    p_order,  # [orders, tokens] or None
    p_k_scale,  # [batch, kv_heads, kv_blocks]; None unless keys are int8
    p_k_shift,  # [batch, kv_heads, dim], what was taken out of them
    p_v_scale,  # [batch, kv_heads, dim]; None unless values are fp8, and stored by channels
    p_k_mean,  # [batch, pooled_heads, kv_blocks, dim]; None where every head drops the rest
    p_v_mean,
    p_log_count,  # [batch, pooled_heads, kv_blocks]
    p_kept,  # [mask_batch, heads, q_blocks, kv_blocks]
    p_rest,  # [heads], places in RESTS
    p_slopes,  # [batch, heads, groups, dim, dim]; None where no head is taylor
    s_q_batch,  # in units of 16 bytes where ALIGNED, as all strides of q, k and v
    s_q_head,
    s_q_token,
    s_k_batch,
    s_k_head,
    s_k_token,
    s_v_batch,
    s_v_head,
    s_v_token,  # of a channel, where values are stored by channels
    s_order_head,
    works,
    rows,
    tokens,
    kv_tokens,
    heads,
    kv_heads,
    pooled_heads,
    mask_batch,
    q_blocks,
    kv_blocks,
    max_count,
    scale_log2,  # positive
    DIM: tl.constexpr,
    Q_BLOCK: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    GATHER: tl.constexpr,  # whether keys and values still lie in natural layout under an order
    ALIGNED: tl.constexpr,
    TMA: tl.constexpr,
    PERSISTENT: tl.constexpr,
    SPECIALIZED: tl.constexpr,
    RAGGED: tl.constexpr,  # whether a block may hold fewer than KV_BLOCK valid keys
    UPCAST: tl.constexpr,
):
    Q_TILES: tl.constexpr = (Q_BLOCK + BM - 1) // BM
    KV_TILES: tl.constexpr = (KV_BLOCK + BN - 1) // BN
    INT8: tl.constexpr = p_k_scale is not None
    FP8: tl.constexpr = p_v_scale is not None
    LIFT: tl.constexpr = 8.75 if FP8 else 0.0
    # strides with a known factor let rows be loaded 16 bytes at a time, whatever the head dim
    Q_UNIT: tl.constexpr = 128 // p_q.dtype.element_ty.primitive_bitwidth if ALIGNED else 1
    K_UNIT: tl.constexpr = 128 // p_k.dtype.element_ty.primitive_bitwidth if ALIGNED else 1
    V_UNIT: tl.constexpr = 128 // p_v.dtype.element_ty.primitive_bitwidth if ALIGNED else 1
    s_q_token *= Q_UNIT
    s_k_token *= K_UNIT
    s_v_token *= V_UNIT
    # padding may stand anywhere under an order; tiles may reach past odd blocks
    # a loop for specialized warps stands alone
    ALWAYS_MASKED: tl.constexpr = (
        (p_order is not None and p_lengths is not None)
        or KV_BLOCK % BN != 0
        or (SPECIALIZED and RAGGED)
    )
    # a loop of one turn is none to the compiler, and costs no registers
    turns = tl.cdiv(works - tl.program_id(0), tl.num_programs(0)) if PERSISTENT else 1
    for turn in tl.range(0, turns, num_stages=1):
        i_work = tl.program_id(0) + turn * tl.num_programs(0)
        i_turn = i_work // Q_TILES
        i_row = tl.load(p_longest + i_turn % rows)
        i_block = i_row % q_blocks
        i_head = (i_row // q_blocks) % heads
        # either the mask has rows for each batch element, or all rows take turns for each
        i_batch = i_row // (q_blocks * heads) + i_turn // rows
        i_kv_head = i_head * kv_heads // heads
        b64, h64, kv64 = i_batch.to(tl.int64), i_head.to(tl.int64), i_kv_head.to(tl.int64)
        p_q_head = p_q + (b64 * s_q_batch + h64 * s_q_head) * Q_UNIT
        p_k_head = p_k + (b64 * s_k_batch + kv64 * s_k_head) * K_UNIT
        p_v_head = p_v + (b64 * s_v_batch + kv64 * s_v_head) * V_UNIT
        if TMA:
            d_k = tl.make_tensor_descriptor(
                p_k_head, [kv_tokens, DIM], [s_k_token.to(tl.int64), 1], [BN, BD]
            )
            if FP8:
                d_v = tl.make_tensor_descriptor(
                    p_v_head, [DIM, kv_tokens], [s_v_token.to(tl.int64), 1], [BD, BN]
                )
            else:
                d_v = tl.make_tensor_descriptor(
                    p_v_head, [kv_tokens, DIM], [s_v_token.to(tl.int64), 1], [BN, BD]
                )
        p_list = p_indices + i_row.to(tl.int64) * max_count
        count = tl.load(p_counts + i_row)
        length = kv_tokens
        if p_lengths is not None:
            length = tl.load(p_lengths + i_batch)

        # positions in the ordered sequence [BM], and the natural tokens there
        o_d = tl.arange(0, BD)
        o_in = (i_work % Q_TILES) * BM + tl.arange(0, BM)
        o_token = (i_block * Q_BLOCK + o_in).to(tl.int64)
        m_m = (o_in < Q_BLOCK) & (o_token < tokens)
        if p_order is not None:
            o_token = tl.load(p_order + h64 * s_order_head + o_token, m_m, other=0)
        if TMA and p_order is None:
            # rows past the tile's are those of no result
            d_q = tl.make_tensor_descriptor(
                p_q_head, [tokens, DIM], [s_q_token.to(tl.int64), 1], [BM, BD]
            )
            b_q = d_q.load([i_block * Q_BLOCK + (i_work % Q_TILES) * BM, 0])  # [BM, BD]
            b_q = upcast(b_q, UPCAST)
        else:
            b_q = load_rows(p_q_head, o_token, s_q_token, m_m, o_d, DIM, UPCAST)

        b_keyed, b_scale, b_shift = b_q, scale_log2, tl.zeros([BM], tl.float32)
        if INT8:
            b_mean = tl.load(p_k_shift + (b64 * kv_heads + i_kv_head) * DIM + o_d, o_d < DIM, 0.0)
            b_exact = b_q.to(tl.float32)
            b_shift = tl.sum(b_exact * b_mean[None, :], 1) * scale_log2
            b_unit = tl.maximum(tl.max(tl.abs(b_exact), 1), 1e-12) / 127  # [BM]
            b_exact = b_exact * (1 / b_unit)[:, None]
            b_keyed = (b_exact + tl.where(b_exact < 0, -0.5, 0.5)).to(tl.int8)
            b_scale = b_unit * scale_log2

        # a finite pivot keeps 2^(s - m) at 0, not NaN, on rows without a key
        b_m = tl.full([BM], -1e30, tl.float32)
        b_l = tl.zeros([BM], tl.float32)
        b_acc = tl.zeros([BM, BD], tl.float32)

        if p_k_mean is not None:
            i_pooled = (b64 * pooled_heads + i_head * pooled_heads // heads) * kv_blocks
            rest = tl.load(p_rest + i_head)
            for SLOPES in tl.static_range(0, 2):
                if SLOPES == 0 or p_slopes is not None:  # noqa: SIM102 (compiled, then run)
                    if rest == 1 + SLOPES:
                        b_acc, b_l, b_m = stand_ins(
                            b_q,
                            b_acc,
                            b_l,
                            b_m,
                            p_q_head,
                            o_token,
                            s_q_token,
                            m_m,
                            p_k_mean + i_pooled * DIM,
                            p_v_mean + i_pooled * DIM,
                            p_log_count + i_pooled,
                            p_kept + i_row.to(tl.int64) * kv_blocks,
                            p_slopes
                            if p_slopes is None
                            else p_slopes
                            + (b64 * heads + i_head) * ((kv_blocks + BT - 1) // BT) * DIM * DIM,
                            kv_blocks,
                            scale_log2,
                            DIM,
                            BD,
                            BT,
                            KV_BLOCK,
                            LIFT,
                            SLOPES,
                            UPCAST,
                        )

        # blocks before the one that the end of the keys cuts, and with it
        whole = count
        if ALWAYS_MASKED:
            whole = 0
        elif p_lengths is not None:
            whole = _whole_blocks(p_list, count, length // KV_BLOCK)
            cut = tl.load(p_list + whole, whole < count, other=0) * KV_BLOCK
            count = tl.minimum(count, whole + (cut < length).to(tl.int32))
        elif RAGGED:
            end = tl.load(p_list + count - 1, count > 0, other=-1)
            whole -= (end >= length // KV_BLOCK).to(tl.int32)

        for MASKED in tl.static_range(1 if ALWAYS_MASKED else 0, 2 if RAGGED else 1):
            first = whole * KV_TILES if MASKED else 0
            last = count * KV_TILES if MASKED else whole * KV_TILES
            for i_tile in tl.range(first, last, warp_specialize=SPECIALIZED):
                i_kv = tl.load(p_list + i_tile // KV_TILES)
                start = i_kv * KV_BLOCK + (i_tile % KV_TILES) * BN
                o_n = tl.arange(0, BN)
                m_n = o_n < kv_tokens - start
                if MASKED:
                    m_n = m_n & ((i_tile % KV_TILES) * BN + o_n < KV_BLOCK)
                o_key = start + o_n
                if p_order is not None and (GATHER or (MASKED and p_lengths is not None)):
                    p_ids = p_order + h64 * s_order_head + o_key
                    o_key = tl.load(p_ids, m_n, other=0) if MASKED else tl.load(p_ids)
                if MASKED and p_lengths is not None:
                    m_n = m_n & (o_key < length)
                if TMA:
                    b_k = d_k.load([start, 0])  # [BN, BD]
                    b_v = tl.trans(d_v.load([0, start])) if FP8 else d_v.load([start, 0])
                    if MASKED and p_lengths is not None and not FP8:
                        # padding may hold anything; in 8 bits it is 0
                        b_v = tl.where(m_n[:, None], b_v, 0.0)
                else:
                    o_row, first_row = o_n, start.to(tl.int64)
                    if GATHER:
                        o_row, first_row = o_key, first_row * 0
                    p_k_tile, p_v_tile = p_k_head + first_row * s_k_token, p_v_head
                    b_k = load_rows(p_k_tile, o_row, s_k_token, m_n, o_d, DIM, False, MASKED)
                    if FP8:
                        b_v = _columns(p_v_head + start, s_v_token, m_n, DIM, BN, BD, MASKED)
                    else:
                        p_v_tile += first_row * s_v_token
                        b_v = load_rows(p_v_tile, o_row, s_v_token, m_n, o_d, DIM, False, MASKED)
                if INT8:
                    i_scale = (b64 * kv_heads + i_kv_head) * kv_blocks + i_kv
                    b_tile_scale = b_scale * tl.load(p_k_scale + i_scale)
                    b_s = _float(tl.dot(b_keyed, tl.trans(b_k)))  # [BM, BN]
                else:
                    b_tile_scale = b_scale
                    b_s = tl.dot(b_keyed, tl.trans(upcast(b_k, UPCAST)), input_precision="ieee")
                if MASKED:
                    b_s = tl.where(m_n[None, :], b_s, float("-inf"))
                b_p, b_alpha, b_l, b_m = softmax_step(b_s, b_tile_scale, b_l, b_m, INT8, LIFT)
                b_acc = b_acc * b_alpha[:, None]
                if INT8:
                    # always itself; what a loop carries is brought to the layout of the logits once
                    b_scale = tl.where(b_m > -3e38, b_scale, 0.0)
                if FP8:
                    # sums of 8-bit products have 14 bits: a tile is summed so, tiles in fp32
                    b_acc = tl.dot(to_e4m3(b_p, UPCAST), b_v, b_acc, max_num_imprecise_acc=BN)
                else:
                    b_v = upcast(b_v, UPCAST)
                    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision="ieee")

        m_any = b_l > 0.0
        b_l = tl.where(m_any, b_l, 1.0)
        b_lse = (b_m + b_shift) * 0.6931471805599453 + tl.log(b_l)
        b_out = b_acc / b_l[:, None]
        if FP8:
            p_v_unit = p_v_scale + (b64 * kv_heads + i_kv_head) * DIM
            b_out = b_out * tl.load(p_v_unit + o_d, o_d < DIM, other=0.0)[None, :]
        o_out = (b64 * heads + i_head) * tokens + o_token
        p_row = p_out + o_out[:, None] * DIM + o_d[None, :]
        tl.store(p_row, b_out.to(p_out.dtype.element_ty), m_m[:, None] & (o_d < DIM)[None, :])
        tl.store(p_lse + o_out, tl.where(m_any, b_lse, float("-inf")), m_m)
