"""Semantic segmentation with a timm backbone: its maps of all levels, added up, then classified."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Segmenter"]


class Segmenter(nn.Module):
    """logits = classify(gelu(norm(sum over levels of up(project_l(map_l))))), up to the image.

    The head is FPN's sum of levels (arXiv 1612.03144) without its 3x3 convolutions: a linear
    projection of every level to `width` channels, brought to the finest level bilinearly, a layer
    norm, GELU, and a linear classifier. It costs little beside the backbone, so what is saved there
    shows.

    backbone: a timm model made with `features_only=True`, whichever layout its maps have.
    classes: how many there are; width: channels of the head.
    """

    def __init__(self, backbone: nn.Module, classes: int, width: int = 64) -> None:
        super().__init__()
        info: Any = backbone.feature_info
        self.backbone = backbone
        self.stride = int(min(info.reduction()))
        self.last = str(getattr(backbone, "output_fmt", "NCHW")).endswith("NHWC")
        self.projections = nn.ModuleList(nn.Linear(n, width) for n in info.channels())
        self.norm = nn.LayerNorm(width)
        self.classify = nn.Linear(width, classes)

    def forward(
        self, x: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch classes height width"]:
        """Any height and width that the backbone takes once they are rounded up to its finest
        stride: what is missing is zeros on the right and below, and is cut off again.
        """
        height, width = x.shape[2:]
        below, right = -height % self.stride, -width % self.stride
        x = F.pad(x, (0, right, 0, below)) if below or right else x  # which would be a copy
        # channels stay last, where linear layers and norms want them
        maps = [
            project(found if self.last else found.permute(0, 2, 3, 1))
            for project, found in zip(self.projections, self.backbone(x), strict=True)
        ]
        finest = max((found.shape[1:3] for found in maps), key=lambda size: size[0] * size[1])
        total = _resized(maps[0], finest)
        for found in maps[1:]:
            total = total + _resized(found, finest)
        logits = self.classify(F.gelu(self.norm(total)))
        return _resized(logits, x.shape[2:]).permute(0, 3, 1, 2)[:, :, :height, :width]


def _resized(
    maps: Float[Tensor, "batch rows columns channels"], size: torch.Size
) -> Float[Tensor, "batch height width channels"]:
    if maps.shape[1:3] == size:
        return maps
    seen = maps.permute(0, 3, 1, 2)
    return F.interpolate(seen, size=tuple(size), mode="bilinear").permute(0, 2, 3, 1)
