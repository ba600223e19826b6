"""Positions of their own for models that count them: LLaDA-8B's remote code has no position_ids.

Its blocks call a module `rotary_emb(q, k)`, which turns token i of the call by position i. While
`placed` holds, such a module gets its tokens at their positions in a longer call, zeros between
them, and gives back those.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from inspect import signature
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

__all__ = ["can_place", "placed"]


def can_place(model: nn.Module) -> bool:
    """Whether the model turns queries and keys by modules that count positions themselves."""
    return bool(_counting(model))


def _counting(model: nn.Module) -> list[nn.Module]:
    return [
        module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in ("rotary_emb", "rotary")
        and list(signature(type(module).forward).parameters)[1:3] == ["q", "k"]
    ]


@contextmanager
def placed(model: nn.Module, positions: Int[Tensor, "batch fed"] | None) -> Iterator[None]:
    """For the calls inside the block tokens have these positions; None: those of the model."""
    if positions is None:
        yield
        return
    modules = _counting(model)
    # offloading also puts a forward on the module itself
    before = [module.__dict__.get("forward") for module in modules]
    try:
        for module in modules:
            module.forward = partial(_at, module.forward, positions)
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            module.__dict__.pop("forward", None)
            if own is not None:
                module.forward = own


def _at(own: Any, positions: Tensor, q: Tensor, k: Tensor, *more: Any, **kwargs: Any) -> Any:
    length = int(positions.max()) + 1

    def index(x: Tensor) -> Tensor:
        return positions[:, None, :, None].expand(x.shape)

    longer = [
        torch.zeros(*x.shape[:2], length, x.shape[3], dtype=x.dtype, device=x.device).scatter(
            2, index(x), x
        )
        for x in (q, k)
    ]
    turned = own(*longer, *more, **kwargs)
    return tuple(x.gather(2, index(of)) for x, of in zip(turned, (q, k), strict=True))
