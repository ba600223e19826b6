"""What stands in for whole key blocks: their means, valid lengths, and slopes of key groups."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["TAYLOR_GROUP", "block_slopes", "in_order", "pool_blocks", "valid_positions"]

# consecutive key blocks that share one slope
TAYLOR_GROUP = 32


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


def block_slopes(
    k: Float[Tensor, "batch kv_heads tokens dim"],
    v: Float[Tensor, "batch kv_heads tokens dim"],
    stands_in: Bool[Tensor, "mask_batch heads blocks"],
    *,
    block: int,
    lengths: Int[Tensor, " batch"] | None = None,
    order: Int[Tensor, "orders tokens"] | None = None,
) -> Float[Tensor, "batch heads groups dim dim"]:
    """``Ḡ_g / block``: how the value of a left-out block turns with the query, for ``taylor``.

    ``G_j = Σ_{n in j} (k_n - k̄_j)ᵀ v_n`` over the valid tokens of block j, and ``Ḡ_g`` its mean
    over the blocks of group g (``TAYLOR_GROUP`` consecutive ones) that hold a valid token and that
    ``stands_in`` names for this query head: 0 where there is none. To first order in
    ``k_n - k̄_j``, ``Σ_n exp(s q·k_n) v_n = exp(s q·k̄_j) (n_j v̄_j + s q G_j)``; one slope for a
    group of blocks is PASA's (Piecewise Sparse Attention). Divided by ``block``, slopes have the
    size of single products k v and stay inside fp16. Computed in fp32, returned in the dtype of k.
    """
    batch, _, _, dim = k.shape
    heads, blocks = stands_in.shape[1:]
    tail = blocks * block - k.shape[2]
    valid = valid_positions(k, lengths, order)

    def blocked(x: Tensor) -> Tensor:
        x = torch.where(valid[..., None], in_order(x, order), 0.0).float()
        return pad(x, (0, 0, 0, tail)).unflatten(2, (blocks, block))

    ones = pad(valid.float(), (0, tail)).unflatten(2, (blocks, block))[..., None]
    keys, values, count = blocked(k), blocked(v), ones.sum((3, 4))
    # padding is no deviation from the mean
    keys = (keys - keys.sum(3, keepdim=True) / count.clamp(min=1)[..., None, None]) * ones

    groups = -(-blocks // TAYLOR_GROUP)
    fill = groups * TAYLOR_GROUP - blocks
    count = count.expand(-1, keys.shape[1], -1)
    count = count.repeat_interleave(heads // count.shape[1], 1)
    weights = pad((stands_in & (count > 0)).float(), (0, fill)).unflatten(2, (groups, -1))
    weights = weights / (block * weights.sum(3, keepdim=True).clamp(min=1))
    keys, values = (
        pad(x, (0, 0, 0, 0, 0, fill)).unflatten(2, (groups, -1)) for x in (keys, values)
    )
    slopes = k.new_empty(batch, heads, groups, dim, dim)
    for h in range(heads):  # a head at a time: keys are weighted by what this head leaves out
        source = h * keys.shape[1] // heads
        weighted = keys[:, source] * weights[:, h, :, :, None, None]
        slopes[:, h] = weighted.flatten(2, 3).mT @ values[:, source].flatten(2, 3)
    return slopes


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
