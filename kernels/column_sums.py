"""How much attention every key receives, without the attention matrix."""

from math import log

import torch
from jaxtyping import Float, Int
from torch import Tensor

from accel.kernels import dispatch, native
from accel.kernels.arguments import check_tensors, valid_lengths
from accel.kernels.dispatch import refuse_gradients

__all__ = ["column_sums"]

# logits held at a time: a few megabytes, so that exp2 and the sums find them in a cache
CHUNK_LOGITS = 1 << 19


def column_sums(
    q: Float[Tensor, "batch heads tokens dim"],
    k: Float[Tensor, "batch kv_heads kv_tokens dim"],
    *,
    lse: Float[Tensor, "batch heads tokens"] | None = None,
    weights: Float[Tensor, "batch tokens"] | None = None,
    scale: float | None = None,
    kv_length: int | Int[Tensor, " batch"] | None = None,
) -> Float[Tensor, "batch heads kv_tokens"]:
    """``sums[n] = Σ_t w_t softmax(scale q kᵀ)[t, n]``: the attention that key n receives.

    Token scores as vision models prune and merge by: EViT (arXiv 2202.07800) ranks tokens by what
    the class token gives them, ``column_sums(q[:, :, :1], k)``; FastV (arXiv 2403.06764) by the
    mean over all queries. fp32, streamed, never the matrix.

    lse: the rows' ``ln Σ exp``, as ``sparse_attention(..., return_lse=True)`` gives it beside the
        output; without it one more pass over ``q kᵀ`` finds it. The sums are those of
        ``exp(s - lse)``, so that the LSE of a sparse call gives its normaliser to all keys.
    weights: what a query row counts; 1 unless given. Rows that count 0 are not looked at.
    scale: factor on the logits, ``dim ** -0.5`` unless given.
    kv_length: keys from it on are padding and receive 0; with as many keys as queries so are these
        queries, and count nothing. Padding may hold anything.

    k may have fewer heads than q (query head h reads key head ``h * kv_heads // heads``). A row
    without a valid key, of LSE -inf, gives nothing. There are no atomic additions: equal calls give
    equal sums. ValueError where shapes do not fit, NotImplementedError where q or k asks for a
    gradient.
    """
    check_tensors(q, k)
    refuse_gradients(q, k)
    if lse is not None and lse.shape != q.shape[:3]:
        raise ValueError(f"lse must be {tuple(q.shape[:3])}, got {tuple(lse.shape)}")
    rows = (q.shape[0], q.shape[2])
    if weights is not None and weights.shape != rows:
        raise ValueError(
            f"weights must be {rows}, one per batch element and query, got {tuple(weights.shape)}"
        )
    return _column_sums(
        q,
        k,
        q.shape[3] ** -0.5 if scale is None else scale,
        lse,
        weights,
        valid_lengths(kv_length, k),
    )


@torch.library.custom_op("accel::column_sums", mutates_args=())
def _column_sums(
    q: Tensor,
    k: Tensor,
    scale: float,
    lse: Tensor | None,
    weights: Tensor | None,
    lengths: Tensor | None,
) -> Tensor:
    with dispatch.beside(q):
        weights = _row_weights(q, k, weights, lengths)
        if dispatch.runs_triton(q):
            from accel.kernels.column_sums_triton import forward
        elif q.device.type == "cpu" and native.available() and (weights >= 0).all():
            from accel.kernels.attention_native import column_sums as forward
        else:
            forward = _forward
        return forward(q, k, scale=scale, lse=lse, weights=weights, lengths=lengths)


@_column_sums.register_fake
def _(q, k, scale, lse, weights, lengths):
    return q.new_empty(*q.shape[:2], k.shape[2], dtype=torch.float32)


def _row_weights(
    q: Tensor, k: Tensor, weights: Tensor | None, lengths: Tensor | None
) -> Float[Tensor, "batch tokens"]:
    """fp32 weights, 0 on padding queries."""
    weights = torch.ones(q.shape[0], q.shape[2]) if weights is None else weights.float()
    if lengths is None or q.shape[2] != k.shape[2]:
        return weights
    return weights.masked_fill(torch.arange(q.shape[2]) >= lengths[:, None], 0.0)


def _forward(q, k, *, scale, lse, weights, lengths) -> Tensor:
    """On torch: a key head and the query heads that share it at a time, chunks of rows."""
    (batch, heads, _, dim), (_, kv_heads, kv_tokens, _) = q.shape, k.shape
    group = heads // kv_heads
    sums = torch.zeros(batch, heads, kv_tokens)
    for b in range(batch):
        rows = weights[b].nonzero()[:, 0]
        length = kv_tokens if lengths is None else int(lengths[b])
        step = max(1, CHUNK_LOGITS // (group * max(1, length)))
        for h in range(kv_heads):
            own = slice(h * group, (h + 1) * group)
            keys = k[b, h, :length].float().mT
            for some in rows.split(step):
                queries = q[b, own, some].float() * (scale / log(2))  # [group, rows, dim]
                logits = (queries.reshape(-1, dim) @ keys).view(group, len(some), length)
                if lse is None:
                    p = logits.mul_(log(2)).softmax(2)
                else:
                    # a row without a key takes part with 2^-inf
                    lse2 = (lse[b, own, some].float() / log(2)).nan_to_num(neginf=torch.inf)
                    p = logits.sub_(lse2[..., None]).exp2_()
                sums[b, own, :length] += weights[b, some] @ p
    return sums
