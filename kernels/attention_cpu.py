"""Block-sparse attention on the CPU: gathered key blocks and batched matrix products, in fp32.

Query blocks with like counts are computed together, few enough that logits stay in the cache.
The logits carry ``scale · log2 e`` (``exp2`` needs no more), and a column more: queries end in 1,
keys in 0, or -inf where there is no valid token. So one product masks ragged blocks, padding and
the unused end of a list, and no pass over the logits is spent on it.

Where ``max |q| · max |k|`` bounds a head's logits by 2^±60, softmax needs no pivot in fp32 and the
two passes for it are saved; other heads subtract the row maximum.
"""

from math import log

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor
from torch.nn.functional import pad

from accel.kernels.block_mask import dense_rows
from accel.kernels.pooling import in_order, valid_positions

__all__ = ["forward"]

# logits of one step: two cores' worth of second-level cache
CHUNK_LOGITS = 1 << 19
# |log2| of the weights that need no pivot: far from the ends of fp32, sums and products included
FREE_LOGIT = 60.0


def forward(
    q: Float[Tensor, "batch heads tokens dim"],
    k: Float[Tensor, "batch kv_heads kv_tokens dim"],
    v: Float[Tensor, "batch kv_heads kv_tokens dim"],
    counts: Int32[Tensor, "mask_batch heads q_blocks"],
    indices: Int32[Tensor, "mask_batch heads q_blocks max_count"],
    *,
    block: tuple[int, int],
    pooled: tuple[bool, ...],
    scale: float,
    lengths: Int[Tensor, " batch"] | None,
    order: Int[Tensor, "orders tokens"] | None,
):
    """``sparse_attention`` with arguments already checked; returns the result and the LSE."""
    batch, heads, tokens, dim = q.shape
    out = torch.zeros(batch, heads, tokens, dim)
    lse = torch.full((batch, heads, tokens), -torch.inf)
    counts, indices = counts.expand(batch, -1, -1), indices.expand(batch, -1, -1, -1)
    pooling = torch.tensor(pooled)[:, None].expand_as(counts)
    dense = (counts == -(-k.shape[2] // block[1])).all(2)
    sparse = ((counts > 0) | pooling) & ~dense[..., None]
    if sparse.any():
        queries = _query_blocks(in_order(q, order), block[0], scale / log(2))
        sources = _key_blocks(k, v, block[1], lengths, order)
        rows = _Rows(queries, *sources, counts, indices, pooling)
        parts = (x.flatten(2, 3)[:, :, :tokens] for x in rows.attend(sparse))
        for target, part in zip((out, lse), parts, strict=True):
            if order is None:
                target.copy_(part)
            else:
                flat = torch.arange(batch * heads).view(batch, heads, 1) * tokens + order
                target.flatten(0, 2)[flat.flatten()] = part.flatten(0, 2)
    if dense.any():
        _dense_heads(q, k, v, dense, scale, lengths, out, lse)
    return out.to(q.dtype), lse


def _dense_heads(q, k, v, dense, scale, lengths, out, lse) -> None:
    """Heads that keep every block: torch's own attention, whatever the order."""
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        heads = dense[b].nonzero()[:, 0]
        length = k.shape[2] if lengths is None else int(lengths[b])
        if len(heads) and length:
            # what F.scaled_dot_product_attention calls; that keeps the LSE to itself
            one_out, one_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q[b : b + 1, heads].float(),
                *(x[b : b + 1, heads // group, :length].float() for x in (k, v)),
                scale=scale,
            )
            out[b, heads], lse[b, heads] = one_out[0], one_lse[0]


def _query_blocks(q: Tensor, block: int, scale: float) -> Tensor:
    """``[batch, heads, q_blocks, block, dim + 1]``: scaled queries, then 1."""
    batch, heads, tokens, dim = q.shape
    x = torch.zeros(batch, heads, tokens + -tokens % block, dim + 1)
    torch.mul(q.float(), scale, out=x[:, :, :tokens, :dim])
    x[..., dim] = 1
    return x.unflatten(2, (-1, block))


def _key_blocks(k: Tensor, v: Tensor, block: int, lengths: Tensor | None, order: Tensor | None):
    """Keys with their bias column, values, and the valid tokens of each block.

    keys ``[batch * heads * blocks + 1, block, dim + 1]``, values alike without the column; the
    last block holds no valid token. The counts are ``[batch * heads, blocks]``.
    """
    valid = valid_positions(k, lengths, order)
    k, v = (in_order(x, order).float() for x in (k, v))
    if lengths is not None:
        k, v = (torch.where(valid[..., None], x, 0.0) for x in (k, v))
    batch, heads, tokens, dim = k.shape
    blocks = -(-tokens // block)
    keys = torch.zeros(batch * heads * blocks + 1, block, dim + 1)
    values = torch.zeros(batch * heads * blocks + 1, block, dim)
    keys[..., dim] = -torch.inf
    inner = keys[:-1].view(batch, heads, -1, dim + 1)[:, :, :tokens]
    inner[..., :dim] = k
    inner[..., dim] = torch.where(valid, 0.0, -torch.inf)
    values[:-1].view(batch, heads, -1, dim)[:, :, :tokens] = v
    count = pad(valid.float(), (0, -tokens % block)).unflatten(2, (-1, block)).sum(3)
    return keys, values, count.expand(-1, heads, -1).flatten(0, 1)


class _Rows:
    """The rows (batch element, head, query block) of one call and where their keys are."""

    def __init__(self, queries, keys, values, valid, counts, indices, pooling):
        self.shape = queries.shape[:4]
        self.queries, self.keys, self.values = queries.flatten(0, 2), keys, values
        batch, heads, q_blocks, _ = self.shape
        kv_heads, self.kv_blocks = valid.shape[0] // batch, valid.shape[1]
        # the key head of each row, and its listed blocks among all blocks
        head = torch.arange(batch)[:, None] * kv_heads + torch.arange(heads) * kv_heads // heads
        self.head = head[..., None].expand(batch, heads, q_blocks).flatten()
        listed = torch.arange(indices.shape[3]) < counts[..., None]
        blocks = indices + head[..., None, None] * self.kv_blocks
        self.blocks = torch.where(listed, blocks, len(keys) - 1).flatten(0, 2)
        self.counts, self.pooling = counts.flatten(), pooling.flatten()
        q_norm = self.queries[..., :-1].square().sum(2).view(batch * heads, -1).amax(1)
        k_norm = keys[:-1, :, :-1].square().sum(2).view(batch * kv_heads, -1).amax(1)
        free = (q_norm * k_norm[head.flatten()]).sqrt() < FREE_LOGIT
        self.free = free[:, None].expand(-1, q_blocks).flatten()
        if pooling.any():
            self._pool(valid)
            kept = dense_rows(counts, indices, self.kv_blocks).flatten(0, 2)
            bias = valid.log2()[self.head]
            self.mean_bias = bias.masked_fill_(kept, -torch.inf)

    def _pool(self, valid: Tensor) -> None:
        weight = 1 / valid.clamp(min=1)[..., None]
        self.mean_keys, self.mean_values = (
            x[:-1].sum(1).view(*valid.shape, -1) * weight for x in (self.keys, self.values)
        )

    def steps(self, active: Tensor):
        """Rows to compute together, how many blocks wide, and whether free and pooling."""
        rows = active.flatten().nonzero()[:, 0]
        rank = (self.free * 2 + self.pooling)[rows] * (self.kv_blocks + 1) + self.counts[rows]
        rank, by_rank = rank.sort(descending=True)
        rows, ranks, start = rows[by_rank], rank.tolist(), 0
        while start < len(ranks):
            kind, width = divmod(ranks[start], self.kv_blocks + 1)
            free, pooling = kind >= 2, kind % 2 == 1
            columns = width * self.keys.shape[1] + self.kv_blocks * pooling
            stop = start + max(1, CHUNK_LOGITS // (columns * self.shape[3]))
            # a list may have a sixteenth of padding
            least = ranks[start] - width // 16
            while stop > len(ranks) or ranks[stop - 1] < least:
                stop -= 1
            yield rows[start:stop], width, free, pooling
            start = stop

    def attend(self, active: Tensor) -> tuple[Tensor, Tensor]:
        """The result ``[batch, heads, q_blocks, block, dim]`` and the LSE of the active rows."""
        dim = self.values.shape[2]
        out = torch.zeros(len(self.queries), self.shape[3], dim)
        lse = torch.full(out.shape[:2], -torch.inf)
        for rows, width, free, pooling in self.steps(active):
            out[rows], lse[rows] = self.step(rows, width, free, pooling)
        return out.view(*self.shape, dim), lse.view(self.shape)

    def step(self, rows: Tensor, width: int, free: bool, pooling: bool) -> tuple[Tensor, Tensor]:
        queries = self.queries[rows]
        blocks = self.blocks[rows, :width].flatten()
        keys, values = (
            x.index_select(0, blocks).view(len(rows), width * x.shape[1], x.shape[2])
            for x in (self.keys, self.values)
        )
        if pooling:
            means = self.mean_keys[self.head[rows]]
            means[..., -1] = self.mean_bias[rows]
            keys = torch.cat([keys, means], 1)
            values = torch.cat([values, self.mean_values[self.head[rows]]], 1)
        logits = queries @ keys.mT
        if free:
            weights = logits.exp2_()
        else:
            # the pivot of a row without a key only has to be finite
            pivot = logits.amax(2, keepdim=True).clamp_(min=torch.finfo(torch.float32).min)
            weights = logits.sub_(pivot).exp2_()
        total = weights.sum(2)
        lse = total.log2() if free else total.log2() + pivot[..., 0]
        return (weights @ values).div_(total.masked_fill(total == 0, 1)[..., None]), lse * log(2)
