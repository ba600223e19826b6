"""Block-sparse attention: one entry for every backend."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from accel.kernels import native
from accel.kernels.arguments import (
    PRECISIONS,
    RESTS,
    check_tensors,
    head_orders,
    rest_codes,
    valid_lengths,
)
from accel.kernels.attention_cpu import has_bf16
from accel.kernels.block_mask import BlockMask
from accel.kernels.dispatch import refuse_gradients
from accel.kernels.reference import sparse_attention_reference

__all__ = ["resolve_backend", "resolve_precision", "sparse_attention"]

BACKENDS = ("auto", "triton", "native", "cpu", "reference")


def resolve_backend(backend: str, device: torch.device) -> str:
    """The backend that ``auto`` stands for on a device; any other name comes back unchanged."""
    if backend != "auto":
        return backend
    if device.type == "cuda" and find_spec("triton"):
        return "triton"
    return "native" if device.type == "cpu" and native.available() else "cpu"


def resolve_precision(
    precision: str, backend: str, dtype: torch.dtype, device: torch.device
) -> str:
    """What a backend, as ``resolve_backend`` names it, computes in where ``precision`` is allowed.

    ``full`` is the dtype's own arithmetic, as far as the backend has it: half-precision tensors are
    computed in 16 bits or more.
    """
    if precision == "full" or backend == "reference":
        return "full"
    if backend == "triton":
        from accel.kernels.attention_triton import architecture, arithmetic

        found = arithmetic(precision, architecture(device))
        return "half" if found == "full" and dtype == torch.float32 else found
    if dtype != torch.float32:
        return "full"
    if backend == "native":
        return "half" if native.has_integers() else "full"
    return "half" if has_bf16(device) else "full"


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
    precision: str = "full",
    return_lse: bool = False,
    backend: Literal["auto", "triton", "native", "cpu", "reference"] = "auto",
):
    """``softmax(scale q kᵀ) v`` over the key blocks that ``mask`` keeps, in shape and dtype of q.

    rest: what stands in for a block that is not kept, one word or one per head. ``drop``:
        nothing. ``mean``: one key, the mean of its valid tokens, with ``ln`` of their number
        added to its logit, and the mean value; a block without a valid token stays out.
        ``taylor``: that, and to first order what the keys' spread around their mean does to the
        value: ``s q Ḡ`` with one slope for every 32 blocks (``block_slopes`` in ``pooling.py``).
        Weights and LSE are those of ``mean``.
    scale: factor on the logits, ``dim ** -0.5`` unless given.
    kv_length: natural tokens from it on are padding keys, never attended.
    order: position i of the sequence that the mask speaks of is natural token ``order[i]``, or
        ``order[h, i]`` for query head h. q, k, v and the result stay in natural layout.
        It must be a permutation; values are not read.
    precision: what arithmetic is allowed; a backend takes the fastest it has that is at least as
        exact. ``full``: operands in the dtype of q. ``half``: 16-bit operands. ``int8``: the logits
        from 8-bit integers, the keys' mean taken out first, the rest in 16 bits. ``fp8``: that, and
        weights and values in 8-bit floats where the device has them. ``resolve_precision`` tells
        what is taken: only triton goes below 16 bits.
    return_lse: also return ``ln Σ exp`` over all that is attended, fp32 ``[batch, heads, tokens]``.
    backend: ``auto`` is triton on CUDA where triton is installed; on the CPU native, compiled at
        first use, where there is a C++ compiler; else cpu, which needs nothing but torch.

    k and v may have fewer heads than q (query head h reads key head ``h * kv_heads // heads``).
    A row that attends to nothing is 0 and its LSE -inf. There are no gradients: where q, k or v ask
    for one it is a NotImplementedError. Compiles and exports as one opaque operation,
    ``accel::sparse_attention``.
    """
    check_tensors(q, k, v)
    _check_mask(mask, q, k)
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    refuse_gradients(q, k, v)
    out, lse = _attend(
        q,
        k,
        v,
        mask.counts,
        mask.indices,
        mask.longest_first,
        list(mask.block),
        list(rest_codes(rest, q.shape[1])),
        q.shape[3] ** -0.5 if scale is None else scale,
        valid_lengths(kv_length, k),
        head_orders(order, q, k),
        precision,
        backend,
    )
    return (out, lse) if return_lse else out


@torch.library.custom_op("accel::sparse_attention", mutates_args=())
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    indices: Tensor,
    longest_first: Tensor,
    block: list[int],
    rests: list[int],
    scale: float,
    lengths: Tensor | None,
    order: Tensor | None,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    chosen = resolve_backend(backend, q.device)
    options: dict[str, Any] = {"block": tuple(block), "rests": tuple(rests), "scale": scale}
    options |= {"lengths": lengths, "order": order, "precision": precision}
    if chosen == "triton":
        from accel.kernels import attention_triton

        with torch.cuda.device_of(q):  # where kernels are launched
            return attention_triton.forward(
                q, k, v, counts, indices, longest_first=longest_first, **options
            )
    # what the paths that are not Triton make on the way lies beside q, whatever torch's default is
    with q.device:
        if chosen == "reference":
            return _reference(q, k, v, counts, indices, **options)
        if chosen == "native":
            from accel.kernels.attention_native import forward
        else:
            from accel.kernels.attention_cpu import forward
        return forward(q, k, v, counts, indices, **options)


@_attend.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


def _reference(
    q, k, v, counts, indices, *, block, rests, scale, lengths, order, precision
) -> tuple[Tensor, Tensor]:
    del precision  # float64 is as exact as any
    mask = BlockMask(
        counts=counts, indices=indices, block=block, q_length=q.shape[2], kv_length=k.shape[2]
    )
    out, lse = sparse_attention_reference(
        q,
        k,
        v,
        mask,
        rest=[RESTS[code] for code in rests],
        scale=scale,
        kv_length=lengths,
        order=order,
        return_lse=True,
    )
    return out.to(q.dtype), lse.float()


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
