r"""Block-sparse attention in Triton: the forward kernel and its launcher.

One program computes one tile of one query block of one head, by the online softmax in base 2:
for every listed key tile with logits :math:`s = \log_2 e \cdot scale \cdot q k^T`,

    m' = max(m, max s);  p = 2^(s - m');  l = 2^(m - m') l + Σ p;  acc = 2^(m - m') acc + p v

and at the end ``out = acc / l``, ``lse = ln 2 · m + ln l``. Blocks that are not kept enter the same
sums under ``mean`` as tiles of their mean keys, with ``log2 n_j`` added to the logits.
"""

from math import ceil, log
from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int, Int32
from torch import Tensor

from accel.kernels.arguments import RESTS
from accel.kernels.block_mask import dense_rows
from accel.kernels.pooling import pool_blocks

__all__ = ["Tiles", "attention_kernel", "choose_tiles", "forward"]


class Tiles(NamedTuple):
    """What one program works on, and how many warps and pipeline stages it does it with."""

    queries: int
    keys: int
    dim: int
    warps: int
    stages: int


def choose_tiles(
    block: tuple[int, int], dim: int, element_bytes: int, *, arch: int, ordered: bool
) -> Tiles:
    """Tiles inside a block that fit shared memory and spill no register on sm_<arch>."""
    padded = max(16, triton.next_power_of_2(dim))
    row_bytes = padded * element_bytes
    warps = None
    if row_bytes > 512:
        queries, keys, stages, warps = 32, 16, 2, 8
    elif row_bytes > 256:
        queries, keys, stages = 64, 32, 2
    elif row_bytes == 256 and ordered and arch not in (90, 100):
        # without wgmma the gathered rows' 64-bit pointers stand beside the operands
        queries, keys, stages = 64, 32, 3
    elif row_bytes == 256 and dim % 16 and arch not in (90, 100):
        # rows that are not aligned are loaded by elements
        queries, keys, stages, warps = 64, 32, 3, 8
    else:
        queries, keys, stages = 128, 64, 3
    queries = max(16, min(queries, triton.next_power_of_2(block[0])))
    keys = max(16, min(keys, triton.next_power_of_2(block[1])))
    return Tiles(queries, keys, padded, warps or (8 if queries == 128 else 4), stages)


@triton.jit
@no_type_check
def _natural_tokens(p_order, o_head, o_position, m_position):
    """The natural tokens at these positions of the ordered sequence, int64."""
    if p_order is None:
        return o_position.to(tl.int64)
    else:
        return tl.load(p_order + o_head + o_position, m_position, other=0).to(tl.int64)


@triton.jit
@no_type_check
def _load_rows(p, o_row, s_row, m_row, o_d, DIM: tl.constexpr, UPCAST: tl.constexpr):
    m_d = o_d < DIM
    b = tl.load(p + o_row[:, None] * s_row + o_d[None, :], m_row[:, None] & m_d[None, :], other=0.0)
    # the interpreter multiplies the bit patterns of bf16
    return b.to(tl.float32) if UPCAST else b


@triton.jit
@no_type_check
def _accumulate(b_s, b_v, b_acc, b_l, b_m):
    """One step of the online softmax: logits b_s ``[BM, BN]``, values b_v ``[BN, BD]``."""
    b_m_new = tl.maximum(b_m, tl.max(b_s, 1))  # [BM]
    b_p = tl.exp2(b_s - b_m_new[:, None])  # [BM, BN]
    b_alpha = tl.exp2(b_m - b_m_new)  # [BM]
    b_l = b_l * b_alpha + tl.sum(b_p, 1)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_alpha[:, None], input_precision="ieee")
    return b_acc, b_l, b_m_new


@triton.jit
@no_type_check
def attention_kernel(
    p_q,
    p_k,
    p_v,
    p_out,
    p_lse,
    p_counts,
    p_indices,
    p_lengths,  # [batch] or None
    p_order,  # [orders, tokens] or None
    p_k_mean,  # [batch, pooled_heads, kv_blocks, dim]; None where every head drops the rest
    p_v_mean,
    p_log_count,  # [batch, pooled_heads, kv_blocks]
    p_kept,  # [mask_batch, heads, q_blocks, kv_blocks]
    p_pooled,  # [heads]
    s_q_batch,
    s_q_head,
    s_q_token,
    s_k_batch,
    s_k_head,
    s_k_token,
    s_v_batch,
    s_v_head,
    s_v_token,
    s_order_head,
    tokens,
    kv_tokens,
    heads,
    kv_heads,
    pooled_heads,
    mask_batch,
    q_blocks,
    kv_blocks,
    max_count,
    scale_log2,
    DIM: tl.constexpr,
    Q_BLOCK: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    UPCAST: tl.constexpr,
):
    Q_TILES: tl.constexpr = (Q_BLOCK + BM - 1) // BM
    KV_TILES: tl.constexpr = (KV_BLOCK + BN - 1) // BN
    i_block = tl.program_id(0) // Q_TILES
    i_batch = (tl.program_id(1) // heads).to(tl.int64)
    i_head = (tl.program_id(1) % heads).to(tl.int64)
    i_row = ((i_batch % mask_batch) * heads + i_head) * q_blocks + i_block
    p_q += i_batch * s_q_batch + i_head * s_q_head
    p_k += i_batch * s_k_batch + (i_head * kv_heads // heads) * s_k_head
    p_v += i_batch * s_v_batch + (i_head * kv_heads // heads) * s_v_head
    length = kv_tokens
    if p_lengths is not None:
        length = tl.load(p_lengths + i_batch)

    # positions in the ordered sequence [BM], and the natural tokens there
    o_in = (tl.program_id(0) % Q_TILES) * BM + tl.arange(0, BM)
    o_m = i_block * Q_BLOCK + o_in
    m_m = (o_in < Q_BLOCK) & (o_m < tokens)
    o_token = _natural_tokens(p_order, i_head * s_order_head, o_m, m_m)
    o_d = tl.arange(0, BD)
    b_q = _load_rows(p_q, o_token, s_q_token, m_m, o_d, DIM, UPCAST)  # [BM, BD]

    # a finite pivot keeps 2^(s - m) at 0, not NaN, on rows without a key
    b_m = tl.full([BM], -1e30, tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    b_acc = tl.zeros([BM, BD], tl.float32)

    if p_k_mean is not None:  # noqa: SIM102 (decided when compiled, the inner one when run)
        if tl.load(p_pooled + i_head) != 0:
            i_pooled = (i_batch * pooled_heads + i_head * pooled_heads // heads) * kv_blocks
            for start in range(0, kv_blocks, BN):
                o_j = start + tl.arange(0, BN)
                m_j = o_j < kv_blocks
                b_k = _load_rows(p_k_mean + i_pooled * DIM, o_j, DIM, m_j, o_d, DIM, UPCAST)
                b_v = _load_rows(p_v_mean + i_pooled * DIM, o_j, DIM, m_j, o_d, DIM, UPCAST)
                b_bias = tl.load(p_log_count + i_pooled + o_j, m_j, other=float("-inf"))
                b_kept = tl.load(p_kept + i_row * kv_blocks + o_j, m_j, other=1)
                b_bias = tl.where(b_kept != 0, float("-inf"), b_bias * 1.4426950408889634)
                b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2
                b_acc, b_l, b_m = _accumulate(b_s + b_bias[None, :], b_v, b_acc, b_l, b_m)

    for i_tile in range(tl.load(p_counts + i_row) * KV_TILES):
        i_kv = tl.load(p_indices + i_row * max_count + i_tile // KV_TILES)
        o_in_kv = (i_tile % KV_TILES) * BN + tl.arange(0, BN)
        o_n = i_kv * KV_BLOCK + o_in_kv
        m_n = (o_in_kv < KV_BLOCK) & (o_n < kv_tokens)
        o_key = _natural_tokens(p_order, i_head * s_order_head, o_n, m_n)
        m_n = m_n & (o_key < length)
        b_k = _load_rows(p_k, o_key, s_k_token, m_n, o_d, DIM, UPCAST)  # [BN, BD]
        b_v = _load_rows(p_v, o_key, s_v_token, m_n, o_d, DIM, UPCAST)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2  # [BM, BN]
        b_s = tl.where(m_n[None, :], b_s, float("-inf"))
        b_acc, b_l, b_m = _accumulate(b_s, b_v, b_acc, b_l, b_m)

    m_any = b_l > 0.0
    b_l = tl.where(m_any, b_l, 1.0)
    b_out = b_acc / b_l[:, None]
    b_lse = tl.where(m_any, b_m * 0.6931471805599453 + tl.log(b_l), float("-inf"))
    o_out = (i_batch * heads + i_head) * tokens + o_token
    m_out = m_m[:, None] & (o_d < DIM)[None, :]
    tl.store(p_out + o_out[:, None] * DIM + o_d[None, :], b_out.to(p_out.dtype.element_ty), m_out)
    tl.store(p_lse + o_out, b_lse, m_m)


def forward(
    q: Float[Tensor, "batch heads tokens dim"],
    k: Float[Tensor, "batch kv_heads kv_tokens dim"],
    v: Float[Tensor, "batch kv_heads kv_tokens dim"],
    counts: Int32[Tensor, "mask_batch heads q_blocks"],
    indices: Int32[Tensor, "mask_batch heads q_blocks max_count"],
    *,
    block: tuple[int, int],
    rests: tuple[int, ...],
    scale: float,
    lengths: Int[Tensor, " batch"] | None,
    order: Int[Tensor, "orders tokens"] | None,
    precision: str,
    longest_first: Int32[Tensor, " rows"],
):
    """``sparse_attention`` with arguments already checked; returns the result and the LSE."""
    interpreted = triton.knobs.runtime.interpret
    if not q.is_cuda and not interpreted:
        raise ValueError(
            f"the triton backend needs CUDA tensors, got {q.device}; move them, take backend='cpu' "
            "or set TRITON_INTERPRET=1 before triton is imported"
        )
    batch, heads, tokens, dim = q.shape
    kv_heads, kv_tokens = k.shape[1:3]
    q_blocks, kv_blocks = counts.shape[2], ceil(kv_tokens / block[1])
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    counts, indices = counts.contiguous(), indices.contiguous()
    k_mean = v_mean = log_count = kept = flags = None
    if RESTS.index("taylor") in rests:
        raise NotImplementedError("taylor is not there yet on this backend; use backend='cpu'")
    del precision, longest_first
    if any(rests):
        k_mean, v_mean, log_count = pool_blocks(k, v, block=block[1], lengths=lengths, order=order)
        k_mean, v_mean, log_count = (x.contiguous() for x in (k_mean, v_mean, log_count))
        kept = dense_rows(counts, indices, kv_blocks).to(torch.uint8)
        flags = torch.tensor(rests, dtype=torch.int8).to(q.device, non_blocking=True)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    major, minor = torch.cuda.get_device_capability(q.device) if q.is_cuda else (9, 0)
    tiles = choose_tiles(
        block, dim, q.element_size(), arch=10 * major + minor, ordered=order is not None
    )
    grid = (q_blocks * ceil(block[0] / tiles.queries), batch * heads)
    attention_kernel[grid](
        q,
        k,
        v,
        out,
        lse,
        counts,
        indices,
        lengths,
        None if order is None else order.contiguous(),
        k_mean,
        v_mean,
        log_count,
        kept,
        flags,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        0 if order is None or order.shape[0] == 1 else tokens,
        tokens,
        kv_tokens,
        heads,
        kv_heads,
        kv_heads if k_mean is None else k_mean.shape[1],
        counts.shape[0],
        q_blocks,
        kv_blocks,
        indices.shape[3],
        scale / log(2),
        DIM=dim,
        Q_BLOCK=block[0],
        KV_BLOCK=block[1],
        BM=tiles.queries,
        BN=tiles.keys,
        BD=tiles.dim,
        UPCAST=interpreted,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return out, lse
