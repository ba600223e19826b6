r"""The log-sum-exp of every row of ``s q kᵀ`` in Triton, in one pass that keeps nothing else.

One program holds a tile of query rows and loops over key tiles with a running maximum:

    m' = max(m, max s);  l = 2^(m - m') l + Σ 2^(s - m');  lse = ln 2 · (m + log2 l)

Neither an order nor blocks matter to it: it reads and writes natural layout.
"""

from math import ceil, log
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from accel.kernels.tiles_triton import (
    batch_and_head,
    choose_logit_tiles,
    is_interpreted,
    load_rows,
    rows_of,
    softmax_step,
    source_head,
    valid_length,
)

__all__ = ["row_lse", "row_lse_kernel"]


@triton.jit
@no_type_check
def row_lse_kernel(
    p_q,
    p_k,
    p_lse,
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
    m_m = o_m < tokens
    o_d = tl.arange(0, BD)
    b_q = load_rows(p_q, o_m.to(tl.int64), s_q_token, m_m, o_d, DIM, UPCAST)  # [BM, BD]

    # a finite pivot keeps 2^(s - m) at 0, not NaN, on rows without a key
    b_m = tl.full([BM], -1e30, tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    for start in range(0, length, BN):
        o_n = start + tl.arange(0, BN)
        m_n = o_n < length
        b_k = load_rows(p_k, o_n.to(tl.int64), s_k_token, m_n, o_d, DIM, UPCAST)  # [BN, BD]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2  # [BM, BN]
        b_s = tl.where(m_n[None, :], b_s, float("-inf"))
        _, _, b_l, b_m = softmax_step(b_s, 1.0, b_l, b_m, False, 0.0)

    m_any = b_l > 0.0
    b_lse = (b_m + tl.log2(tl.where(m_any, b_l, 1.0))) * 0.6931471805599453
    b_lse = tl.where(m_any, b_lse, float("-inf"))
    tl.store(p_lse + (i_batch * heads + i_head) * tokens + o_m, b_lse, m_m)


def row_lse(
    q: Float[Tensor, "batch heads tokens dim"],
    k: Float[Tensor, "batch kv_heads kv_tokens dim"],
    *,
    scale: float,
    lengths: Int[Tensor, " batch"] | None,
) -> Float[Tensor, "batch heads tokens"]:
    """``ln Σ_n exp(scale q kᵀ)`` over the valid keys, fp32; -inf where there is none."""
    interpreted = is_interpreted(q)
    batch, heads, tokens, dim = q.shape
    q, k = rows_of(q), rows_of(k)
    tiles = choose_logit_tiles(dim, q.element_size())
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    row_lse_kernel[(ceil(tokens / tiles.rows), batch * heads)](
        q,
        k,
        lse,
        lengths,
        *q.stride()[:3],
        *k.stride()[:3],
        tokens,
        k.shape[2],
        heads,
        k.shape[1],
        scale / log(2),
        DIM=dim,
        UPCAST=interpreted,
        **tiles.options,
    )
    return lse
