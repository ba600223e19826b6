"""What the Triton kernels share: tiles of token rows, their sizes, blocks in them, softmax's sums.

Programs are numbered by tile, or block, along axis 0 and by batch element and head along axis 1.
"""

from typing import NamedTuple, no_type_check

import triton
import triton.language as tl
from jaxtyping import Int
from torch import Tensor

__all__ = [
    "BlockTiles",
    "LogitTiles",
    "batch_and_head",
    "block_places",
    "block_sum",
    "choose_logit_tiles",
    "is_interpreted",
    "load_rows",
    "natural_tokens",
    "order_stride",
    "rows_of",
    "rows_of_block",
    "softmax_step",
    "source_head",
    "store_block_sums",
    "to_e4m3",
    "upcast",
    "valid_length",
]


class LogitTiles(NamedTuple):
    """One tile of logits, and how many warps and pipeline stages compute it.

    rows: of the operand that stays. columns: of the one that is looped over. dim: what a product
    takes of the head dim at a time, padded to what a dot product takes.
    """

    rows: int
    columns: int
    dim: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        """What a launch says of the tiles."""
        return {
            "BM": self.rows,
            "BN": self.columns,
            "BD": self.dim,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


def choose_logit_tiles(dim: int, element_bytes: int) -> LogitTiles:
    """Tiles of which two operands fit shared memory and no register spills, on sm_80 to sm_100."""
    padded = max(16, triton.next_power_of_2(dim))
    if element_bytes > 2:  # no tensor core takes full fp32
        return LogitTiles(32, 32, padded, 8, 2)
    return LogitTiles(128, 64, padded, 8, 3) if padded <= 128 else LogitTiles(64, 32, padded, 4, 2)


class BlockTiles(NamedTuple):
    """How blocks lie in tiles: several side by side, or one cut into several tiles.

    side: blocks in a tile. cuts: tiles a block is cut into (one is 1). rows: what a block takes.
    """

    side: int
    cuts: int
    rows: int

    @classmethod
    def of(cls, block: int, tile: int) -> "BlockTiles":
        rows = min(tile, triton.next_power_of_2(block))
        return cls(tile // rows, -(-block // tile), rows)


def is_interpreted(x: Tensor) -> bool:
    """Whether Triton's interpreter runs the kernels; without it they need a CUDA tensor."""
    interpreted = triton.knobs.runtime.interpret
    if not x.is_cuda and not interpreted:
        raise ValueError(
            f"Triton kernels need CUDA tensors, got {x.device}; move them, take backend='auto' "
            "where there is one, or set TRITON_INTERPRET=1 before triton is imported"
        )
    return interpreted


def rows_of(x: Tensor) -> Tensor:
    """The tensor with unit stride along its last dim, copied only where it has another."""
    return x if x.stride(-1) == 1 else x.contiguous()


def order_stride(order: Int[Tensor, "orders tokens"] | None) -> int:
    """From one head's order to the next's; 0 where all heads have the same, or none."""
    return 0 if order is None or order.shape[0] == 1 else order.shape[1]


@triton.jit
@no_type_check
def batch_and_head(heads):
    """The batch element and the head of this program, int64."""
    return (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)


@triton.jit
@no_type_check
def source_head(i_head, heads, source_heads):
    """Which of fewer heads this one reads, int64; divided in 32 bits, as 64 take a call."""
    return (i_head.to(tl.int32) * source_heads // heads).to(tl.int64)


@triton.jit
@no_type_check
def valid_length(p_lengths, i_batch, tokens):
    """How many tokens of a batch element are valid: all of them without lengths."""
    if p_lengths is None:
        return tokens
    else:
        return tl.load(p_lengths + i_batch)


@triton.jit
@no_type_check
def natural_tokens(p_order, o_head, o_position, m_position):
    """The natural tokens at these positions of the ordered sequence, int64."""
    if p_order is None:
        return o_position.to(tl.int64)
    else:
        return tl.load(p_order + o_head + o_position, m_position, other=0).to(tl.int64)


@triton.jit
@no_type_check
def upcast(x, UPCAST: tl.constexpr):
    # the interpreter multiplies the bit patterns of bf16
    return x.to(tl.float32) if UPCAST else x


@triton.jit
@no_type_check
def to_e4m3(x, UPCAST: tl.constexpr):
    """fp32 of at most 448 to the nearest number of e4m3."""
    if UPCAST:
        # the interpreter loses the carry of a mantissa that rounds up: it gets none to round
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
        small = (x + 24576.0) - 24576.0  # below 2^-6 all steps are of 2^-9
        x = tl.where(tl.abs(x) < 0.015625, small, bits.to(tl.float32, bitcast=True))
    return x.to(tl.float8e4nv)


@triton.jit
@no_type_check
def load_rows(
    p,
    o_row,
    s_row,
    m_row,
    o_d,
    DIM: tl.constexpr,
    UPCAST: tl.constexpr,
    MASKED: tl.constexpr = True,
):
    """Channels o_d ``[BD]`` of rows ``[BM, BD]``; 0 where masked and past the head dim.

    Rows that are not MASKED are all loaded; m_row is not looked at.
    """
    p_rows = p + o_row[:, None] * s_row + o_d[None, :]
    if MASKED:
        b = tl.load(p_rows, m_row[:, None] & (o_d < DIM)[None, :], other=0.0)
    elif o_d.shape[0] != DIM:
        b = tl.load(p_rows, (o_d < DIM)[None, :], other=0.0)
    else:
        b = tl.load(p_rows)
    return upcast(b, UPCAST)


@triton.jit
@no_type_check
def rows_of_block(p_order, o_head, i_block, o_in, tokens, length, BLOCK: tl.constexpr):
    """The natural tokens at these places of a block, which of them exist, and which are valid."""
    o_position = i_block * BLOCK + o_in
    m_position = (o_in < BLOCK) & (o_position < tokens)
    o_token = natural_tokens(p_order, o_head, o_position, m_position)
    return o_token, m_position, m_position & (o_token < length)


@triton.jit
@no_type_check
def block_sum(
    p,
    s_row,
    p_order,
    o_head,
    i_block,
    tokens,
    length,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """Sum ``[BD]`` and number of the valid rows of a block, BT rows at a time, in fp32."""
    o_d = tl.arange(0, BD)
    b_sum = tl.zeros([BD], tl.float32)
    b_count = tl.zeros([BT], tl.int32)
    for start in range(0, BLOCK, BT):
        o_in = start + tl.arange(0, BT)
        o_t, _, m_t = rows_of_block(p_order, o_head, i_block, o_in, tokens, length, BLOCK)
        b_sum += tl.sum(load_rows(p, o_t, s_row, m_t, o_d, DIM, True), 0)
        b_count += m_t.to(tl.int32)
    return b_sum, tl.sum(b_count, 0).to(tl.float32)


@triton.jit
@no_type_check
def softmax_step(b_s, b_scale, b_l, b_m, PER_ROW: tl.constexpr, LIFT: tl.constexpr):
    """Weights ``2^(b_scale b_s - m')`` of more logits ``[BM, BN]``, with ``m' ≥ max - LIFT``.

    Returns them, what earlier sums are multiplied by, and the new sum and pivot. b_scale is
    positive, a number or ``[BM]``; a finite first pivot keeps all 0, not NaN, on rows of -inf.
    """
    b_m_new = tl.maximum(b_m, tl.max(b_s, 1) * b_scale - LIFT)  # [BM]
    b_factor = b_scale[:, None] if PER_ROW else b_scale
    b_p = tl.exp2(b_s * b_factor - b_m_new[:, None])  # [BM, BN]
    b_alpha = tl.exp2(b_m - b_m_new)  # [BM]
    return b_p, b_alpha, b_l * b_alpha + tl.sum(b_p, 1), b_m_new


@triton.jit
@no_type_check
def block_places(
    i_tile, blocks, length, BLOCK: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, TILE
):
    """The positions of a tile that starts with a block, and which of them exist; ``[TILE]``.

    Blocks of BLOCK positions take ROWS rows each, or are cut into TILES tiles.
    """
    o_row = tl.arange(0, TILE)
    o_in = (i_tile % TILES) * TILE + o_row % ROWS
    o_block = (i_tile // TILES) * (TILE // ROWS) + o_row // ROWS
    o_position = o_block * BLOCK + o_in
    return o_position, (o_in < BLOCK) & (o_block < blocks) & (o_position < length)


@triton.jit
@no_type_check
def store_block_sums(
    p_sums,  # [..., q_blocks, Q_TILES, kv_blocks] of this batch element and head
    b_p,
    b_sum,
    i_tile,
    i_kv,
    q_blocks,
    kv_blocks,
    Q_TILES: tl.constexpr,
    Q_ROWS: tl.constexpr,
    KV_TILES: tl.constexpr,
    KV_ROWS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Adds a tile of weights ``[BM, BN]`` to its blocks' sums and stores those that are whole.

    Returns the rows' sums ``[BM, BN / KV_ROWS]``, which the next tile of the same block goes on
    with. A program owns its tile of query rows: query blocks of several tiles get several sums.
    """
    Q_SIDE: tl.constexpr = BM // Q_ROWS
    KV_SIDE: tl.constexpr = BN // KV_ROWS
    if KV_SIDE == 1:
        b_part = tl.sum(b_p, 1)[:, None]
    else:
        b_part = tl.sum(tl.reshape(b_p, [BM, KV_SIDE, KV_ROWS]), 2)
    # a block in one tile has nothing to carry on
    b_sum = b_part if KV_TILES == 1 else tl.where(i_kv % KV_TILES == 0, 0.0, b_sum) + b_part
    b_out = tl.sum(tl.reshape(b_sum, [Q_SIDE, Q_ROWS, KV_SIDE]), 1)  # [Q_SIDE, KV_SIDE]
    o_i = (i_tile // Q_TILES) * Q_SIDE + tl.arange(0, Q_SIDE)
    o_j = (i_kv // KV_TILES) * KV_SIDE + tl.arange(0, KV_SIDE)
    m_out = (o_i < q_blocks)[:, None] & (o_j < kv_blocks)[None, :]
    m_out = m_out & (i_kv % KV_TILES == KV_TILES - 1)
    o_row = o_i * Q_TILES + i_tile % Q_TILES
    tl.store(p_sums + o_row[:, None] * kv_blocks + o_j[None, :], b_out, m_out)
    return b_sum
