"""How much softmax mass every block of the attention matrix holds, without the matrix."""

from math import ceil, log

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from accel.kernels import dispatch, native
from accel.kernels.arguments import check_block, check_tensors, head_orders, valid_lengths
from accel.kernels.dispatch import refuse_gradients

__all__ = ["block_mass"]

# logits held at a time: a few megabytes, so that exp2 and the sums find them in a cache
CHUNK_LOGITS = 1 << 19


def block_mass(
    q: Float[Tensor, "batch heads tokens dim"],
    k: Float[Tensor, "batch kv_heads kv_tokens dim"],
    *,
    block: tuple[int, int],
    scale: float | None = None,
    lse: Float[Tensor, "batch heads tokens"] | None = None,
    kv_length: int | Int[Tensor, " batch"] | None = None,
    order: Int[Tensor, "*heads tokens"] | None = None,
) -> tuple[
    Float[Tensor, "batch heads q_blocks kv_blocks"],
    Float[Tensor, "batch heads tokens"],
]:
    """``mass[i, j] = Σ_{t in i} Σ_{n in j} p_tn``, ``p = softmax(scale q kᵀ)``, and the LSE of p.

    What true-mass estimators rank blocks by (SparseD, arXiv 2509.24014; AdaSpa, arXiv 2502.21079).
    fp32, exact, streamed over query rows. A row of ``mass`` sums to the valid queries of its
    block, or to 0 where no key is valid.

    block: (q_block, kv_block), any sizes from 1 token.
    scale: factor on the logits, ``dim ** -0.5`` unless given.
    lse: that of these very logits, in natural layout; saves one of two passes. An old one, of a
        step before, gives masses that sum to nearly as much.
    kv_length: keys from it on are padding; with as many keys as queries so are these queries.
    order: blocks tile the sequence in this order (see ``sparse_attention``).

    The LSE is in natural layout, -inf without a valid key. ValueError where shapes do not fit,
    NotImplementedError where q or k asks for a gradient.
    """
    check_tensors(q, k)
    refuse_gradients(q, k)
    check_block(block)
    if lse is not None and lse.shape != q.shape[:3]:
        raise ValueError(f"lse must be {tuple(q.shape[:3])}, got {tuple(lse.shape)}")
    mass, found = _block_mass(
        q,
        k,
        list(block),
        q.shape[3] ** -0.5 if scale is None else scale,
        lse,
        valid_lengths(kv_length, k),
        head_orders(order, q, k),
    )
    return mass, found if lse is None else lse.float()


@torch.library.custom_op("accel::block_mass", mutates_args=())
def _block_mass(
    q: Tensor,
    k: Tensor,
    block: list[int],
    scale: float,
    lse: Tensor | None,
    lengths: Tensor | None,
    order: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The mass, and the LSE where it is not given (else an empty tensor)."""
    if dispatch.runs_triton(q):
        from accel.kernels.block_mass_triton import forward
    elif q.device.type == "cpu" and native.available():
        from accel.kernels.attention_native import block_mass as forward
    else:
        forward = _forward
    with dispatch.beside(q):
        mass, found = forward(
            q,
            k,
            block=(block[0], block[1]),
            scale=scale,
            lse=lse,
            lengths=lengths,
            order=order,
        )
        return mass, found if lse is None else torch.empty(0)


@_block_mass.register_fake
def _(q, k, block, scale, lse, lengths, order):
    blocks = (-(-q.shape[2] // block[0]), -(-k.shape[2] // block[1]))
    mass = q.new_empty(*q.shape[:2], *blocks, dtype=torch.float32)
    return mass, q.new_empty(q.shape[:3] if lse is None else (0,), dtype=torch.float32)


def _forward(q, k, *, block, scale, lse, lengths, order) -> tuple[Tensor, Tensor]:
    """On torch: rows of one head at a time, few enough that their logits stay in a cache."""
    (batch, heads, tokens, _), (_, kv_heads, kv_tokens, _) = q.shape, k.shape
    q_blocks, kv_blocks = ceil(tokens / block[0]), ceil(kv_tokens / block[1])
    valid = torch.ones(batch, kv_tokens, dtype=torch.bool)
    if lengths is not None:
        valid = torch.arange(kv_tokens) < lengths[:, None]

    chunk = block[0] * max(1, CHUNK_LOGITS // (block[0] * kv_blocks * block[1]))
    mass = torch.zeros(batch, heads, q_blocks, kv_blocks)
    lse_out = torch.empty(batch, heads, tokens)
    for b in range(batch):
        for h in range(heads):
            ids = None if order is None else order[h % order.shape[0]]
            q_h, k_h, valid_h = q[b, h], k[b, h * kv_heads // heads], valid[b]
            lse_h = None if lse is None else lse[b, h]
            if ids is not None:
                q_h, k_h, valid_h = q_h[ids], k_h[ids], valid_h[ids]
                lse_h = None if lse_h is None else lse_h[ids]
            k_h = _with_bias(k_h, valid_h, kv_blocks * block[1])
            parts = [
                _rows_mass(
                    q_h[start : start + chunk].float() * (scale / log(2)),
                    k_h,
                    block[1],
                    None if lse_h is None else lse_h[start : start + chunk].float() / log(2),
                )
                for start in range(0, tokens, chunk)
            ]
            rows = torch.cat([part[0] for part in parts])
            row_lse = torch.cat([part[1] for part in parts])
            if tokens == kv_tokens:
                rows = torch.where(valid_h[:, None], rows, 0.0)
            rows = pad(rows, (0, 0, 0, q_blocks * block[0] - tokens))
            mass[b, h] = rows.view(q_blocks, block[0], kv_blocks).sum(1)
            lse_out[b, h, slice(None) if ids is None else ids] = row_lse
    return mass, lse_out


def _with_bias(k: Tensor, valid: Tensor, length: int) -> Tensor:
    """``[k, bias, 1]`` in ``length`` rows: times ``[q, 1, x]`` it gives ``q kᵀ + bias + x``."""
    k = torch.where(valid[:, None], k, 0.0).float()
    bias = torch.where(valid, 0.0, -torch.inf)[:, None]
    k = pad(torch.cat([k, bias, torch.ones_like(bias)], 1), (0, 0, 0, length - k.shape[0]))
    k[valid.shape[0] :, -2] = -torch.inf
    return k


def _rows_mass(q: Tensor, k: Tensor, kv_block: int, lse2: Tensor | None) -> tuple[Tensor, Tensor]:
    """``Σ_{n in j} p_tn`` as ``[rows, kv_blocks]`` and the LSE; q and ``lse2`` are in base 2."""
    if lse2 is None:
        one = torch.ones_like(q[:, :1])
        logits = torch.cat([q, one, torch.zeros_like(one)], 1) @ k.mT
        # the pivot of a row without a valid key only has to be finite
        pivot = logits.amax(1, keepdim=True).clamp_(min=torch.finfo(torch.float32).min)
        sums = logits.sub_(pivot).exp2_().view(q.shape[0], -1, kv_block).sum(2)
        total = sums.sum(1, keepdim=True)
        # a total is at least 1, or 0 for lack of keys
        return sums / total.clamp(min=1), (pivot + total.log2())[:, 0] * log(2)
    pivot = lse2.nan_to_num(neginf=0.0)[:, None]
    logits = torch.cat([q, torch.ones_like(pivot), -pivot], 1) @ k.mT
    return logits.exp2_().view(q.shape[0], -1, kv_block).sum(2), lse2 * log(2)
