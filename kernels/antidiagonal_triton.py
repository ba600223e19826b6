r"""Antidiagonal scores in Triton: two passes over the coarse map, which is never stored.

One program holds a tile of query cells of one head and loops over tiles of key cells. A tile of
logits is a product over stride · dim, one token of every cell at a time,

    s_ab = log2 e · scale · Σ_m q[a, S - 1 - m] · k[b, m] + log2 w_b

The first pass finds the rows' LSE by the online softmax, the second sums ``w_a 2^(s - lse)`` by
blocks. Partial sums of blocks larger than a tile are added up afterwards.
"""

from math import ceil, log
from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from accel.kernels.tiles_triton import block_places, blocks_per_tile, is_interpreted, rows_of

__all__ = ["antidiagonal_kernel", "forward"]


class CellTiles(NamedTuple):
    """Query cells, key cells and dims of one product, its warps and pipeline stages."""

    rows: int
    columns: int
    dim: int
    warps: int
    stages: int


def choose_cell_tiles(dim: int, element_bytes: int) -> CellTiles:
    """Tiles that fit shared memory and spill no register, on sm_80 to sm_100."""
    if element_bytes > 2:  # no tensor core takes full fp32
        return CellTiles(32, 32, 32, 8, 2)
    if dim % 16:  # rows that are not aligned are loaded by elements
        return CellTiles(64, 32, 32, 8, 3)
    return CellTiles(128, 64, min(32, triton.next_power_of_2(dim)), 8, 3)


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
        m_d = o_d < DIM
        o_q = tl.load(p_q_cells + o_a * STRIDE + (STRIDE - 1 - i // D_TILES), m_a, other=0)
        o_k = tl.load(p_k_cells + o_b * STRIDE + i // D_TILES, m_b, other=0)
        p_q_rows = p_q + o_q.to(tl.int64)[:, None] * s_q_token + o_d[None, :]
        p_k_rows = p_k + o_k.to(tl.int64)[:, None] * s_k_token + o_d[None, :]
        b_q = tl.load(p_q_rows, m_a[:, None] & m_d[None, :], other=0.0)  # [BM, BD]
        b_k = tl.load(p_k_rows, m_b[:, None] & m_d[None, :], other=0.0)  # [BN, BD]
        if UPCAST:  # the interpreter multiplies the bit patterns of bf16
            b_q, b_k = b_q.to(tl.float32), b_k.to(tl.float32)
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
    Q_SIDE: tl.constexpr = BM // Q_ROWS  # query blocks side by side in a tile
    KV_SIDE: tl.constexpr = BN // KV_ROWS
    i_tile = tl.program_id(0)
    i_batch = (tl.program_id(1) // heads).to(tl.int64)
    i_head = (tl.program_id(1) % heads).to(tl.int64)
    p_q += i_batch * s_q_batch + i_head * s_q_head
    p_k += i_batch * s_k_batch + (i_head * kv_heads // heads) * s_k_head
    i_table = i_batch * orders + i_head * orders // heads
    q_cells, kv_cells = q_blocks * Q_BLOCK, kv_blocks * KV_BLOCK
    p_q_weights += i_table * q_cells
    p_k_weights += i_table * kv_cells
    p_q_cells += i_table * q_cells * STRIDE
    p_k_cells += i_table * kv_cells * STRIDE

    o_a, m_a = block_places(i_tile, q_blocks, q_cells, Q_BLOCK, Q_TILES, Q_ROWS, BM)
    b_w = tl.load(p_q_weights + o_a, m_a, other=0.0)  # [BM]
    m_a = b_w > 0.0
    kv_tiles = tl.cdiv(kv_blocks, KV_SIDE) * KV_TILES

    # a finite pivot keeps 2^(s - m) at 0, not NaN, on rows without a key
    b_m = tl.full([BM], -1e30, tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    for i_kv in range(kv_tiles):
        o_b, m_b = block_places(i_kv, kv_blocks, kv_cells, KV_BLOCK, KV_TILES, KV_ROWS, BN)
        b_s = _cell_logits(
            p_q, p_k, p_q_cells, p_k_cells, p_k_weights, o_a, m_a, o_b, m_b,
            s_q_token, s_k_token, scale_log2, DIM, STRIDE, BM, BN, BD, UPCAST,
        )  # fmt: skip
        b_m_new = tl.maximum(b_m, tl.max(b_s, 1))
        b_l = b_l * tl.exp2(b_m - b_m_new) + tl.sum(tl.exp2(b_s - b_m_new[:, None]), 1)
        b_m = b_m_new
    # the row's weight enters its normaliser: inf takes a row out
    m_a = m_a & (b_l > 0.0)
    b_lse = b_m + tl.log2(tl.where(m_a, b_l, 1.0)) - tl.log2(tl.where(m_a, b_w, 1.0))
    b_lse = tl.where(m_a, b_lse, float("inf"))

    o_i = (i_tile // Q_TILES) * Q_SIDE + tl.arange(0, Q_SIDE)
    o_row = ((i_batch * heads + i_head) * q_blocks + o_i) * Q_TILES + i_tile % Q_TILES
    b_sum = tl.zeros([BM, KV_SIDE], tl.float32)
    for i_kv in range(kv_tiles):
        o_b, m_b = block_places(i_kv, kv_blocks, kv_cells, KV_BLOCK, KV_TILES, KV_ROWS, BN)
        b_s = _cell_logits(
            p_q, p_k, p_q_cells, p_k_cells, p_k_weights, o_a, m_a, o_b, m_b,
            s_q_token, s_k_token, scale_log2, DIM, STRIDE, BM, BN, BD, UPCAST,
        )  # fmt: skip
        b_p = tl.exp2(b_s - b_lse[:, None])
        b_part = tl.sum(tl.reshape(b_p, [BM, KV_SIDE, KV_ROWS]), 2)  # [BM, KV_SIDE]
        # a block in one tile has nothing to carry on
        b_sum = b_part if KV_TILES == 1 else tl.where(i_kv % KV_TILES == 0, 0.0, b_sum) + b_part
        b_score = tl.sum(tl.reshape(b_sum, [Q_SIDE, Q_ROWS, KV_SIDE]), 1)  # [Q_SIDE, KV_SIDE]
        o_j = (i_kv // KV_TILES) * KV_SIDE + tl.arange(0, KV_SIDE)
        m_out = (o_i < q_blocks)[:, None] & (o_j < kv_blocks)[None, :]
        m_out = m_out & (i_kv % KV_TILES == KV_TILES - 1)
        tl.store(p_scores + o_row[:, None] * kv_blocks + o_j[None, :], b_score, m_out)


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
    side, cuts, q_rows = blocks_per_tile(per_block[0], tiles.rows)
    _, kv_cuts, kv_rows = blocks_per_tile(per_block[1], tiles.columns)
    scores = torch.empty(
        batch, heads, q_blocks, cuts, kv_blocks, dtype=torch.float32, device=q.device
    )
    antidiagonal_kernel[(ceil(q_blocks / side) * cuts, batch * heads)](
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
        Q_TILES=cuts,
        Q_ROWS=q_rows,
        KV_BLOCK=per_block[1],
        KV_TILES=kv_cuts,
        KV_ROWS=kv_rows,
        BM=tiles.rows,
        BN=tiles.columns,
        BD=tiles.dim,
        UPCAST=interpreted,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return scores[:, :, :, 0] if cuts == 1 else scores.sum(3)
