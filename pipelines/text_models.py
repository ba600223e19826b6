"""Text models: where their attention sites are, and how the tokens of a call are laid out.

Any model of transformers, and any whose blocks call SDPA themselves (remote code). A pipeline that
generates says where its tokens stand (`accel.text_step`); a call without one is one span of text
that competes with itself, less its padding.
"""

import re
from typing import Any

import torch
from torch import Tensor, nn

from accel.intercept_interface import InterfaceInterception, uses_interface
from accel.layout import Layout
from accel.layouts import LayoutsLike
from accel.pipelines.adapters import Adapter, Call

_BLOCK = re.compile(
    r"(?:\w+\.)*(?:layers|layer|blocks|h)\.\d+\.(?:\w+\.)*(?:self_attn|attn|attention|self)"
)
_PROBED = 9


def guess_text(model: nn.Module) -> Adapter | None:
    """An adapter for a text model; None where a model is none."""
    if not any(cls.__name__ == "PreTrainedModel" for cls in type(model).__mro__):
        return None
    names = [
        name
        for name, module in model.named_modules()
        if _BLOCK.fullmatch(name) and uses_interface(module) and _heads(module) is not None
    ]
    if not names:
        return None
    return Adapter(
        classes=(type(model).__name__,),
        sites="|".join(map(re.escape, names)),
        first="input_ids",
        contents=("attention_mask",),
        layout=_layout,
        probe=_probe,
        heads=lambda module: _heads(module) or (0, 0),
        projection=lambda model, name: model.get_submodule(name).o_proj.weight,  # type: ignore
        intercept=InterfaceInterception,
    )


def _heads(module: nn.Module) -> tuple[int, int] | None:
    """(query heads, head dim) of an attention module of transformers."""
    config: Any = getattr(module, "config", None)
    dim = getattr(module, "head_dim", None)
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(dim, int) or not isinstance(heads, int):
        return None
    return heads, dim


def _layout(model: Any, call: Call) -> LayoutsLike:
    tokens, mask = call["input_ids"], call.get("attention_mask")
    length = tokens.shape[1]
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return Layout.of((1, 1, length))
    layouts = []
    for row in (mask != 0).tolist():
        runs: list[Any] = []
        for real in row:
            if runs and (runs[-1][0] == "pad") != real:
                runs[-1][1] += 1
            else:
                runs.append(["grid" if real else "pad", 1])
        layouts.append(
            Layout.join([(1, 1, n) if kind == "grid" else ("pad", n) for kind, n in runs])
        )
    return layouts


def _probe(model: Any) -> dict[str, Any]:
    return {"input_ids": torch.zeros(1, _PROBED, dtype=torch.long)}
