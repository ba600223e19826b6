"""Float64 references of the operations around attention: the formulas, materialised."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = [
    "antidiagonal_scores_reference",
    "column_sums_reference",
    "merge_reference",
    "pooled_scores_reference",
]


def column_sums_reference(
    q: Float[Tensor, "batch heads tokens dim"],
    k: Float[Tensor, "batch kv_heads kv_tokens dim"],
    *,
    lse: Float[Tensor, "batch heads tokens"] | None = None,
    weights: Float[Tensor, "batch tokens"] | None = None,
    scale: float | None = None,
    kv_length: int | Int[Tensor, " batch"] | None = None,
) -> Float[Tensor, "batch heads kv_tokens"]:
    """``Σ_t w_t exp(s q_t·k_n - lse_t)`` over valid t; 0 for padding keys."""
    (batch, heads, tokens, dim), (_, kv_heads, kv_tokens, _) = q.shape, k.shape
    lengths = _lengths(kv_length, batch, kv_tokens)
    sums = torch.zeros(batch, heads, kv_tokens, dtype=torch.float64)
    for b in range(batch):
        n = int(lengths[b])
        rows = torch.arange(n if tokens == kv_tokens else tokens)
        if weights is not None:
            rows = rows[weights[b, rows] != 0]
        w = torch.ones(len(rows)) if weights is None else weights[b, rows]
        for h in range(heads):
            keys = k[b, h * kv_heads // heads, :n].double()
            logits = q[b, h, rows].double() @ keys.mT * (dim**-0.5 if scale is None else scale)
            norm = logits.logsumexp(1) if lse is None else lse[b, h, rows].double()
            for t in range(len(rows)):
                if norm[t] > -torch.inf:
                    sums[b, h, :n] += w[t] * (logits[t] - norm[t]).exp()
    return sums


def antidiagonal_scores_reference(
    q: Float[Tensor, "batch heads tokens dim"],
    k: Float[Tensor, "batch kv_heads tokens dim"],
    *,
    block: tuple[int, int],
    stride: int,
    scale: float | None = None,
    kv_length: int | Int[Tensor, " batch"] | None = None,
    order: Int[Tensor, "*heads tokens"] | None = None,
) -> Float[Tensor, "batch heads q_blocks kv_blocks"]:
    """``Σ_{a in i} Σ_{b in j} w_a p_ab``, ``p ∝ w_b exp(s / S Σ_m q_{a,S-1-m}·k_{b,m})``."""
    batch, heads, tokens, dim = q.shape
    scale = (dim**-0.5 if scale is None else scale) / stride
    lengths = _lengths(kv_length, batch, tokens)
    blocks = [-(-tokens // size) for size in block]
    scores = torch.zeros(batch, heads, *blocks, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            places = _order(order, h, tokens)
            # the natural tokens of each cell that holds a valid one
            cells = {
                start // stride: some[some < lengths[b]]
                for start in range(0, tokens, stride)
                if ((some := places[start : start + stride]) < lengths[b]).any()
            }
            if not cells:
                continue
            turn = torch.arange(stride)
            fill = torch.stack([some[turn % len(some)] for some in cells.values()])
            weight = torch.tensor([len(some) / stride for some in cells.values()]).double()
            queries = q[b, h, fill.flip(1)].double().flatten(1)
            keys = k[b, h * k.shape[1] // heads, fill].double().flatten(1)
            p = (scale * queries @ keys.mT + weight.log()).softmax(1) * weight[:, None]
            for i, a in enumerate(cells):
                for j, c in enumerate(cells):
                    scores[b, h, a * stride // block[0], c * stride // block[1]] += p[i, j]
    return scores


def pooled_scores_reference(
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
    """``s q̄_i·k̄_j + ln(‖G_j‖ + 1e-5)``; -inf on key blocks without a valid token."""
    (batch, heads, tokens, dim), (_, kv_heads, kv_tokens, _) = q.shape, k.shape
    scale = dim**-0.5 if scale is None else scale
    lengths = _lengths(kv_length, batch, kv_tokens)
    blocks = (-(-tokens // block[0]), -(-kv_tokens // block[1]))
    scores = torch.full((batch, heads, *blocks), -torch.inf, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            h_kv, n = h * kv_heads // heads, int(lengths[b])
            q_length = n if tokens == kv_tokens else tokens
            means = torch.zeros(blocks[0], dim, dtype=torch.float64)
            for i, places in enumerate(_order(order, h, tokens).split(block[0])):
                if (places < q_length).any():
                    means[i] = q[b, h, places[places < q_length]].double().mean(0)
            for j, places in enumerate(_order(order, h, kv_tokens).split(block[1])):
                if not (places < n).any():
                    continue
                keys, values = (x[b, h_kv, places[places < n]].double() for x in (k, v))
                scores[b, h, :, j] = scale * means @ keys.mean(0)
                if value_bias:
                    slope = (keys - keys.mean(0)).mT @ values
                    scores[b, h, :, j] += (slope.norm() + 1e-5).log()
    return scores


def merge_reference(
    parts: Sequence[
        tuple[Float[Tensor, "batch heads tokens dim"], Float[Tensor, "batch heads tokens"]]
    ],
):
    """``lse = ln Σ exp(lse_i)`` and ``out = Σ exp(lse_i - lse) out_i``, 0 where all are empty."""
    total = torch.stack([lse.double().exp() for _, lse in parts]).sum(0)
    out = sum(
        torch.where((lse > -torch.inf)[..., None], lse.double().exp()[..., None] * x.double(), 0.0)
        for x, lse in parts
    )
    return out / total.where(total > 0, 1.0)[..., None], total.log()


def _lengths(kv_length: int | Tensor | None, batch: int, tokens: int) -> Tensor:
    return torch.as_tensor(tokens if kv_length is None else kv_length).expand(batch)


def _order(order: Tensor | None, head: int, tokens: int) -> Tensor:
    if order is None:
        return torch.arange(tokens)
    return order if order.ndim == 1 else order[head % order.shape[0]]
