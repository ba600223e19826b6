"""Tokens of several tensors brought into an order at once, and back."""

from collections.abc import Callable

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from accel.kernels import dispatch
from accel.kernels.dispatch import refuse_gradients

__all__ = ["permute", "reordering"]


def permute(
    order: Int[Tensor, "*heads tokens"], *tensors: Shaped[Tensor, "..."], dim: int = -2
) -> tuple[Shaped[Tensor, "..."], ...]:
    """``out[..., i, :] = x[..., order[i], :]`` for every tensor, or ``order[h, i]`` for head h.

    For orders that hold for a whole network (Jenga, arXiv 2505.16864): tokens and rotary tables
    are permuted once, at the entry of the stack of blocks, and restored at its exit.

    order: a permutation of the tokens for all, or one per head, where the axis before ``dim`` is
        the heads. It must be a permutation; values are not read.
    tensors: of any dtypes, widths and numbers of axes; the results are contiguous. A GPU moves them
        all in one launch.
    dim: the axis of the tokens, in every tensor.

    ValueError where an axis does not fit the order, NotImplementedError where a tensor asks for a
    gradient.
    """
    if not tensors:
        return ()
    for x in tensors:
        if not -x.ndim <= dim < x.ndim:
            raise ValueError(f"a tensor of {tuple(x.shape)} has no axis {dim}; say which by dim=")
        heads = x.shape[dim % x.ndim - 1] if x.ndim > 1 and dim % x.ndim else None
        if order.shape not in ((x.shape[dim],), (1, x.shape[dim]), (heads, x.shape[dim])):
            raise ValueError(
                f"an order of {tuple(order.shape)} fits no axis {dim} of a tensor of "
                f"{tuple(x.shape)}: it must be [tokens], or [heads, tokens] with the heads before"
            )
        if x.device != tensors[0].device:
            raise ValueError(f"tensors must share a device, got {tensors[0].device} and {x.device}")
    refuse_gradients(*tensors)
    orders = order.to(tensors[0].device, torch.int64).reshape(-1, order.shape[-1])
    return tuple(_permute(orders, list(tensors), dim))


def reordering(
    order: Int[Tensor, "*heads tokens"], *, dim: int = -2
) -> tuple[Callable[..., tuple[Tensor, ...]], Callable[..., tuple[Tensor, ...]]]:
    """``(apply, restore)``: `permute` by the order, and by its inverse, found once.

    ``restore(*apply(*tensors))`` are the tensors, bit for bit.
    """
    inverse = order.argsort(-1)

    def apply(*tensors: Tensor) -> tuple[Tensor, ...]:
        return permute(order, *tensors, dim=dim)

    def restore(*tensors: Tensor) -> tuple[Tensor, ...]:
        return permute(inverse, *tensors, dim=dim)

    return apply, restore


@torch.library.custom_op("accel::permute", mutates_args=())
def _permute(order: Tensor, tensors: list[Tensor], dim: int) -> list[Tensor]:
    if dispatch.runs_triton(order):
        from accel.kernels.permute_triton import forward

        with dispatch.beside(order):
            return forward(order, tensors, dim=dim)
    if len(order) == 1:
        return [x.index_select(dim, order[0]) for x in tensors]
    head = torch.arange(len(order), device=order.device)[:, None]
    return [x[(slice(None),) * (dim % x.ndim - 1) + (head, order)].contiguous() for x in tensors]


@_permute.register_fake
def _(order, tensors, dim):
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]
