"""A model that has no adapter: what can be guessed of it, for the self-check to decide.

Sites are the attention modules of block lists (`blocks.3.attn`, `layers.3.attention`, ...) that
have a processor and heads, and are not named or built for cross-attention. There is no call to
try them with, so the first call of a run is the check: it runs dense, and every site has to be met
once, with as many keys as queries. The layout is guessed where tokens are a grid of patches alone;
text beside them may stand on either side, so it is not guessed: the user says it by `layout=`.
"""

import re
from inspect import signature
from typing import Any

from torch import Tensor, nn

from accel.layout import Layout
from accel.pipelines.adapters import Adapter, heads_of

_BLOCK = re.compile(
    r"(?:\w+\.)*\w*(?:blocks|layers)\.\d+\.(?:\w+\.)*(?:attn1?|attention|self_attn)"
)
_OTHER = re.compile(r"refiner|embed|cross|audio|context|text|controlnet")


def guess(model: nn.Module) -> Adapter | None:
    """An adapter for a model of unknown class; None where no module looks like a site."""
    names = [name for name, module in model.named_modules() if _is_site(name, module)]
    arguments = [name for name in signature(type(model).forward).parameters if name != "self"]
    if not names or not arguments:
        return None
    first = arguments[0]
    return Adapter(
        classes=(type(model).__name__,),
        sites="|".join(map(re.escape, names)),
        first=first,
        layout=lambda model, call: _layout(model, call[first]),
        probe=None,
    )


def _is_site(name: str, module: nn.Module) -> bool:
    if not _BLOCK.fullmatch(name) or _OTHER.search(name):
        return False
    if getattr(module, "processor", None) is None or getattr(module, "is_cross_attention", False):
        return False
    try:
        heads, dim = heads_of(module)
    except (AttributeError, TypeError, ZeroDivisionError):
        return False
    return heads > 0 and dim > 0


def _layout(model: nn.Module, hidden: Any) -> Layout | str:
    """The grid of latents [batch, channels, (t,) h, w] in patches of the model's size."""
    name = type(model).__name__
    config: Any = getattr(model, "config", None)
    patch = getattr(config, "patch_size", None)
    if not isinstance(hidden, Tensor) or hidden.ndim not in (4, 5) or patch is None:
        return f"accel does not know a {name}; say where its tokens stand by layout="
    sizes = tuple(patch) if isinstance(patch, list | tuple) else (patch, patch)
    sizes = (getattr(config, "patch_size_t", None) or 1, *sizes)[-3:]
    grid = [1, *(int(n) for n in hidden.shape[2:])][-3:]
    if any(n % p for n, p in zip(grid, sizes, strict=True)):
        return f"accel does not know a {name}; say where its tokens stand by layout="
    t, h, w = (n // p for n, p in zip(grid, sizes, strict=True))
    return Layout.of((t, h, w))
