"""Block scores from mean queries and mean keys, and from what the means of keys leave out."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import pad

from accel.kernels import dispatch
from accel.kernels.arguments import check_block, check_tensors, head_orders, valid_lengths
from accel.kernels.dispatch import refuse_gradients
from accel.kernels.pooling import valid_positions

__all__ = ["pooled_scores"]

# fp32 elements gathered or multiplied at a time: a few megabytes, so that they stay in a cache
CHUNK_ELEMENTS = 1 << 20


def pooled_scores(
    q: Float[Tensor, "batch heads tokens dim"],
    k: Float[Tensor, "batch kv_heads kv_tokens dim"],
    v: Float[Tensor, "batch kv_heads kv_tokens dim"],
    *,
    block: tuple[int, int],
    scale: float | None = None,
    value_bias: bool = True,
    kv_length: int | Int[Tensor, " batch"] | None = None,
    order: Int[Tensor, "*heads tokens"] | None = None,
) -> Float[Tensor, "batch heads q_blocks kv_blocks"]:
    """``scores[i, j] = scale q̄_i·k̄_j + ln(‖G_j‖_F + 1e-5)``, means over the blocks' valid tokens.

    PISA (arXiv 2602.01077). ``G_j = Σ_{n in j} (k_n - k̄_j)ᵀ v_n`` is what is lost, to first order,
    where the mean key and value stand in for block j: the bias wants those blocks exact whose
    mean would hurt most.

    scale: factor on the logits, ``dim ** -0.5`` unless given.
    value_bias: without it v is not read, and scores are the products of means alone.
    kv_length: keys from it on are padding; with as many keys as queries so are these queries.
    order: blocks tile the sequence in this order (see ``sparse_attention``).

    fp32 from inputs of any precision. -inf for a key block without a valid token; a query block
    without one has the mean 0. Slopes G of a few blocks are held at a time.
    """
    check_tensors(q, k, v)
    refuse_gradients(q, k, v)
    check_block(block)
    return _pooled_scores(
        q,
        k,
        v if value_bias else None,
        list(block),
        q.shape[3] ** -0.5 if scale is None else scale,
        valid_lengths(kv_length, k),
        head_orders(order, q, k),
    )


@torch.library.custom_op("accel::pooled_scores", mutates_args=())
def _pooled_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    block: list[int],
    scale: float,
    lengths: Tensor | None,
    order: Tensor | None,
) -> Tensor:
    if dispatch.runs_triton(q):
        from accel.kernels.pooled_scores_triton import moments
    else:
        moments = _moments
    with dispatch.beside(q):
        of_queries = lengths if q.shape[2] == k.shape[2] else None
        q_mean, _ = moments(q, None, block=block[0], lengths=of_queries, order=order)
        k_mean, bias = moments(k, v, block=block[1], lengths=lengths, order=order)
        # query heads of one key head lie side by side
        scores = q_mean.unflatten(1, (k_mean.shape[1], -1)).flatten(2, 3) @ k_mean.mT
        scores = scores.mul_(scale).add_(bias[:, :, None])
        return scores.view(*q_mean.shape[:3], -1)


@_pooled_scores.register_fake
def _(q, k, v, block, scale, lengths, order):
    blocks = (-(-q.shape[2] // block[0]), -(-k.shape[2] // block[1]))
    return q.new_empty(*q.shape[:2], *blocks, dtype=torch.float32)


def _moments(
    x: Tensor, v: Tensor | None, *, block: int, lengths: Tensor | None, order: Tensor | None
) -> tuple[Float[Tensor, "batch heads blocks dim"], Float[Tensor, "batch heads blocks"]]:
    """Means of blocks, and ``ln(‖G‖ + 1e-5)``, 0 without v; -inf where no token is valid.

    An order per query head makes a key head for each.
    """
    batch, source_heads, tokens, dim = x.shape
    heads = source_heads if order is None else max(source_heads, order.shape[0])
    valid = valid_positions(x, lengths, order).expand(batch, heads, tokens).flatten(0, 1)
    inside = pad(valid, (0, -tokens % block)).unflatten(1, (-1, block))
    count = inside.sum(2)
    x, v = x.flatten(0, 1), None if v is None else v.flatten(0, 1)
    source = torch.arange(batch * heads) * source_heads // heads
    order = None if order is None else order.expand(heads, -1).repeat(batch, 1)
    means = torch.empty(*count.shape, dim)
    bias = torch.where(count > 0, 0.0, -torch.inf)
    step = max(1, CHUNK_ELEMENTS // (tokens * dim))
    for first in range(0, batch * heads, step):
        own = slice(first, first + step)
        places = None if order is None else source[own, None] * tokens + order[own]
        outside = ~inside[own]
        part = _blocked(x, own, places, outside)
        means[own] = mean = part.sum(2) / count[own].clamp(min=1)[..., None]
        if v is not None:
            part = part - mean[:, :, None]
            part[outside] = 0.0
            bias[own] += _log_norms(part, _blocked(v, own, places, outside))
    return means.unflatten(0, (batch, heads)), bias.unflatten(0, (batch, heads))


def _blocked(
    x: Tensor, own: slice, places: Tensor | None, outside: Tensor
) -> Float[Tensor, "some blocks block dim"]:
    """Heads in blocks, 0 outside: ``own`` as they lie, or the rows ``places`` of all heads."""
    blocks, block = outside.shape[1:]
    if places is None:
        x = x[own]
    else:
        x = x.flatten(0, 1).index_select(0, places.flatten()).unflatten(0, places.shape)
    x = pad(x.float(), (0, 0, 0, blocks * block - x.shape[1])).unflatten(1, (blocks, block))
    x[outside] = 0.0
    return x


def _log_norms(keys: Tensor, values: Tensor) -> Float[Tensor, "some blocks"]:
    """``ln(‖keys_jᵀ values_j‖_F + 1e-5)``."""
    blocks, dim = keys.flatten(0, 1), keys.shape[3]
    step = max(1, CHUNK_ELEMENTS // dim**2)
    pairs = zip(blocks.split(step), values.flatten(0, 1).split(step), strict=True)
    norms = torch.cat([vector_norm(a.mT @ b, dim=(1, 2)) for a, b in pairs])
    return (norms + 1e-5).log().view(keys.shape[:2])
