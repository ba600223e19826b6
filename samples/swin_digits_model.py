"""The model of swin-digits, which gives every pixel of a canvas its class, and how it becomes a
folder.
"""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from digit_canvases import CANVAS, CLASSES, make_canvas
from PIL import Image
from torch import Tensor
from training import save_pipeline

from accel.pipelines.vision import VisionConfig, VisionPipeline

__all__ = [
    "ARCHITECTURE",
    "build_pipeline",
    "draw_canvases",
    "export",
    "swin_of",
    "write_canvases",
    "write_png",
]

ARCHITECTURE = "swin_tiny_patch4_window7_224"
WINDOW = 4  # tokens: 512 pixels are 32 x 32 windows in the first stage, and 4 x 4 in the last
# canvases of the committed files, of held-out scans and of a seed that no training has
FILE_SEED = 1_000_000
FILES = {"test": range(48), "calibration": range(100, 124)}
COLOURS = 192  # of a committed picture: grain makes large files
SIZE_ARGUMENTS = {
    "embed_dim": 32,
    "depths": (2, 2, 6, 2),
    "num_heads": (2, 4, 8, 16),
    "window_size": WINDOW,
    "drop_path_rate": 0.0,
}


def build_pipeline(size: int = CANVAS, head_width: int = 32, **changes: Any) -> VisionPipeline:
    """Swin with the depths of Swin-T, so that its blocks are pruned by the same genes, and a third
    of its width; below a head that adds up the maps of all four stages.
    """
    config = VisionConfig(
        architecture=ARCHITECTURE,
        classes=CLASSES,
        task="segmentation",
        model_args={**SIZE_ARGUMENTS, **changes, "img_size": (size, size)},
        size=(size, size),
        head_width=head_width,
    )
    return VisionPipeline.create(config)


def swin_of(pipe: VisionPipeline) -> Any:
    """timm's SwinTransformer inside."""
    return pipe.model.backbone.model


def export(out: Path, pipe: VisionPipeline) -> None:
    """Write the pipeline to `out` in float16, half the size; loaded it is float32 again."""
    save_pipeline(VisionPipeline(copy.deepcopy(pipe.model).half(), pipe.config), out)


def write_png(image: Tensor, path: Path) -> None:
    """`[3, h, w]` as a picture of few colours, `[h, w]` as one of levels.

    An octree keeps the colours of small things, which a median cut gives up for shades of paper.
    """
    if image.ndim == 2:
        Image.fromarray(image.numpy()).save(path, optimize=True)
        return
    picture = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    few = picture.quantize(COLOURS, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    few.save(path, optimize=True)


def draw_canvases(folder: Path, indices: Iterable[int]) -> None:
    """Canvases of held-out scans as files: canvas `NNN.png`, and `NNN-classes.png`, whose grey
    level is the class. `NNN` counts from 0.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, index in enumerate(indices):
        image, classes = make_canvas(FILE_SEED, index, split="held-out")
        write_png(image, folder / f"{number:03d}.png")
        write_png(classes, folder / f"{number:03d}-classes.png")


def write_canvases(out: Path) -> None:
    """`test` and `calibration` of the model's folder."""
    for folder, indices in FILES.items():
        draw_canvases(out / folder, indices)
