"""The mean key, the mean value and the log of the valid length of every key block."""

from math import ceil

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["pool_blocks"]


def pool_blocks(
    k: Float[Tensor, "batch kv_heads tokens dim"],
    v: Float[Tensor, "batch kv_heads tokens dim"],
    *,
    block: int,
    lengths: Int[Tensor, " batch"] | None = None,
    order: Int[Tensor, "orders tokens"] | None = None,
) -> tuple[
    Float[Tensor, "batch pooled_heads blocks dim"],
    Float[Tensor, "batch pooled_heads blocks dim"],
    Float[Tensor, "batch pooled_heads blocks"],
]:
    """``k̄_j = Σ k_n / n_j``, ``v̄_j = Σ v_n / n_j``, ``ln n_j``; block j has ``n_j`` valid tokens.

    Means are accumulated in fp32 and returned in the dtype of k; ``ln n_j`` is fp32, -inf where
    no token is valid (its means are 0). Natural tokens from ``lengths[b]`` on are not valid.
    With one order per query head there is one pooled head for each of them, else one per key head.
    """
    batch, kv_heads, tokens, _ = k.shape
    valid = torch.ones(batch, 1, tokens, dtype=torch.bool, device=k.device)
    if lengths is not None:
        valid = (torch.arange(tokens, device=k.device) < lengths[:, None])[:, None]
    if order is not None:
        head = torch.arange(order.shape[0], device=k.device) * kv_heads // order.shape[0]
        valid = valid[:, 0, order]
        if order.shape[0] == 1:
            k, v = (x[:, :, order[0]] for x in (k, v))
        else:
            k, v = (x[:, head[:, None], order] for x in (k, v))
    tail = ceil(tokens / block) * block - tokens
    weight = pad(valid.float(), (0, tail)).unflatten(2, (-1, block))
    count = weight.sum(3)

    def mean(x: Tensor) -> Tensor:
        x = torch.where(valid[..., None], x, 0.0).float()
        total = pad(x, (0, 0, 0, tail)).unflatten(2, (-1, block)).sum(3)
        return (total / count.clamp(min=1)[..., None]).to(k.dtype)

    return mean(k), mean(v), count.log().expand(-1, k.shape[1], -1)
