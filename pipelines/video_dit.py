"""Video diffusion transformers: Wan."""

import re
from typing import Any

import torch
from torch import Tensor, nn

from accel.layout import Layout
from accel.pipelines.adapters import Adapter, register


def _wan_layout(model: nn.Module, hidden_states: Tensor) -> Layout:
    """Wan: [batch, channels, t, h, w] in patches; video tokens only, text is cross-attended."""
    patch: tuple[int, int, int] = model.config.patch_size  # type: ignore[union-attr,assignment]
    grid = [n // p for n, p in zip(hidden_states.shape[2:], patch, strict=True)]
    return Layout.of((grid[0], grid[1], grid[2]))


def _wan_probe(model: nn.Module) -> dict[str, Any]:
    config: Any = model.config
    t, h, w = config.patch_size
    image = getattr(config, "image_dim", None)
    return {
        "hidden_states": torch.zeros(1, config.in_channels, t, 2 * h, 3 * w),
        "timestep": torch.zeros(1, dtype=torch.long),
        "encoder_hidden_states": torch.zeros(1, 512 if image else 2, config.text_dim),
        "encoder_hidden_states_image": torch.zeros(1, 1, image) if image else None,
    }


WAN = register(
    Adapter(
        classes=("WanTransformer3DModel",),
        is_site=lambda name, _: re.fullmatch(r"blocks\.\d+\.attn1", name) is not None,
        heads=lambda m: (m.heads, m.inner_dim // m.heads),  # type: ignore[arg-type,operator,return-value]
        first="hidden_states",
        layout=_wan_layout,
        projection=lambda m: m.to_out[0].weight,  # type: ignore[index,union-attr]
        probe=_wan_probe,
    )
)
