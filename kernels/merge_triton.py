"""Merges attention over key sets in Triton: any number of parts in one launch, each read once."""

from math import ceil
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from accel.kernels.tiles_triton import batch_and_head, is_interpreted, load_rows, rows_of

__all__ = ["forward", "merge_kernel"]

# elements of one tile of rows
TILE_ELEMENTS = 2048


@triton.jit
@no_type_check
def merge_kernel(
    p_outs,  # a pointer per part, as all tuples here
    p_lses,  # [batch, heads, tokens]
    p_out,
    p_lse,
    s_batch,
    s_head,
    s_token,
    tokens,
    heads,
    DIM: tl.constexpr,
    PARTS: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    i_batch, i_head = batch_and_head(heads)
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    m_m = o_m < tokens
    o_row = (i_batch * heads + i_head) * tokens + o_m
    o_d = tl.arange(0, BD)

    b_m = tl.full([BM], float("-inf"), tl.float32)
    for i in tl.static_range(PARTS):
        b_m = tl.maximum(b_m, tl.load(p_lses[i] + o_row, m_m, other=float("-inf")))
    b_m = tl.where(b_m == float("-inf"), 0.0, b_m)
    b_l = tl.zeros([BM], tl.float32)
    b_acc = tl.zeros([BM, BD], tl.float32)
    for i in tl.static_range(PARTS):
        b_lse = tl.load(p_lses[i] + o_row, m_m, other=float("-inf"))
        b_w = tl.exp(b_lse - b_m)
        p_rows = p_outs[i] + i_batch * s_batch[i] + i_head * s_head[i]
        # an empty row is not read
        m_row = m_m & (b_lse > float("-inf"))
        b_x = load_rows(p_rows, o_m.to(tl.int64), s_token[i], m_row, o_d, DIM, True)
        b_l += b_w
        b_acc += b_w[:, None] * b_x

    m_any = b_l > 0.0
    b_l = tl.where(m_any, b_l, 1.0)
    b_out = (b_acc / b_l[:, None]).to(p_out.dtype.element_ty)
    m_out = m_m[:, None] & (o_d < DIM)[None, :]
    tl.store(p_out + o_row[:, None] * DIM + o_d[None, :], b_out, m_out)
    tl.store(p_lse + o_row, tl.where(m_any, b_m + tl.log(b_l), float("-inf")), m_m)


def forward(
    outs: list[Float[Tensor, "batch heads tokens dim"]],
    lses: list[Float[Tensor, "batch heads tokens"]],
) -> tuple[Float[Tensor, "batch heads tokens dim"], Float[Tensor, "batch heads tokens"]]:
    """``merge`` with parts already checked."""
    is_interpreted(outs[0])
    outs = [rows_of(x) for x in outs]
    batch, heads, tokens, dim = outs[0].shape
    padded = max(16, triton.next_power_of_2(dim))
    rows = TILE_ELEMENTS // padded
    out = torch.empty(outs[0].shape, dtype=outs[0].dtype, device=outs[0].device)
    lse = torch.empty(out.shape[:3], dtype=torch.float32, device=out.device)
    strides = zip(*(x.stride()[:3] for x in outs), strict=True)
    merge_kernel[(ceil(tokens / rows), batch * heads)](
        tuple(outs),
        tuple(x.float().contiguous() for x in lses),
        out,
        lse,
        *strides,
        tokens,
        heads,
        DIM=dim,
        PARTS=len(outs),
        BM=rows,
        BD=padded,
        num_warps=4,
    )
    return out, lse
