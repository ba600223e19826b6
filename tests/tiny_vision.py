"""Tiny vision models and images, with classes that colours tell."""

import numpy as np
import torch

from accel.pipelines.vision import VisionConfig, VisionPipeline

SWIN = "swin_tiny_patch4_window7_224"
VIT = "vit_tiny_patch16_224"
CLASSES = ("nothing", "red", "green", "blue", "grey")
SWIN_ARGS = {
    "img_size": (32, 48),
    "window_size": 4,
    "embed_dim": 8,
    "depths": (2, 1, 1, 1),
    "num_heads": (1, 2, 2, 4),
}
VIT_ARGS = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


def swin(*, task="segmentation", size=(32, 48), **changes):
    torch.manual_seed(5)
    args = {**SWIN_ARGS, **changes}
    config = VisionConfig(SWIN, CLASSES, task, args, size=size, head_width=12)
    return _spread(VisionPipeline.create(config))


def vit(*, size=(32, 48), **changes):
    torch.manual_seed(6)
    config = VisionConfig(VIT, CLASSES, "classification", {**VIT_ARGS, **changes}, size=size)
    return _spread(VisionPipeline.create(config))


def _spread(pipe):
    """Weights large enough that images differ in their classes."""
    for name, weight in pipe.model.named_parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.3 if "table" not in name else 0.1)
    return pipe


def images(count, height=32, width=48, seed=0):
    """[count, 3, height, width], uint8: coarse coloured patches."""
    drawn = np.random.default_rng(seed).integers(0, 256, (count, 3, height // 8, width // 8))
    return torch.from_numpy(drawn.astype(np.uint8).repeat(8, 2).repeat(8, 3))
