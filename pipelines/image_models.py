"""Vision models of timm: where their attention sites are, and how the tokens of an image lie.

A call is a whole run of one step, whichever of the model's methods makes it (`forward`,
`forward_features`, `forward_intermediates`, `features_only`): all begin with the patches.
"""

from typing import Any

import torch
from torch import Tensor, nn

from accel.layout import Layout
from accel.pipelines.adapters import Adapter, Call, refuse, register
from accel.pipelines.token_blocks import TokenInterception
from accel.pipelines.window_blocks import WindowInterception

PACKAGE = "timm"

refuse(
    "it has its images as sequences of patches of different sizes; take VisionTransformer",
    "NaFlexVit",
    package=PACKAGE,
)
refuse(
    "it is torchvision's, which computes attention in one function; take timm's of the same name",
    "SwinTransformer",
    "VisionTransformer",
    package="torchvision",
)
refuse(
    "its attention has a bias for every pair of places, which sparse kernels and merged tokens have"
    " not; take VisionTransformer or Eva",
    "Beit",
    "VisionTransformerRelPos",
    package=PACKAGE,
)
refuse(
    "its windows have another structure: blocks mix them with convolutions, grids, pooled or"
    " carried tokens, so that none passes unchanged; take Swin, Swin v2, SAM's ViT or Hiera",
    *("MaxxVit", "MultiScaleVit", "DaVit", "GlobalContextVit", "FocalNet", "Nest", "Twins"),
    *("SwinTransformerV2Cr", "EdgeNeXt", "EfficientFormer", "EfficientFormerV2", "Xcit"),
    package=PACKAGE,
)
refuse(
    "features_only took the model apart; make it with timm.create_model(..., features_only=True,"
    " feature_cls='getter')",
    *("FeatureListNet", "FeatureDictNet"),
    package=PACKAGE,
)


def _heads(module: Any) -> tuple[int, int]:
    """(heads, head dim) of an attention module of timm."""
    heads: int = getattr(module, "num_heads", None) or module.heads
    dim = getattr(module, "head_dim", None) or module.proj.in_features // heads
    return heads, int(dim)


def _projection(model: nn.Module, name: str) -> Tensor:
    module: Any = model.get_submodule(name)
    return module.proj.weight


def _patches(model: Any) -> nn.Module:
    patches: nn.Module = model.patch_embed
    return patches


def _tokens(model: Any, call: Call) -> Layout:
    """Class, distillation and register tokens, then the patches row by row."""
    rows, columns = model.patch_embed.dynamic_feat_size(tuple(call["x"].shape[2:]))
    return Layout.of((1, rows, columns), text_before=model.num_prefix_tokens)


def _map(model: Any, call: Call) -> Layout:
    """The map of patches that enters the first stage."""
    sides = call["x"].shape[2:]
    patch = getattr(model.patch_embed, "patch_size", None) or model.patch_stride
    rows, columns = (-(-side // p) for side, p in zip(sides, patch, strict=True))
    return Layout.of((1, rows, columns))


def _probe(model: Any) -> dict[str, Any]:
    """An image of the size that the model was made for."""
    channels = getattr(model.patch_embed, "in_chans", None) or model.patch_embed.proj.in_channels
    size = getattr(model.patch_embed, "img_size", None)
    tokens = getattr(model, "tokens_spatial_shape", None)
    if size is None and tokens is not None:  # Hiera has its map, and says its size nowhere else
        size = [n * stride for n, stride in zip(tokens, model.patch_stride, strict=True)]
    if size is None:
        configured = getattr(model, "pretrained_cfg", None) or {}
        size = configured.get("input_size", (3, 224, 224))[1:]
    return {"x": torch.zeros(1, channels, *size)}


for _adapter in (
    Adapter(
        classes=("VisionTransformer", "Eva"),
        sites=r"blocks\.\d+\.attn",
        layout=_tokens,
        probe=_probe,
        first="x",
        heads=_heads,
        projection=_projection,
        intercept=TokenInterception,
        package=PACKAGE,
        entry=_patches,
        single=True,
    ),
    Adapter(
        classes=("SwinTransformer", "SwinTransformerV2"),
        sites=r"layers\.\d+\.blocks\.\d+\.attn",
        layout=_map,
        probe=_probe,
        first="x",
        heads=_heads,
        projection=_projection,
        intercept=WindowInterception,
        package=PACKAGE,
        entry=_patches,
        single=True,
    ),
    Adapter(
        classes=("VisionTransformerSAM", "Hiera"),
        sites=r"blocks\.\d+\.attn",
        layout=_map,
        probe=_probe,
        first="x",
        heads=_heads,
        projection=_projection,
        intercept=WindowInterception,
        package=PACKAGE,
        entry=_patches,
        single=True,
    ),
):
    register(_adapter)
