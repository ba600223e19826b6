"""Where a model computes, which is not where its weights lie while they are offloaded."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def execution_device(model: nn.Module) -> torch.device:
    """The device that offloading brings the model to, else that of its weights."""
    for module in model.modules():
        for device in _of_hooks(module):
            if device is not None:
                return torch.device(device)
    return next(model.parameters()).device


def _of_hooks(module: Any) -> Iterator[Any]:
    # accelerate's: model and sequential offload
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        yield getattr(one, "execution_device", None)
    # diffusers': group offload
    for one in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values():
        yield getattr(getattr(one, "config", None), "onload_device", None)
