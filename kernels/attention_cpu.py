"""Block-sparse attention on the CPU: gathered key blocks and batched matrix products."""

from math import ceil

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor
from torch.nn.functional import pad

from accel.kernels.pooling import pool_blocks

__all__ = ["forward"]


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
    kv_tokens = k.shape[2]
    out_dtype = q.dtype
    q_block, kv_block = block
    k_mean, v_mean, log_count = pool_blocks(
        k.float(), v.float(), block=kv_block, lengths=lengths, order=order
    )
    q, k, v = q.float(), _expand(k.float(), heads), _expand(v.float(), heads)
    k_mean, v_mean, log_count = (_expand(x, heads) for x in (k_mean, v_mean, log_count))
    valid = torch.ones(batch, heads, kv_tokens, dtype=torch.bool)
    if lengths is not None:
        valid = (torch.arange(kv_tokens) < lengths[:, None])[:, None].expand(-1, heads, -1)
        k, v = (torch.where(valid[..., None], x, 0.0) for x in (k, v))
    if order is not None:
        index = order.expand(heads, -1)[None].expand(batch, -1, -1)
        q, k, v = (x.gather(2, index[..., None].expand(x.shape)) for x in (q, k, v))
        valid = valid.gather(2, index)

    q_blocks, kv_blocks = counts.shape[2], ceil(kv_tokens / kv_block)
    tail = (q_blocks * q_block - tokens, kv_blocks * kv_block - kv_tokens)
    q = pad(q, (0, 0, 0, tail[0])).view(batch, heads, q_blocks, q_block, dim)
    k, v = (pad(x, (0, 0, 0, tail[1])).view(batch, heads, kv_blocks, kv_block, dim) for x in (k, v))
    bias = torch.where(pad(valid, (0, tail[1])), 0.0, -torch.inf).view(batch, heads, kv_blocks, -1)
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:4], -torch.inf)
    for b in range(batch):
        for h in range(heads):
            for i in range(q_blocks):
                row = indices[b % counts.shape[0], h, i, : counts[b % counts.shape[0], h, i]]
                row = row.long()
                logits = scale * q[b, h, i] @ k[b, h, row].flatten(0, 1).mT
                logits = logits + bias[b, h, row].flatten()
                values = v[b, h, row].flatten(0, 1)
                if pooled[h]:
                    extra = log_count[b, h].index_fill(0, row, -torch.inf)
                    extra = scale * q[b, h, i] @ k_mean[b, h].mT + extra
                    logits = torch.cat([logits, extra], 1)
                    values = torch.cat([values, v_mean[b, h]])
                lse[b, h, i] = logits.logsumexp(1)
                weights = (logits - lse[b, h, i].nan_to_num(neginf=0.0)[:, None]).exp()
                out[b, h, i] = weights @ values
    out = out.flatten(2, 3)[:, :, :tokens]
    lse = lse.flatten(2, 3)[:, :, :tokens]
    if order is not None:
        out = torch.empty_like(out).scatter_(2, index[..., None].expand(out.shape), out)
        lse = torch.empty_like(lse).scatter_(2, index, lse)
    return out.to(out_dtype), lse


def _expand(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], dim=1)
