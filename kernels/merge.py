"""Attention over a union of key sets, from the attention over each of them."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from accel.kernels import dispatch
from accel.kernels.dispatch import refuse_gradients

__all__ = ["merge"]


def merge(
    parts: Sequence[
        tuple[Float[Tensor, "batch heads tokens dim"], Float[Tensor, "batch heads tokens"]]
    ],
) -> tuple[Float[Tensor, "batch heads tokens dim"], Float[Tensor, "batch heads tokens"]]:
    """``lse = ln Σ exp(lse_i)``, ``out = Σ exp(lse_i - lse) out_i`` over parts ``(out_i, lse_i)``.

    Exact where the parts' keys are disjoint: softmax is a weighted mean, and each part knows its
    weight (Online normalizer calculation for softmax, arXiv 1805.02867; ring attention,
    arXiv 2310.01889). A part is what ``sparse_attention(..., return_lse=True)`` returns, so that
    local and global, text and visual, cached and new keys may each have their own plan.

    Any number of parts, one included; they share shape, dtype and device, and may be strided. fp32
    inside; out in the dtype of the parts, lse fp32. A row that is empty (LSE -inf) in a part takes
    nothing from it, whatever its out holds there; empty in all of them it is 0 and its LSE -inf.
    ValueError where parts do not fit together, NotImplementedError where one asks for a gradient.
    """
    if not parts:
        raise ValueError("merge needs at least one part (out, lse), got none")
    first = parts[0][0]
    for i, (out, lse) in enumerate(parts):
        if out.ndim != 4 or out.shape != first.shape or lse.shape != first.shape[:3]:
            raise ValueError(
                f"every out must be {tuple(first.shape)} and its lse {tuple(first.shape[:3])}, "
                f"got {tuple(out.shape)} and {tuple(lse.shape)} as part {i}"
            )
        if out.dtype != first.dtype or {out.device, lse.device} != {first.device}:
            raise ValueError(
                f"parts must share dtype and device, got {first.dtype} on {first.device} first and "
                f"{out.dtype} on {out.device} with an lse on {lse.device} as part {i}"
            )
        refuse_gradients(out, lse)
    return _merge([out for out, _ in parts], [lse for _, lse in parts])


@torch.library.custom_op("accel::merge", mutates_args=())
def _merge(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    if dispatch.runs_triton(outs[0]):
        from accel.kernels.merge_triton import forward

        with dispatch.beside(outs[0]):
            return forward(outs, lses)
    lse = torch.stack(lses).float().logsumexp(0)
    # an empty row has weights exp(-inf - 0) = 0
    pivot = lse.nan_to_num(neginf=0.0)
    out = torch.zeros(outs[0].shape, dtype=torch.float32, device=lse.device)
    for x, own in zip(outs, lses, strict=True):
        x = x.float().masked_fill(own.isneginf()[..., None], 0.0)
        out.addcmul_(x, (own.float() - pivot).exp()[..., None])
    return out.to(outs[0].dtype), lse


@_merge.register_fake
def _(outs, lses):
    out = torch.empty_like(outs[0], memory_format=torch.contiguous_format)
    return out, out.new_empty(out.shape[:3], dtype=torch.float32)
