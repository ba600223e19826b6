"""Block-sparse attention: one entry for every backend."""

from collections.abc import Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from accel.kernels import native
from accel.kernels.arguments import check_tensors, head_orders, pooled_heads, valid_lengths
from accel.kernels.block_mask import BlockMask
from accel.kernels.reference import sparse_attention_reference

__all__ = ["resolve_backend", "sparse_attention"]

BACKENDS = ("auto", "triton", "native", "cpu", "reference")


def resolve_backend(backend: str, device: torch.device) -> str:
    """The backend that ``auto`` stands for on a device; any other name comes back unchanged."""
    if backend != "auto":
        return backend
    if device.type == "cuda" and find_spec("triton"):
        return "triton"
    return "native" if device.type == "cpu" and native.available() else "cpu"


def sparse_attention(
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
    backend: Literal["auto", "triton", "native", "cpu", "reference"] = "auto",
):
    """``softmax(scale q kᵀ) v`` over the key blocks that ``mask`` keeps, in shape and dtype of q.

    rest: what stands in for a block that is not kept, one word or one per head. ``drop``:
        nothing. ``mean``: one key, the mean of its valid tokens, with ``ln`` of their number
        added to its logit, and the mean value; a block without a valid token stays out.
    scale: factor on the logits, ``dim ** -0.5`` unless given.
    kv_length: natural tokens from it on are padding keys, never attended.
    order: position i of the sequence that the mask speaks of is natural token ``order[i]``, or
        ``order[h, i]`` for query head h. q, k, v and the result stay in natural layout.
        It must be a permutation; values are not read.
    return_lse: also return ``ln Σ exp`` over all that is attended, fp32 ``[batch, heads, tokens]``.
    backend: ``auto`` is triton on CUDA where triton is installed; on the CPU native, compiled at
        first use, where there is a C++ compiler; else cpu, which needs nothing but torch.

    k and v may have fewer heads than q (query head h reads key head ``h * kv_heads // heads``).
    A row that attends to nothing is 0 and its LSE -inf.
    """
    check_tensors(q, k, v)
    _check_mask(mask, q, k)
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    chosen = resolve_backend(backend, q.device)
    # what the paths that are not Triton make on the way lies beside q, whatever torch's default is
    with nullcontext() if chosen == "triton" else q.device:
        if chosen == "reference":
            out, lse = sparse_attention_reference(
                q,
                k,
                v,
                mask,
                rest=rest,
                scale=scale,
                kv_length=kv_length,
                order=order,
                return_lse=True,
            )
            out, lse = out.to(q.dtype), lse.float()
        else:
            if chosen == "triton":
                from accel.kernels.attention_triton import forward
            elif chosen == "native":
                from accel.kernels.attention_native import forward
            else:
                from accel.kernels.attention_cpu import forward
            out, lse = forward(
                q,
                k,
                v,
                mask.counts,
                mask.indices,
                block=mask.block,
                pooled=pooled_heads(rest, q.shape[1]),
                scale=q.shape[3] ** -0.5 if scale is None else scale,
                lengths=valid_lengths(kv_length, k),
                order=head_orders(order, q, k),
            )
    return (out, lse) if return_lse else out


def _check_mask(mask: BlockMask, q: Tensor, k: Tensor) -> None:
    if (mask.q_length, mask.kv_length) != (q.shape[2], k.shape[2]):
        raise ValueError(
            f"the mask is for {mask.q_length} queries and {mask.kv_length} keys, but q has "
            f"{q.shape[2]} tokens and k {k.shape[2]}; build it for this layout"
        )
    if mask.heads != q.shape[1] or mask.batch not in (1, q.shape[0]):
        raise ValueError(
            f"the mask must have {q.shape[1]} heads and batch 1 or {q.shape[0]}, "
            f"got {mask.heads} heads and batch {mask.batch}"
        )
    if mask.device != q.device:
        raise ValueError(f"the mask is on {mask.device} but q on {q.device}; use mask.to(q.device)")
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"q must be float32, float16 or bfloat16, got {q.dtype}")
