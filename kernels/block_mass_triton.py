r"""Block mass in Triton: given the rows' LSE, one pass over ``q kᵀ``.

One program holds a tile of query rows of one head and loops over key tiles,

    mass[i, j] = Σ_{t in i} Σ_{n in j} 2^(s_tn - lse_t / ln 2),  s = log2 e · scale · q kᵀ

Blocks smaller than a tile lie side by side in it; of larger ones a program sums the rows it has,
and the partial sums are added up afterwards, so that no sum depends on the order of programs.
Without an LSE, ``row_lse_kernel`` runs first.
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
    BlockTiles,
    batch_and_head,
    block_places,
    choose_logit_tiles,
    is_interpreted,
    load_rows,
    natural_tokens,
    order_stride,
    rows_of,
    source_head,
    store_block_sums,
    valid_length,
)

__all__ = ["block_mass_kernel", "forward"]


@triton.jit
@no_type_check
def block_mass_kernel(
    p_q,
    p_k,
    p_lse,  # [batch, heads, tokens]
    p_mass,  # [batch, heads, q_blocks, Q_TILES, kv_blocks]
    p_lengths,  # [batch] or None
    p_order,  # [orders, tokens] or None
    s_q_batch,
    s_q_head,
    s_q_token,
    s_k_batch,
    s_k_head,
    s_k_token,
    s_order_head,
    tokens,
    kv_tokens,
    heads,
    kv_heads,
    q_blocks,
    kv_blocks,
    scale_log2,
    DIM: tl.constexpr,
    Q_BLOCK: tl.constexpr,
    Q_TILES: tl.constexpr,
    Q_ROWS: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    KV_TILES: tl.constexpr,
    KV_ROWS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    UPCAST: tl.constexpr,
):
    i_tile = tl.program_id(0)
    i_batch, i_head = batch_and_head(heads)
    p_q += i_batch * s_q_batch + i_head * s_q_head
    p_k += i_batch * s_k_batch + source_head(i_head, heads, kv_heads) * s_k_head
    length = valid_length(p_lengths, i_batch, kv_tokens)

    o_m, m_m = block_places(i_tile, q_blocks, tokens, Q_BLOCK, Q_TILES, Q_ROWS, BM)
    o_token = natural_tokens(p_order, i_head * s_order_head, o_m, m_m)
    # with as many queries as keys, padding keys are padding queries, which may hold anything
    q_length = tokens
    if tokens == kv_tokens:
        q_length = length
    m_q = m_m & (o_token < q_length)
    o_d = tl.arange(0, BD)
    b_q = load_rows(p_q, o_token, s_q_token, m_q, o_d, DIM, UPCAST)  # [BM, BD]
    b_lse = tl.load(p_lse + (i_batch * heads + i_head) * tokens + o_token, m_q, other=float("inf"))
    # rows without a key have logits of -inf alone; an LSE of inf takes a row out
    b_lse = tl.where(b_lse == float("-inf"), 0.0, b_lse * 1.4426950408889634)

    p_mass += (i_batch * heads + i_head) * q_blocks * Q_TILES * kv_blocks
    b_sum = tl.zeros([BM, BN // KV_ROWS], tl.float32)
    for i_kv in range(tl.cdiv(kv_blocks, BN // KV_ROWS) * KV_TILES):
        o_n, m_n = block_places(i_kv, kv_blocks, kv_tokens, KV_BLOCK, KV_TILES, KV_ROWS, BN)
        o_key = natural_tokens(p_order, i_head * s_order_head, o_n, m_n)
        m_n = m_n & (o_key < length)
        b_k = load_rows(p_k, o_key, s_k_token, m_n, o_d, DIM, UPCAST)  # [BN, BD]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2  # [BM, BN]
        b_p = tl.exp2(tl.where(m_n[None, :], b_s, float("-inf")) - b_lse[:, None])
        b_sum = store_block_sums(
            p_mass, b_p, b_sum, i_tile, i_kv, q_blocks, kv_blocks,
            Q_TILES, Q_ROWS, KV_TILES, KV_ROWS, BM, BN,
        )  # fmt: skip


def forward(
    q: Float[Tensor, "batch heads tokens dim"],
    k: Float[Tensor, "batch kv_heads kv_tokens dim"],
    *,
    block: tuple[int, int],
    scale: float,
    lse: Float[Tensor, "batch heads tokens"] | None,
    lengths: Int[Tensor, " batch"] | None,
    order: Int[Tensor, "orders tokens"] | None,
) -> tuple[Float[Tensor, "batch heads q_blocks kv_blocks"], Float[Tensor, "batch heads tokens"]]:
    """``block_mass`` with arguments already checked."""
    interpreted = is_interpreted(q)
    (batch, heads, tokens, dim), (_, kv_heads, kv_tokens, _) = q.shape, k.shape
    q_blocks, kv_blocks = ceil(tokens / block[0]), ceil(kv_tokens / block[1])
    q, k = rows_of(q), rows_of(k)
    if lse is None:
        lse = row_lse(q, k, scale=scale, lengths=lengths)
    tiles = choose_logit_tiles(dim, q.element_size())
    across = BlockTiles.of(block[0], tiles.rows)
    along = BlockTiles.of(block[1], tiles.columns)
    mass = torch.empty(
        batch, heads, q_blocks, across.cuts, kv_blocks, dtype=torch.float32, device=q.device
    )
    block_mass_kernel[(ceil(q_blocks / across.side) * across.cuts, batch * heads)](
        q,
        k,
        lse.float().contiguous(),
        mass,
        lengths,
        None if order is None else order.contiguous(),
        *q.stride()[:3],
        *k.stride()[:3],
        order_stride(order),
        tokens,
        kv_tokens,
        heads,
        kv_heads,
        q_blocks,
        kv_blocks,
        scale / log(2),
        DIM=dim,
        Q_BLOCK=block[0],
        Q_TILES=across.cuts,
        Q_ROWS=across.rows,
        KV_BLOCK=block[1],
        KV_TILES=along.cuts,
        KV_ROWS=along.rows,
        UPCAST=interpreted,
        **tiles.options,
    )
    return mass[:, :, :, 0] if across.cuts == 1 else mass.sum(3), lse
