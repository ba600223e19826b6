"""What Triton kernels over ``q kᵀ`` share: tiles of token rows, their sizes, blocks in them."""

from typing import NamedTuple, no_type_check

import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "LogitTiles",
    "block_places",
    "blocks_per_tile",
    "choose_logit_tiles",
    "is_interpreted",
    "load_rows",
    "natural_tokens",
    "rows_of",
]


class LogitTiles(NamedTuple):
    """One tile of logits, and how many warps and pipeline stages compute it.

    rows: of the operand that stays. columns: of the one that is looped over. dim: the head dim,
    padded to what a dot product takes.
    """

    rows: int
    columns: int
    dim: int
    warps: int
    stages: int


def choose_logit_tiles(dim: int, element_bytes: int) -> LogitTiles:
    """Tiles of which two operands fit shared memory and no register spills, on sm_80 to sm_100."""
    padded = max(16, triton.next_power_of_2(dim))
    if element_bytes > 2:  # no tensor core takes full fp32
        return LogitTiles(32, 32, padded, 8, 2)
    return LogitTiles(128, 64, padded, 8, 3) if padded <= 128 else LogitTiles(64, 32, padded, 4, 2)


def blocks_per_tile(block: int, tile: int) -> tuple[int, int, int]:
    """Blocks side by side in a tile, tiles a block is cut into (one is 1), rows a block takes."""
    rows = min(tile, triton.next_power_of_2(block))
    return tile // rows, -(-block // tile), rows


def is_interpreted(x: Tensor) -> bool:
    """Whether Triton's interpreter runs the kernels; without it they need a CUDA tensor."""
    interpreted = triton.knobs.runtime.interpret
    if not x.is_cuda and not interpreted:
        raise ValueError(
            f"Triton kernels need CUDA tensors, got {x.device}; move them, or set "
            "TRITON_INTERPRET=1 before triton is imported"
        )
    return interpreted


def rows_of(x: Tensor) -> Tensor:
    """The tensor with unit stride along its last dim, copied only where it has another."""
    return x if x.stride(-1) == 1 else x.contiguous()


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
def load_rows(p, o_row, s_row, m_row, o_d, DIM: tl.constexpr, UPCAST: tl.constexpr):
    """Rows ``[BM, BD]`` of a token matrix; 0 where masked and past the head dim."""
    m = m_row[:, None] & (o_d < DIM)[None, :]
    b = tl.load(p + o_row[:, None] * s_row + o_d[None, :], m, other=0.0)
    # the interpreter multiplies the bit patterns of bf16
    return b.to(tl.float32) if UPCAST else b


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
