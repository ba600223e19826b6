"""Vision models of timm: where their attention sites are, and how the tokens of an image lie.

A call is a whole run of one step, whichever of the model's methods makes it (`forward`,
`forward_features`, `forward_intermediates`, `features_only`): all begin with the patches.
"""

import re
import sys
import weakref
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
INSTEAD = "; take Swin, Swin v2, SAM's ViT or Hiera"
refuse(
    f"convolutions mix its windows, so that none passes a block unchanged{INSTEAD}",
    *("DaVit", "EfficientVitMsra", "TinyVit"),
    package=PACKAGE,
)
refuse(
    "none of its blocks keeps to windows: they convolve or pool, and attend across the whole map"
    + INSTEAD,
    *("EfficientFormer", "EfficientFormerV2", "MaxxVit"),
    package=PACKAGE,
)
refuse(
    f"it attends to pooled maps, and has no windows{INSTEAD}",
    "MultiScaleVit",
    package=PACKAGE,
)
refuse(
    f"it mixes channels by attention, places by convolutions, and has no windows{INSTEAD}",
    *("EdgeNeXt", "Xcit"),
    package=PACKAGE,
)
refuse(
    "it has no attention: it mixes places by convolutions",
    "FocalNet",
    package=PACKAGE,
)
refuse(
    f"accel knows nothing of how its blocks cut their windows{INSTEAD}",
    *("GlobalContextVit", "Nest", "Twins"),
    package=PACKAGE,
)
refuse(
    "features_only took the model apart, and accel puts only Swins together again; make it with"
    " timm.create_model(..., features_only=True, feature_cls='getter')",
    *("FeatureListNet", "FeatureDictNet"),
    package=PACKAGE,
)

# by nets of features, as long as somebody holds them
_together: "weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]]"
_together = weakref.WeakKeyDictionary()


def put_together(net: nn.Module) -> nn.Module | None:
    """The Swin that `features_only` took apart, without its norm and head; None of all others.

    `net` calls its patches and stages (`layers_0`, ...) one after another. They are the modules of
    the Swin too, by their own names, so that a plan says of either what it says of the other.
    """
    if not {"FeatureDictNet", "FeatureHookNet"} & {cls.__name__ for cls in type(net).__mro__}:
        return None
    stages = {n: m for n, m in net.named_children() if re.fullmatch(r"(layers|stages)_\d+", n)}
    kind = type(next(iter(stages.values()), None))
    if not kind.__module__.startswith("timm.models.swin_transformer"):
        return None
    known = _together.get(net, lambda: None)()
    if known is not None:
        return known
    cls = getattr(sys.modules[kind.__module__], kind.__name__.removesuffix("Stage"))
    whole: Any = cls.__new__(cls)
    nn.Module.__init__(whole)
    whole.patch_embed = net.get_submodule("patch_embed")
    setattr(whole, next(iter(stages)).partition("_")[0], nn.Sequential(*stages.values()))
    whole.norm = whole.head = nn.Identity()
    _together[net] = weakref.ref(whole)
    return whole


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
    patches, sides = model.patch_embed, tuple(call["x"].shape[2:])
    if hasattr(patches, "dynamic_feat_size"):
        return Layout.of((1, *patches.dynamic_feat_size(sides)))
    conv = patches.proj
    axes = zip(sides, conv.kernel_size, conv.stride, conv.padding, strict=True)
    return Layout.of((1, *((side + 2 * pad - k) // by + 1 for side, k, by, pad in axes)))


def _probe(model: Any) -> dict[str, Any]:
    """An image of the size that the model was made for."""
    channels = getattr(model.patch_embed, "in_chans", None) or model.patch_embed.proj.in_channels
    size = getattr(model.patch_embed, "img_size", None)
    tokens = getattr(model, "tokens_spatial_shape", None)
    if size is None and tokens is not None:  # Hiera has its map, and says its size nowhere else
        size = [n * stride for n, stride in zip(tokens, model.patch_stride, strict=True)]
    if size is None and hasattr(model, "window_spec"):
        # SAM 2's Hiera takes what its first windows divide, and halves it three times
        size = [8 * model.window_spec[0] * stride for stride in model.patch_embed.proj.stride]
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
        classes=("SwinTransformer", "SwinTransformerV2", "SwinTransformerV2Cr"),
        sites=r"(layers|stages)\.\d+\.blocks\.\d+\.attn",
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
        classes=("VisionTransformerSAM", "Hiera", "HieraDet"),
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
