"""The mean key, the mean value and the log of the valid length of every key block."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["in_order", "pool_blocks", "valid_positions"]


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
    tail = -k.shape[2] % block
    valid = valid_positions(k, lengths, order)
    count = pad(valid.float(), (0, tail)).unflatten(2, (-1, block)).sum(3)

    def mean(x: Tensor) -> Tensor:
        x = torch.where(valid[..., None], in_order(x, order), 0.0).float()
        total = pad(x, (0, 0, 0, tail)).unflatten(2, (-1, block)).sum(3)
        return (total / count.clamp(min=1)[..., None]).to(k.dtype)

    k_mean, v_mean = mean(k), mean(v)
    return k_mean, v_mean, count.log().expand(-1, k_mean.shape[1], -1)


def in_order(
    x: Float[Tensor, "batch heads tokens dim"], order: Int[Tensor, "orders tokens"] | None
) -> Float[Tensor, "batch ordered_heads tokens dim"]:
    """Position i of each head becomes its natural token ``order[·, i]``.

    An order per query head turns key heads into as many heads as there are orders.
    """
    if order is None:
        return x
    batch, heads, tokens, dim = x.shape
    out_heads = max(heads, order.shape[0])
    head = torch.arange(out_heads, device=x.device) * heads // out_heads
    row = torch.arange(batch, device=x.device)[:, None, None] * heads + head[:, None]
    flat = (row * tokens + order).flatten()
    return x.reshape(-1, dim).index_select(0, flat).view(batch, out_heads, tokens, dim)


def valid_positions(
    k: Float[Tensor, "batch kv_heads tokens dim"],
    lengths: Int[Tensor, " batch"] | None,
    order: Int[Tensor, "orders tokens"] | None,
) -> Bool[Tensor, "batch orders tokens"]:
    """Whether the token at each position of each order (one, if None) is not padding."""
    batch, _, tokens, _ = k.shape
    if lengths is None:
        orders = 1 if order is None else order.shape[0]
        return torch.ones(batch, orders, tokens, dtype=torch.bool, device=k.device)
    natural = torch.arange(tokens, device=k.device)[None] if order is None else order
    return natural < lengths[:, None, None]
