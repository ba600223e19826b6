"""The model of vit-digits, which names the digit of a small canvas, and how it becomes a folder."""

import copy
import json
from pathlib import Path
from typing import Any

from digit_crops import CROP, make_crop
from moving_digits import DIGIT_WORDS
from swin_digits_model import FILE_SEED, write_png
from training import save_pipeline

from accel.pipelines.vision import VisionConfig, VisionPipeline

__all__ = ["ARCHITECTURE", "PATCH", "build_pipeline", "export", "write_crops"]

ARCHITECTURE = "vit_tiny_patch16_224"
PATCH = 8  # pixels: 112 are 14 x 14 patches, as many as 224 are of 16
FILES = {"test": range(64), "calibration": range(100, 116)}
SIZE_ARGUMENTS = {
    "patch_size": PATCH,
    "embed_dim": 128,
    "depth": 10,
    "num_heads": 4,
    "mlp_ratio": 3.0,
    "reg_tokens": 4,
}


def build_pipeline(size: int = CROP, **changes: Any) -> VisionPipeline:
    """A plain ViT with a class token and four registers: 201 tokens, ten blocks, so that tokens can
    be left out behind the third, sixth and ninth as in larger ones.
    """
    config = VisionConfig(
        architecture=ARCHITECTURE,
        classes=DIGIT_WORDS,
        model_args={**SIZE_ARGUMENTS, **changes, "img_size": (size, size)},
        size=(size, size),
    )
    return VisionPipeline.create(config)


def export(out: Path, pipe: VisionPipeline) -> None:
    """Write the pipeline to `out` in float16, half the size; loaded it is float32 again."""
    save_pipeline(VisionPipeline(copy.deepcopy(pipe.model).half(), pipe.config), out)


def write_crops(out: Path) -> None:
    """`test` and `calibration` of the folder: crop `NNN.png`, and in `labels.json` its class."""
    for folder, indices in FILES.items():
        (out / folder).mkdir(parents=True, exist_ok=True)
        labels = {}
        for number, index in enumerate(indices):
            image, digit = make_crop(FILE_SEED, index, split="held-out")
            write_png(image, out / folder / f"{number:03d}.png")
            labels[f"{number:03d}"] = DIGIT_WORDS[digit]
        (out / folder / "labels.json").write_text(json.dumps(labels, indent=1) + "\n")
