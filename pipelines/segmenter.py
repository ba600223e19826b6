"""Semantic segmentation with a timm backbone: its maps of all levels, added up, then classified."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Segmenter"]


class Segmenter(nn.Module):
    """logits = classify(gelu(norm(sum over levels of up(project_l(map_l))))), up to the image.

    The head is FPN's sum of levels (arXiv 1612.03144) without its 3x3 convolutions: a 1x1
    projection of every level to `width` channels, brought to the finest level bilinearly, a layer
    norm over channels, GELU, and a 1x1 classifier. It costs little beside the backbone, so what is
    saved there shows.

    backbone: a timm model made with `features_only=True`, whichever layout its maps have.
    classes: how many there are; width: channels of the head.
    """

    def __init__(self, backbone: nn.Module, classes: int, width: int = 64) -> None:
        super().__init__()
        info: Any = backbone.feature_info
        self.backbone = backbone
        self.stride = int(min(info.reduction()))
        self.last = str(getattr(backbone, "output_fmt", "NCHW")).endswith("NHWC")
        self.projections = nn.ModuleList(nn.Conv2d(n, width, 1) for n in info.channels())
        self.norm = nn.LayerNorm(width)
        self.classify = nn.Conv2d(width, classes, 1)

    def forward(
        self, x: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch classes height width"]:
        """Any height and width that the backbone takes once they are rounded up to its finest
        stride: what is missing is zeros on the right and below, and is cut off again.
        """
        height, width = x.shape[2:]
        x = F.pad(x, (0, -width % self.stride, 0, -height % self.stride))
        maps = [
            project(found.permute(0, 3, 1, 2) if self.last else found)
            for project, found in zip(self.projections, self.backbone(x), strict=True)
        ]
        finest = max((found.shape[2:] for found in maps), key=lambda size: size[0] * size[1])
        total = maps[0].new_zeros(())
        for found in maps:
            total = total + _resized(found, finest)
        total = F.gelu(self.norm(total.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return _resized(self.classify(total), x.shape[2:])[:, :, :height, :width]


def _resized(maps: Tensor, size: torch.Size) -> Tensor:
    if maps.shape[2:] == size:
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)
