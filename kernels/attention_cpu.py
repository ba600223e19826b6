"""Block-sparse attention on the CPU: gathered key blocks and batched matrix products.

In fp32; bf16 tensors, and others where the caller allows ``half`` or less, have their products in
bf16 on processors with instructions for it, logits rounded to bf16 among them, and all else in
fp32. (fp16 is computed by elements on a CPU, and never used; bf16 would be too coarse for it.) It
needs nothing of a device but torch, and serves others than CPUs where there is no Triton.

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
from torch.linalg import vector_norm
from torch.nn.functional import pad

from accel.kernels.arguments import RESTS
from accel.kernels.block_mask import dense_rows
from accel.kernels.pooling import TAYLOR_GROUP, block_slopes, in_order, valid_positions

__all__ = ["forward"]

DROP, TAYLOR = RESTS.index("drop"), RESTS.index("taylor")

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
    rests: tuple[int, ...],
    scale: float,
    lengths: Int[Tensor, " batch"] | None,
    order: Int[Tensor, "orders tokens"] | None,
    precision: str,
):
    """``sparse_attention`` with arguments already checked; returns the result and the LSE."""
    half = q.dtype == torch.bfloat16 or precision != "full"
    products = torch.bfloat16 if half and has_bf16(q.device) else torch.float32
    batch, _, tokens, dim = q.shape
    counts, indices = counts.expand(batch, -1, -1), indices.expand(batch, -1, -1, -1)
    code = torch.tensor(rests)[:, None].expand_as(counts)
    dense = (counts == -(-k.shape[2] // block[1])).all(2) & (q.device.type == "cpu")
    sparse = ((counts > 0) | (code != DROP)) & ~dense[..., None]
    # by position in the order, ragged query blocks filled up
    out = torch.zeros(*counts.shape, block[0], dim)
    lse = torch.full(out.shape[:4], -torch.inf)
    if sparse.any():
        queries = _query_blocks(in_order(q, order), block[0], scale / log(2))
        sources = _key_blocks(k, v, block[1], lengths, order)
        slopes = None
        if TAYLOR in rests:
            left_out = ~dense_rows(counts, indices, -(-k.shape[2] // block[1])).all(2)
            slopes = block_slopes(
                k.float(), v.float(), left_out, block=block[1], lengths=lengths, order=order
            ).flatten(0, 1)
        rows = _Rows(queries, *sources, counts, indices, code, sparse, slopes, products)
        for target, part in zip((out, lse), rows.attend(), strict=True):
            target.flatten(0, 2).index_copy_(0, rows.rows, part)
    out, lse = out.flatten(2, 3)[:, :, :tokens], lse.flatten(2, 3)[:, :, :tokens]
    if order is not None:
        natural = torch.arange(tokens).expand_as(order)
        inverse = torch.empty_like(order).scatter_(1, order, natural)
        out = in_order(out, inverse)
        lse = in_order(lse[..., None], inverse)[..., 0]
    if dense.any():
        _dense_heads(q, k, v, dense, scale, lengths, out, lse)
    return out.to(q.dtype).contiguous(), lse.contiguous()


def has_bf16(device: torch.device) -> bool:
    """Whether this is a processor that multiplies bf16 by instructions of its own."""
    # older torch cannot tell
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return False
    told = torch.cpu.get_capabilities()
    return bool(told.get("avx512_bf16") or told.get("amx_bf16"))


def _dense_heads(q, k, v, dense, scale, lengths, out, lse) -> None:
    """Heads that keep every block: torch's own attention on a CPU, whatever the order."""
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
    """``[batch, heads, q_blocks, dim + 1, block]``: scaled queries as columns, then a row of 1."""
    q = pad(q.float(), (0, 0, 0, -q.shape[2] % block)).unflatten(2, (-1, block))
    x = torch.empty(*q.shape[:3], q.shape[4] + 1, block)
    torch.mul(q.mT, scale, out=x[..., :-1, :])
    x[..., -1, :] = 1
    return x


def _key_blocks(
    k: Tensor, v: Tensor, block: int, lengths: Tensor | None, order: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
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
    """The rows (batch element, head, query block) of one call, sorted into steps of like rows.

    slopes: ``[batch * heads, groups, dim, dim]`` of ``block_slopes``, where a head is ``taylor``.
    products: the dtype of matrix products.
    """

    def __init__(
        self, queries, keys, values, valid, counts, indices, code, active, slopes, products
    ):
        batch, heads, _, width, self.q_block = queries.shape
        self.keys, self.values = keys.to(products), values.to(products)
        self.kv_blocks = valid.shape[1]
        self.slopes = slopes
        kv_heads = valid.shape[0] // batch
        # the key head of every head
        head = torch.arange(batch)[:, None] * kv_heads + torch.arange(heads) * kv_heads // heads
        q_norm = queries[..., :-1, :].square().sum(3).amax((2, 3)).sqrt()
        k_norm = vector_norm(keys[:-1, :, :-1], dim=2).view(batch * kv_heads, -1).amax(1)
        free = (q_norm * k_norm[head] < FREE_LOGIT)[..., None].expand_as(counts)

        self.rows = active.flatten().nonzero()[:, 0]
        rank = (free * len(RESTS) + code) * (self.kv_blocks + 1) + counts
        rank, by_rank = rank.flatten()[self.rows].sort(descending=True)
        self.rows = self.rows[by_rank]
        self.steps = self._steps(rank.tolist())
        self.queries = queries.view(-1, width, self.q_block).index_select(0, self.rows)
        listed = torch.arange(indices.shape[3]) < counts[..., None]
        blocks = torch.where(
            listed, indices + head[..., None, None] * self.kv_blocks, len(keys) - 1
        )
        self.blocks = blocks.flatten(0, 2).index_select(0, self.rows)
        if (code != DROP).any():
            self.head = head[..., None].expand_as(counts).flatten()[self.rows]
            self.means = [
                x[:-1].sum(1).view(*valid.shape, -1) / valid.clamp(min=1)[..., None]
                for x in (keys, values)
            ]
            kept = dense_rows(counts, indices, self.kv_blocks).flatten(0, 2)[self.rows]
            self.mean_bias = valid.log2()[self.head].masked_fill_(kept, -torch.inf)
            self.per_token = keys.shape[1] / valid.clamp(min=1)
            self.turning = self.rows // counts.shape[2]

    def _steps(self, ranks: list[int]) -> list[tuple[int, int, int, bool, int]]:
        """(first row, last row + 1, list width, needs no pivot, rest) of every step."""
        steps, start = [], 0
        while start < len(ranks):
            kind, width = divmod(ranks[start], self.kv_blocks + 1)
            free, code = kind >= len(RESTS), kind % len(RESTS)
            columns = width * self.keys.shape[1] + (code != DROP) * self.kv_blocks
            stop = start + max(1, CHUNK_LOGITS // (self.q_block * columns))
            # a list may have a sixteenth of padding
            least = ranks[start] - width // 16
            while stop > len(ranks) or ranks[stop - 1] < least:
                stop -= 1
            steps.append((start, stop, width, free, code))
            start = stop
        return steps

    def attend(self) -> tuple[Tensor, Tensor]:
        """``Σ p v / Σ p`` ``[rows, q_block, dim]`` and the LSE of the sorted rows."""
        out = torch.empty(len(self.rows), self.q_block, self.values.shape[2])
        total, pivot = torch.empty(out.shape[:2]), torch.zeros(out.shape[:2])
        # one allocation for all steps: fresh pages cost as much as a pass over the logits
        blocks = max((stop - start) * width for start, stop, width, *_ in self.steps)
        extra = max(
            (stop - start) * (code != DROP) * self.kv_blocks for start, stop, *_, code in self.steps
        )
        keys, values = (x.new_empty(blocks, *x.shape[1:]) for x in (self.keys, self.values))
        logits = torch.empty(self.q_block * (blocks * self.keys.shape[1] + extra))
        for step in self.steps:
            self._step(step, keys, values, logits, out, total, pivot)
        lse = (total.log2() + pivot).mul_(log(2))
        return out.div_(total.masked_fill_(total == 0, 1)[..., None]), lse

    def _step(self, step, keys, values, logits, out, total, pivot) -> None:
        start, stop, width, free, code = step
        pooling = code != DROP
        queries, out, total = self.queries[start:stop], out[start:stop], total[start:stop]
        blocks = self.blocks[start:stop, :width].flatten()
        tokens = width * self.keys.shape[1]
        keys, values = (
            torch.index_select(source, 0, blocks, out=x[: len(blocks)])
            .view(-1, x.shape[2])
            .unflatten(0, (len(queries), tokens))
            for source, x in ((self.keys, keys), (self.values, values))
        )
        columns = tokens + pooling * self.kv_blocks
        # keys by queries: sums over keys then run along whole vectors of queries
        logits = logits[: len(queries) * columns * self.q_block].view(-1, columns, self.q_block)
        _bmm(keys, queries, logits[:, :tokens])
        if pooling:
            mean_keys, mean_values = (x.index_select(0, self.head[start:stop]) for x in self.means)
            mean_keys[..., -1] = self.mean_bias[start:stop]
            torch.bmm(mean_keys, queries, out=logits[:, tokens:])
        if not free:
            # the pivot of a row without a key only has to be finite
            highest = logits.amax(1).clamp_(min=torch.finfo(torch.float32).min)
            pivot[start:stop] = highest
            logits.sub_(highest[:, None])
        weights = logits.exp2_()
        torch.sum(weights, 1, out=total)
        _bmm(weights[:, :tokens].mT, values, out)
        if pooling:
            out.baddbmm_(weights[:, tokens:].mT, mean_values)
        if code == TAYLOR:
            self._turn(start, stop, weights[:, tokens:], queries, out)

    def _turn(self, start: int, stop: int, weights: Tensor, queries: Tensor, out: Tensor) -> None:
        """``out += Σ_g r_g (s q) Ḡ_g``, ``r_g = Σ_{j in g} weight_j / n_j``."""
        weights = weights * self.per_token[self.head[start:stop], :, None]
        # queries carry log2 e for exp2, which the slopes know nothing of
        scaled = queries[:, :-1] * log(2)
        slopes = self.slopes[self.turning[start:stop]]
        for g, part in enumerate(weights.split(TAYLOR_GROUP, 1)):
            out.baddbmm_((scaled * part.sum(1, keepdim=True)).mT, slopes[:, g])


def _bmm(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``out = a b`` in the lower dtype of the two; fp32 if they are."""
    if a.dtype == b.dtype:
        torch.bmm(a, b, out=out)
    else:
        out.copy_(torch.bmm(a.bfloat16(), b.bfloat16()))
