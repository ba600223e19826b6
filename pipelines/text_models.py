"""Text models: where their attention sites are, and how the tokens of a call are laid out.

Any model of transformers, and any whose modules call SDPA themselves (remote code). A pipeline that
generates says where its tokens stand (`accel.text_step`); a call without one is one span of text
that competes with itself, less its padding.
"""

import re
import weakref
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from accel.intercept_calls import CallInterception, callers
from accel.intercept_interface import InterfaceInterception, uses_interface
from accel.layout import Grid, Layout, SegmentKind
from accel.layouts import LayoutsLike
from accel.pipelines.adapters import Adapter, Call, register
from accel.pipelines.devices import execution_device

_BLOCK = re.compile(
    r"(?:\w+\.)*(?:layers|layer|blocks|h)\.\d+\.(?:\w+\.)*(?:self_attn|attn|attention|self)"
)
_PROBED = 9


def _canvas_probe(model: Any) -> dict[str, Any]:
    """DiffusionGemma: a canvas after one token, whose keys its encoder makes."""
    from transformers import DynamicCache

    device = execution_device(model)
    keys = DynamicCache(config=model.config.get_text_config(decoder=True))
    one = torch.zeros(1, 1, dtype=torch.long, device=device)
    with torch.no_grad():
        model.model.encoder(input_ids=one + 3, past_key_values=keys)
    canvas = one.expand(1, model.config.canvas_length) + 3
    return {"decoder_input_ids": canvas, "past_key_values": keys}


register(
    Adapter(
        classes=("DiffusionGemmaForBlockDiffusion",),
        sites=r"model\.decoder\.layers\.\d+\.self_attn",
        first="decoder_input_ids",
        layout=lambda model, call: Layout.of((1, 1, call["decoder_input_ids"].shape[1])),
        probe=_canvas_probe,
        heads=lambda module: _heads(module) or (0, 0),
        projection=lambda model, name: _projection(model, name),
        intercept=InterfaceInterception,
    )
)
# what looking at a model found; it goes with the model
_found: "weakref.WeakKeyDictionary[nn.Module, Adapter | None]" = weakref.WeakKeyDictionary()


def guess_text(model: nn.Module) -> Adapter | None:
    """An adapter for a text model; None where a model is none."""
    if not any(cls.__name__ == "PreTrainedModel" for cls in type(model).__mro__):
        return None
    if model not in _found:
        _found[model] = _by_interface(model) or _by_calls(model)
    return _found[model]


def _by_interface(model: nn.Module) -> Adapter | None:
    names = [
        name
        for name, module in model.named_modules()
        if _BLOCK.fullmatch(name) and uses_interface(module) and _heads(module) is not None
    ]
    if not names:
        return None
    return Adapter(
        **_text(model, names),
        heads=lambda module: _heads(module) or (0, 0),
        intercept=InterfaceInterception,
    )


def _by_calls(model: nn.Module) -> Adapter | None:
    tokens = _probe(model)["input_ids"].to(execution_device(model))
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            shapes = callers(model, lambda: model(tokens))
    finally:
        model.train(training)
    if not shapes:
        return None
    by_module = weakref.WeakKeyDictionary(
        {model.get_submodule(name): shape for name, shape in shapes.items()}
    )
    return Adapter(
        **_text(model, list(shapes)), heads=by_module.__getitem__, intercept=CallInterception
    )


def _text(model: nn.Module, names: list[str]) -> dict[str, Any]:
    return {
        "classes": (type(model).__name__,),
        "sites": "|".join(map(re.escape, names)),
        "first": "input_ids",
        "contents": ("attention_mask",),
        "layout": _layout,
        "probe": _probe,
        "projection": _projection,
    }


def _heads(module: nn.Module) -> tuple[int, int] | None:
    """(query heads, head dim) of an attention module of transformers."""
    config: Any = getattr(module, "config", None)
    dim = getattr(module, "head_dim", None)
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(dim, int) or not isinstance(heads, int):
        return None
    return heads, dim


def _projection(model: nn.Module, name: str) -> Tensor:
    module: Any = model.get_submodule(name)
    for known in ("o_proj", "attn_out", "dense", "out_proj"):
        if hasattr(module, known):
            return getattr(module, known).weight
    raise AttributeError(f"the output projection of {name} was not found")


def _layout(model: Any, call: Call) -> LayoutsLike:
    return layouts_of(call["input_ids"], call.get("attention_mask"))


def layouts_of(tokens: Tensor, mask: Any) -> tuple[Layout, ...]:
    """Of a call that nobody describes: what its mask of padding leaves of each sample."""
    if not isinstance(mask, Tensor) or mask.ndim != 2 or bool((mask != 0).all()):
        return (Layout.of((1, 1, tokens.shape[1])),)
    layouts = []
    for row in (mask != 0).tolist():
        runs: list[tuple[SegmentKind, int] | Grid] = []
        for real, group in groupby(row):
            length = len(list(group))
            runs.append((1, 1, length) if real else ("pad", length))
        layouts.append(Layout.join(runs))
    return tuple(layouts)


def _probe(model: Any) -> dict[str, Any]:
    return {"input_ids": torch.zeros(1, _PROBED, dtype=torch.long)}
