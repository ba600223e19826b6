"""Permutes the tokens of several tensors in one Triton launch, whatever their dtypes and widths."""

from math import ceil, prod
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Int, Shaped
from torch import Tensor

from accel.kernels.tiles_triton import is_interpreted, order_stride, rows_of

__all__ = ["forward", "permute_kernel"]

# elements of one tile of rows
TILE_ELEMENTS = 4096
# integers of the size of an element: a copy needs no arithmetic, and any dtype fits
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
@no_type_check
def _copy_rows(
    p_order,
    p_in,
    p_out,
    i_tile,
    s_outer,
    s_head,
    s_token,
    s_order_head,
    heads,
    tokens,
    WIDTH: tl.constexpr,
    BT: tl.constexpr,
    BW: tl.constexpr,
):
    """One tile of one tensor: BT tokens of one head of one outer element."""
    tiles = tl.cdiv(tokens, BT)
    i_row = (i_tile // tiles).to(tl.int64)
    i_head = i_row % heads
    p_in += i_row // heads * s_outer + i_head * s_head
    o_t = (i_tile % tiles) * BT + tl.arange(0, BT)
    m_t = o_t < tokens
    o_source = tl.load(p_order + i_head * s_order_head + o_t, m_t, other=0)
    p_out += (i_row * tokens + o_t)[:, None] * WIDTH
    for start in range(0, WIDTH, BW):
        o_w = start + tl.arange(0, BW)
        m = m_t[:, None] & (o_w < WIDTH)[None, :]
        b = tl.load(p_in + o_source[:, None] * s_token + o_w[None, :], m)
        tl.store(p_out + o_w[None, :], b, m)


@triton.jit
@no_type_check
def permute_kernel(
    p_order,  # [orders, tokens]
    p_ins,  # a pointer per tensor [outer, heads, tokens, width], as all tuples here
    p_outs,
    firsts,  # the first program of each tensor
    s_outer,
    s_head,
    s_token,
    heads,
    programs,
    s_order_head,
    tokens,
    WIDTHS: tl.constexpr,
    BTS: tl.constexpr,
    BWS: tl.constexpr,
    TENSORS: tl.constexpr,
):
    i_program = tl.program_id(0)
    for i in tl.static_range(TENSORS):
        i_tile = i_program - firsts[i]
        if (i_tile >= 0) & (i_tile < programs[i]):
            _copy_rows(
                p_order,
                p_ins[i],
                p_outs[i],
                i_tile,
                s_outer[i],
                s_head[i],
                s_token[i],
                s_order_head,
                heads[i],
                tokens,
                WIDTHS[i],
                BTS[i],
                BWS[i],
            )


def forward(
    order: Int[Tensor, "orders tokens"], tensors: list[Shaped[Tensor, "..."]], *, dim: int
) -> list[Shaped[Tensor, "..."]]:
    """``permute`` with arguments already checked."""
    is_interpreted(order)
    tokens = order.shape[1]
    ins = [_as_words(x, dim % x.ndim) for x in tensors]
    outs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in ins]
    widths = tuple(x.shape[3] for x in ins)
    columns = tuple(min(TILE_ELEMENTS, triton.next_power_of_2(width)) for width in widths)
    rows = tuple(TILE_ELEMENTS // width for width in columns)
    programs = tuple(
        x.shape[0] * x.shape[1] * ceil(tokens / tile) for x, tile in zip(ins, rows, strict=True)
    )
    firsts = tuple(sum(programs[:i]) for i in range(len(ins)))
    permute_kernel[(sum(programs),)](
        order.contiguous(),
        tuple(ins),
        tuple(outs),
        firsts,
        *(tuple(x.stride(axis) for x in ins) for axis in range(3)),
        tuple(x.shape[1] for x in ins),
        programs,
        order_stride(order),
        tokens,
        WIDTHS=widths,
        BTS=rows,
        BWS=columns,
        TENSORS=len(ins),
        num_warps=4,
    )
    return [out.view(x.dtype).view(x.shape) for out, x in zip(outs, tensors, strict=True)]


def _as_words(x: Tensor, dim: int) -> Int[Tensor, "outer heads tokens width"]:
    """Axes before the heads and after the tokens flattened; a view where strides allow it."""
    heads = x.shape[dim - 1] if dim else 1
    shape = (prod(x.shape[: max(0, dim - 1)]), heads, x.shape[dim], prod(x.shape[dim + 1 :]))
    if x.is_complex():
        x, shape = torch.view_as_real(x), (*shape[:3], 2 * shape[3])
    return rows_of(x.reshape(shape)).view(WORDS[x.element_size()])
