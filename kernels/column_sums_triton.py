r"""Column sums in Triton: given the rows' LSE, one pass over ``k qᵀ``.

One program holds a tile of keys of one head and loops over query tiles,

    sums[n] = Σ_t w_t 2^(s_nt - lse_t / ln 2),  s = log2 e · scale · k qᵀ

so that every sum has one writer. Without an LSE, ``row_lse_kernel`` runs first.
"""

from math import ceil, log
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from accel.kernels.row_lse_triton import row_lse
from accel.kernels.tiles_triton import (
    batch_and_head,
    choose_logit_tiles,
    is_interpreted,
    load_rows,
    rows_of,
    source_head,
    valid_length,
)

__all__ = ["column_sums_kernel", "forward"]


@triton.jit
@no_type_check
def column_sums_kernel(
    p_q,
    p_k,
    p_lse,  # [batch, heads, tokens]
    p_weights,  # [batch, tokens]
    p_sums,  # [batch, heads, kv_tokens]
    p_lengths,  # [batch] or None
    s_q_batch,
    s_q_head,
    s_q_token,
    s_k_batch,
    s_k_head,
    s_k_token,
    tokens,
    kv_tokens,
    heads,
    kv_heads,
    scale_log2,
    DIM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    UPCAST: tl.constexpr,
):
    i_batch, i_head = batch_and_head(heads)
    p_q += i_batch * s_q_batch + i_head * s_q_head
    p_k += i_batch * s_k_batch + source_head(i_head, heads, kv_heads) * s_k_head
    length = valid_length(p_lengths, i_batch, kv_tokens)
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    b_k = load_rows(p_k, o_m.to(tl.int64), s_k_token, o_m < length, o_d, DIM, UPCAST)  # [BM, BD]

    b_sum = tl.zeros([BM], tl.float32)
    for start in range(0, tokens, BN):
        o_n = start + tl.arange(0, BN)
        m_n = o_n < tokens
        b_w = tl.load(p_weights + i_batch * tokens + o_n, m_n, other=0.0)  # [BN]
        b_lse = tl.load(p_lse + (i_batch * heads + i_head) * tokens + o_n, m_n, other=0.0)
        b_q = load_rows(p_q, o_n.to(tl.int64), s_q_token, m_n, o_d, DIM, UPCAST)  # [BN, BD]
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee") * scale_log2  # [BM, BN]
        # rows without a key have an LSE of -inf and give 2^-inf; what counts nothing may hold NaN
        m_n = (b_w != 0.0) & (b_lse != float("-inf"))
        b_lse = tl.where(m_n, b_lse * 1.4426950408889634, float("inf"))
        b_p = tl.exp2(b_s - b_lse[None, :]) * b_w[None, :]
        b_sum += tl.sum(tl.where(m_n[None, :], b_p, 0.0), 1)

    p_sums += (i_batch * heads + i_head) * kv_tokens
    tl.store(p_sums + o_m, tl.where(o_m < length, b_sum, 0.0), o_m < kv_tokens)


def forward(
    q: Float[Tensor, "batch heads tokens dim"],
    k: Float[Tensor, "batch kv_heads kv_tokens dim"],
    *,
    scale: float,
    lse: Float[Tensor, "batch heads tokens"] | None,
    weights: Float[Tensor, "batch tokens"],
    lengths: Int[Tensor, " batch"] | None,
) -> Float[Tensor, "batch heads kv_tokens"]:
    """``column_sums`` with arguments already checked."""
    interpreted = is_interpreted(q)
    (batch, heads, tokens, dim), (_, kv_heads, kv_tokens, _) = q.shape, k.shape
    q, k = rows_of(q), rows_of(k)
    if lse is None:
        lse = row_lse(q, k, scale=scale, lengths=lengths)
    tiles = choose_logit_tiles(dim, q.element_size())
    sums = torch.empty(batch, heads, kv_tokens, dtype=torch.float32, device=q.device)
    column_sums_kernel[(ceil(kv_tokens / tiles.rows), batch * heads)](
        q,
        k,
        lse.float().contiguous(),
        weights.contiguous(),
        sums,
        lengths,
        *q.stride()[:3],
        *k.stride()[:3],
        tokens,
        kv_tokens,
        heads,
        kv_heads,
        scale / log(2),
        DIM=dim,
        UPCAST=interpreted,
        **tiles.options,
    )
    return sums
