r"""Antidiagonal scores in Triton: two passes over the coarse map, which is never stored.

One program holds a tile of query cells of one head and loops over tiles of key cells. A tile of
logits is a product over stride · dim, one token of every cell at a time,

    s_ab = log2 e · scale · Σ_m q[a, S - 1 - m] · k[b, m] + log2 w_b

The first pass finds the rows' LSE by the online softmax, the second sums ``w_a 2^(s - lse)`` by
blocks. Partial sums of blocks larger than a tile are added up afterwards.
"""

from math import ceil, log
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from accel.kernels.tiles_triton import (
    BlockTiles,
    LogitTiles,
    batch_and_head,
    block_places,
    is_interpreted,
    load_rows,
    rows_of,
    softmax_step,
    source_head,
    store_block_sums,
)

__all__ = ["antidiagonal_kernel", "forward"]


def choose_cell_tiles(dim: int, element_bytes: int) -> LogitTiles:
    """Tiles of cells that fit shared memory and spill no register, on sm_80 to sm_100."""
    if element_bytes > 2:  # no tensor core takes full fp32
        return LogitTiles(32, 32, 32, 8, 2)
    if dim % 16:  # rows that are not aligned are loaded by elements
        return LogitTiles(64, 32, 32, 8, 3)
    return LogitTiles(128, 64, min(32, triton.next_power_of_2(dim)), 8, 3)


@triton.jit
@no_type_check
def _cell_logits(
    p_q,
    p_k,
    p_q_cells,
    p_k_cells,
    p_k_weights,
    o_a,
    m_a,
    o_b,
    m_b,
    s_q_token,
    s_k_token,
    scale_log2,
    DIM: tl.constexpr,
    STRIDE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """``s + log2 w`` of query cells o_a ``[BM]`` and key cells o_b ``[BN]``; -inf where w is 0."""
    D_TILES: tl.constexpr = (DIM + BD - 1) // BD
    b_w = tl.load(p_k_weights + o_b, m_b, other=0.0)
    m_b = b_w > 0.0
    b_s = tl.zeros([BM, BN], tl.float32)
    for i in range(STRIDE * D_TILES):
        o_d = (i % D_TILES) * BD + tl.arange(0, BD)
        o_q = tl.load(p_q_cells + o_a * STRIDE + (STRIDE - 1 - i // D_TILES), m_a, other=0)
        o_k = tl.load(p_k_cells + o_b * STRIDE + i // D_TILES, m_b, other=0)
        b_q = load_rows(p_q, o_q.to(tl.int64), s_q_token, m_a, o_d, DIM, UPCAST)  # [BM, BD]
        b_k = load_rows(p_k, o_k.to(tl.int64), s_k_token, m_b, o_d, DIM, UPCAST)  # [BN, BD]
        b_s = tl.dot(b_q, tl.trans(b_k), b_s, input_precision="ieee")
    b_bias = tl.where(m_b, tl.log2(tl.where(m_b, b_w, 1.0)), float("-inf"))
    return b_s * scale_log2 + b_bias[None, :]


@triton.jit
@no_type_check
def antidiagonal_kernel(
    p_q,
    p_k,
    p_q_cells,  # [batch, orders, q_cells, STRIDE]: the natural tokens of each cell
    p_k_cells,
    p_q_weights,  # [batch, orders, q_cells]
    p_k_weights,
    p_scores,  # [batch, heads, q_blocks, Q_TILES, kv_blocks]
    s_q_batch,
    s_q_head,
    s_q_token,
    s_k_batch,
    s_k_head,
    s_k_token,
    heads,
    kv_heads,
    orders,
    q_blocks,
    kv_blocks,
    scale_log2,
    DIM: tl.constexpr,
    STRIDE: tl.constexpr,
    Q_BLOCK: tl.constexpr,  # in cells
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
    i_table = i_batch * orders + source_head(i_head, heads, orders)
    q_cells, kv_cells = q_blocks * Q_BLOCK, kv_blocks * KV_BLOCK
    p_q_weights += i_table * q_cells
    p_k_weights += i_table * kv_cells
    p_q_cells += i_table * q_cells * STRIDE
    p_k_cells += i_table * kv_cells * STRIDE

    o_a, m_a = block_places(i_tile, q_blocks, q_cells, Q_BLOCK, Q_TILES, Q_ROWS, BM)
    b_w = tl.load(p_q_weights + o_a, m_a, other=0.0)  # [BM]
    m_a = b_w > 0.0
    kv_tiles = tl.cdiv(kv_blocks, BN // KV_ROWS) * KV_TILES

    # a finite pivot keeps 2^(s - m) at 0, not NaN, on rows without a key
    b_m = tl.full([BM], -1e30, tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    for i_kv in range(kv_tiles):
        o_b, m_b = block_places(i_kv, kv_blocks, kv_cells, KV_BLOCK, KV_TILES, KV_ROWS, BN)
        b_s = _cell_logits(
            p_q, p_k, p_q_cells, p_k_cells, p_k_weights, o_a, m_a, o_b, m_b,
            s_q_token, s_k_token, scale_log2, DIM, STRIDE, BM, BN, BD, UPCAST,
        )  # fmt: skip
        _, _, b_l, b_m = softmax_step(b_s, 1.0, b_l, b_m, False, 0.0)
    # the row's weight enters its normaliser: inf takes a row out
    m_a = m_a & (b_l > 0.0)
    b_lse = b_m + tl.log2(tl.where(m_a, b_l, 1.0)) - tl.log2(tl.where(m_a, b_w, 1.0))
    b_lse = tl.where(m_a, b_lse, float("inf"))

    p_scores += (i_batch * heads + i_head) * q_blocks * Q_TILES * kv_blocks
    b_sum = tl.zeros([BM, BN // KV_ROWS], tl.float32)
    for i_kv in range(kv_tiles):
        o_b, m_b = block_places(i_kv, kv_blocks, kv_cells, KV_BLOCK, KV_TILES, KV_ROWS, BN)
        b_s = _cell_logits(
            p_q, p_k, p_q_cells, p_k_cells, p_k_weights, o_a, m_a, o_b, m_b,
            s_q_token, s_k_token, scale_log2, DIM, STRIDE, BM, BN, BD, UPCAST,
        )  # fmt: skip
        b_p = tl.exp2(b_s - b_lse[:, None])
        b_sum = store_block_sums(
            p_scores, b_p, b_sum, i_tile, i_kv, q_blocks, kv_blocks,
            Q_TILES, Q_ROWS, KV_TILES, KV_ROWS, BM, BN,
        )  # fmt: skip


def forward(
    q: Float[Tensor, "batch heads tokens dim"],
    k: Float[Tensor, "batch kv_heads kv_tokens dim"],
    q_cells: tuple[Int[Tensor, "batch orders cells stride"], Float[Tensor, "batch orders cells"]],
    k_cells: tuple[
        Int[Tensor, "batch orders kv_cells stride"], Float[Tensor, "batch orders kv_cells"]
    ],
    *,
    per_block: tuple[int, int],
    scale: float,
) -> Float[Tensor, "batch heads q_blocks kv_blocks"]:
    """``antidiagonal_scores`` of cells already filled; ``per_block`` of them are one block."""
    interpreted = is_interpreted(q)
    batch, heads, _, dim = q.shape
    orders, cells, stride = q_cells[0].shape[1:]
    q_blocks, kv_blocks = cells // per_block[0], k_cells[0].shape[2] // per_block[1]
    q, k = rows_of(q), rows_of(k)
    tiles = choose_cell_tiles(dim, q.element_size())
    across = BlockTiles.of(per_block[0], tiles.rows)
    along = BlockTiles.of(per_block[1], tiles.columns)
    scores = torch.empty(
        batch, heads, q_blocks, across.cuts, kv_blocks, dtype=torch.float32, device=q.device
    )
    antidiagonal_kernel[(ceil(q_blocks / across.side) * across.cuts, batch * heads)](
        q,
        k,
        q_cells[0].to(torch.int32).contiguous(),
        k_cells[0].to(torch.int32).contiguous(),
        q_cells[1].contiguous(),
        k_cells[1].contiguous(),
        scores,
        *q.stride()[:3],
        *k.stride()[:3],
        heads,
        k.shape[1],
        orders,
        q_blocks,
        kv_blocks,
        scale / log(2),
        DIM=dim,
        STRIDE=stride,
        Q_BLOCK=per_block[0],
        Q_TILES=across.cuts,
        Q_ROWS=across.rows,
        KV_BLOCK=per_block[1],
        KV_TILES=along.cuts,
        KV_ROWS=along.rows,
        UPCAST=interpreted,
        **tiles.options,
    )
    return scores[:, :, :, 0] if across.cuts == 1 else scores.sum(3)
