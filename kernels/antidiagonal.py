"""Block scores from the antidiagonals of an attention map many times coarser."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from accel.kernels import dispatch
from accel.kernels.arguments import check_block, check_tensors, head_orders, valid_lengths
from accel.kernels.dispatch import refuse_gradients
from accel.kernels.pooling import valid_positions

__all__ = ["antidiagonal_scores"]

# logits held at a time: a few megabytes, so that softmax and the sums find them in a cache
CHUNK_LOGITS = 1 << 19


def antidiagonal_scores(
    q: Float[Tensor, "batch heads tokens dim"],
    k: Float[Tensor, "batch kv_heads kv_tokens dim"],
    *,
    block: tuple[int, int],
    stride: int = 8,
    scale: float | None = None,
    kv_length: int | Int[Tensor, " batch"] | None = None,
    order: Int[Tensor, "*heads tokens"] | None = None,
) -> Float[Tensor, "batch heads q_blocks kv_blocks"]:
    """``scores[i, j] = Σ_{a in i} Σ_{b in j} w_a p_ab`` of an attention map of coarse cells.

    XAttention (arXiv 2503.16428). A cell stands for S = ``stride`` tokens in a row, and a pair of
    cells is scored by its antidiagonal, every query and every key once:
    ``s_ab = scale / S · Σ_m q[a, S - 1 - m] · k[b, m]``, ``p_a = softmax_b(s_ab + ln w_b)``.

    Any length: a cell with n < S valid tokens is filled by repeating them in turn, and weighs
    ``w = n / S``, as a key and as a query; one without any weighs 0. So a row of scores sums to
    the valid queries of its block, over S; 0 where no key is valid.

    block: multiples of the stride, else a ValueError.
    scale: factor on the logits, ``dim ** -0.5`` unless given.
    kv_length: keys from it on are padding; with as many keys as queries so are these queries.
    order: blocks and cells tile the sequence in this order (see ``sparse_attention``).

    fp32, streamed over cells: never the coarse map, which still grows with the tokens squared.
    """
    check_tensors(q, k)
    refuse_gradients(q, k)
    check_block(block)
    if stride < 1 or any(size % stride for size in block):
        raise ValueError(
            f"block {tuple(block)} is not a multiple of the stride {stride}; take a stride that "
            "divides both sizes"
        )
    return _antidiagonal_scores(
        q,
        k,
        list(block),
        stride,
        q.shape[3] ** -0.5 if scale is None else scale,
        valid_lengths(kv_length, k),
        head_orders(order, q, k),
    )


@torch.library.custom_op("accel::antidiagonal_scores", mutates_args=())
def _antidiagonal_scores(
    q: Tensor,
    k: Tensor,
    block: list[int],
    stride: int,
    scale: float,
    lengths: Tensor | None,
    order: Tensor | None,
) -> Tensor:
    if dispatch.runs_triton(q):
        from accel.kernels.antidiagonal_triton import forward
    else:
        forward = _forward
    with dispatch.beside(q):
        of_queries = lengths if q.shape[2] == k.shape[2] else None
        return forward(
            q,
            k,
            _cells(q, block[0], stride, of_queries, order),
            _cells(k, block[1], stride, lengths, order),
            per_block=(block[0] // stride, block[1] // stride),
            scale=scale / stride,
        )


@_antidiagonal_scores.register_fake
def _(q, k, block, stride, scale, lengths, order):
    blocks = (-(-q.shape[2] // block[0]), -(-k.shape[2] // block[1]))
    return q.new_empty(*q.shape[:2], *blocks, dtype=torch.float32)


def _cells(
    x: Tensor, block: int, stride: int, lengths: Tensor | None, order: Tensor | None
) -> tuple[Int[Tensor, "batch orders cells stride"], Float[Tensor, "batch orders cells"]]:
    """The natural tokens that fill each cell of whole blocks, and what the cell weighs."""
    valid = valid_positions(x, lengths, order)
    tokens = x.shape[2]
    inside = pad(valid, (0, -tokens % block)).unflatten(2, (-1, stride))
    count = inside.sum(3)
    first = torch.argsort((~inside).byte(), dim=3, stable=True)  # the valid places, in order
    turn = torch.arange(stride) % count.clamp(min=1)[..., None]
    start = torch.arange(0, count.shape[2] * stride, stride)[:, None]
    place = (start + first.gather(3, turn)).clamp(max=tokens - 1)
    if order is not None:
        place = order.expand(x.shape[0], -1, -1).gather(2, place.flatten(2)).view(place.shape)
    return place, count / stride


def _forward(q, k, q_cells, k_cells, *, per_block: tuple[int, int], scale: float) -> Tensor:
    """On torch: as many key heads at a time as have logits for a chunk, or one and some rows.

    On the CPU too: its matrix products are long, and one pass over stored logits beats two passes
    of the compiled block mass (1.3 to 3.5 times less time at 1000 to 8000 tokens).
    """
    batch, heads = q.shape[:2]
    # an order per query head makes a key head for each
    kv_heads = max(k.shape[1], k_cells[0].shape[1])
    group = heads // kv_heads
    rows, columns = per_block
    cells, kv_cells = q_cells[0].shape[2], k_cells[0].shape[2]
    scores = torch.empty(batch * kv_heads, group, cells // rows, kv_cells // columns)
    q_cells = q_cells[0].flip(3), q_cells[1]  # backwards, so that a cell's score is one product
    some_heads = max(1, CHUNK_LOGITS // (group * cells * kv_cells))
    some_cells = rows * max(1, CHUNK_LOGITS // (group * rows * kv_cells))
    q, k = q.contiguous(), k.contiguous()
    for own in torch.arange(batch * kv_heads).split(some_heads):
        keys, key_weights = _gathered(k, k_cells, own, kv_heads)
        own_queries = (own[:, None] * group + torch.arange(group)).flatten()
        queries, weights = _gathered(q, q_cells, own_queries, heads)
        queries, weights = (x.unflatten(0, (-1, group)) for x in (queries, weights))
        bias = key_weights.log()[:, None]
        for first in range(0, cells, some_cells):
            some = slice(first, first + some_cells)
            logits = torch.baddbmm(bias, queries[:, :, some].flatten(1, 2), keys.mT, alpha=scale)
            # without a valid key it is NaN
            p = logits.softmax(2).nan_to_num_(0.0).unflatten(2, (-1, columns)).sum(3)
            p = p.unflatten(1, (group, -1)) * weights[:, :, some, None]
            scores[own, :, first // rows : first // rows + p.shape[2] // rows] = p.unflatten(
                2, (-1, rows)
            ).sum(3)
    return scores.view(batch, heads, *scores.shape[2:])


def _gathered(
    x: Tensor, cells: tuple[Tensor, Tensor], head: Tensor, heads: int
) -> tuple[Float[Tensor, "some cells width"], Float[Tensor, "some cells"]]:
    """Each cell's tokens side by side, 0 where it weighs nothing, and its weight.

    ``head`` counts through ``heads`` heads of every batch element.
    """
    places, weights = cells
    batch, head = head // heads, head % heads
    source = head * x.shape[1] // heads
    own = head if places.shape[1] > 1 else head * 0
    weights = weights[batch, own]
    flat = (batch * x.shape[1] + source)[:, None, None] * x.shape[2] + places[batch, own]
    rows = x.reshape(-1, x.shape[3]).index_select(0, flat.flatten()).float()
    rows = rows.view(*weights.shape, -1)
    rows[weights == 0] = 0.0
    return rows, weights
