"""Float64 references of the kernels: the formulas, materialised, to be read and to test against."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from accel.kernels.arguments import RESTS, check_shapes, head_orders, rest_codes, valid_lengths
from accel.kernels.block_mask import BlockMask
from accel.kernels.pooling import TAYLOR_GROUP

__all__ = ["block_mass_reference", "sparse_attention_reference"]


def sparse_attention_reference(
    q: Float[Tensor, "batch heads tokens dim"],
    k: Float[Tensor, "batch kv_heads kv_tokens dim"],
    v: Float[Tensor, "batch kv_heads kv_tokens dim"],
    mask: BlockMask,
    *,
    rest: str | Sequence[str] = "drop",
    scale: float | None = None,
    kv_length: int | Int[Tensor, " batch"] | None = None,
    order: Int[Tensor, "*heads tokens"] | None = None,
    return_lse: bool = False,
    dtype: torch.dtype = torch.float64,
):
    """``softmax([s q kᵀ + m, s q k̄ᵀ + m̄]) [v; v̄]`` with the arguments of ``sparse_attention``.

    ``m`` is 0 on the tokens of kept blocks and -inf elsewhere. ``m̄`` is -inf under ``drop``;
    under ``mean`` it is ``ln n_j`` on the blocks that are not kept, ``n_j`` their valid tokens.
    ``taylor`` is ``mean`` with ``s Σ_j exp(s q k̄_jᵀ - lse) q Ḡ_g(j)`` added to the result,
    ``Ḡ_g`` as in ``accel.kernels.pooling.block_slopes`` (not divided by the block size).
    Everything is computed in ``dtype``, and so are the results: float64 is the truth, the dtype
    of q the honest baseline whose error a kernel may at most double.
    """
    check_shapes(q, k, v)
    heads = q.shape[1]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    code = torch.tensor(rest_codes(rest, heads), device=q.device)[:, None, None]
    orders = head_orders(order, q, k)
    q, k, v = (x.to(dtype) for x in (q, *_expand(heads, k, v)))
    valid = _valid_keys(kv_length, k)
    k, v = (x.masked_fill(~valid[..., None], 0.0) for x in (k, v))  # padding may hold anything
    if orders is not None:
        q, k, v, valid = (_reorder(x, orders) for x in (q, k, v, valid))

    keep = mask.to_dense().expand(q.shape[0], -1, -1, -1)
    keep = _spread(_spread(keep, 2, mask.block[0], q.shape[2]), 3, mask.block[1], k.shape[2])
    logits = (scale * q @ k.mT).masked_fill(~(keep & valid[:, :, None]), -torch.inf)

    count, k_mean, v_mean = _block_means(k, v, valid, mask.block[1])
    use_mean = ~mask.to_dense() & (code != RESTS.index("drop"))
    use_mean = _spread(use_mean.expand(q.shape[0], -1, -1, -1), 2, mask.block[0], q.shape[2])
    pooled_logits = scale * q @ k_mean.mT + count.log()[:, :, None]
    pooled_logits = pooled_logits.masked_fill(~use_mean, -torch.inf)

    logits = torch.cat([logits, pooled_logits], dim=3)
    lse = logits.logsumexp(3)
    # a row without a key has lse = -inf and weights exp(-inf - 0) = 0
    weights = (logits - lse.nan_to_num(neginf=0.0)[..., None]).exp()
    out = weights @ torch.cat([v, v_mean], dim=2)
    slopes = _block_slopes(k, v, valid, k_mean, ~mask.to_dense().all(2), mask.block[1])
    per_token = weights[..., k.shape[2] :] / count.clamp(min=1)[:, :, None]
    turns = scale * torch.einsum("bhtj,bhtc,bhjcd->bhtd", per_token, q, slopes)
    out = torch.where(code == RESTS.index("taylor"), out + turns, out)
    if orders is not None:
        out, lse = (_reorder(x, orders.argsort(1)) for x in (out, lse))
    return (out, lse) if return_lse else out


def block_mass_reference(
    q: Float[Tensor, "batch heads tokens dim"],
    k: Float[Tensor, "batch kv_heads kv_tokens dim"],
    *,
    block: tuple[int, int],
    scale: float | None = None,
    kv_length: int | Int[Tensor, " batch"] | None = None,
    order: Int[Tensor, "*heads tokens"] | None = None,
):
    """``mass[i, j] = Σ_{t in i} Σ_{n in j} softmax(s q kᵀ)[t, n]`` over valid t and n, and the LSE.

    Padding keys are padding queries too where there are as many keys as queries.
    """
    check_shapes(q, k)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    orders = head_orders(order, q, k)
    q, k = q.double(), _expand(q.shape[1], k)[0].double()
    valid = _valid_keys(kv_length, k)
    k = k.masked_fill(~valid[..., None], 0.0)
    if orders is not None:
        q, k, valid = (_reorder(x, orders) for x in (q, k, valid))
    logits = (scale * q @ k.mT).masked_fill(~valid[:, :, None], -torch.inf)
    lse = logits.logsumexp(3)
    weights = (logits - lse.nan_to_num(neginf=0.0)[..., None]).exp()
    if q.shape[2] == k.shape[2]:
        weights = weights * valid[..., None]
    mass = _block_sums(_block_sums(weights, 2, block[0]), 3, block[1])
    return mass, lse if orders is None else _reorder(lse, orders.argsort(1))


def _expand(heads: int, *tensors: Tensor) -> list[Tensor]:
    """Every key head repeated for the query heads it serves."""
    return [x.repeat_interleave(heads // x.shape[1], dim=1) for x in tensors]


def _valid_keys(kv_length: int | Tensor | None, k: Tensor) -> Tensor:
    batch, heads, tokens, _ = k.shape
    lengths = valid_lengths(kv_length, k)
    if lengths is None:
        lengths = torch.full((batch,), tokens, device=k.device)
    valid = torch.arange(tokens, device=k.device) < lengths[:, None]
    return valid[:, None].expand(batch, heads, tokens)


def _reorder(x: Tensor, orders: Tensor) -> Tensor:
    """Position i of head h becomes token ``orders[h, i]``; x is ``[batch, heads, tokens, ...]``."""
    index = orders.reshape(1, *orders.shape, *(1,) * (x.ndim - 3))
    return x.gather(2, index.expand(x.shape))


def _spread(keep: Tensor, dim: int, block: int, length: int) -> Tensor:
    """Blocks to tokens along one axis, the ragged last block cut."""
    return keep.repeat_interleave(block, dim=dim).narrow(dim, 0, length)


def _block_sums(x: Tensor, dim: int, block: int) -> Tensor:
    return torch.stack([part.sum(dim) for part in x.split(block, dim)], dim)


def _block_means(k: Tensor, v: Tensor, valid: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    count = _block_sums(valid.to(k.dtype), 2, block)
    k_mean, v_mean = (
        _block_sums(x * valid[..., None], 2, block) / count.clamp(min=1)[..., None] for x in (k, v)
    )
    return count, k_mean, v_mean


def _block_slopes(k, v, valid, k_mean, left_out, block: int) -> Tensor:
    """``Ḡ_g(j)`` for every block j; ``left_out`` is ``[mask_batch, heads, blocks]``."""
    slopes = []
    for j, (keys, values, real) in enumerate(
        zip(*(x.split(block, 2) for x in (k, v, valid)), strict=True)
    ):
        centred = (keys - k_mean[:, :, j, None]) * real[..., None]
        slopes.append(centred.mT @ values)
    taken = left_out & torch.stack([real.any(2) for real in valid.split(block, 2)], 2)
    slopes = torch.stack(slopes, 2) * taken[..., None, None]
    means = [
        (part.sum(2) / some.sum(2).clamp(min=1)[..., None, None])[:, :, None].expand_as(part)
        for part, some in zip(
            slopes.split(TAYLOR_GROUP, 2), taken.split(TAYLOR_GROUP, 2), strict=True
        )
    ]
    return torch.cat(means, 2)
