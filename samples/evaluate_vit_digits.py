"""Measure samples/models/vit-digits: which held-out digits are named rightly?

    python samples/evaluate_vit_digits.py --crops 512

Writes `evaluation.json` and `samples.png` into the model folder. Crops are made of held-out scans
and are others than those of the folder `test`, which is measured beside them.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from digit_crops import CROP, make_crop
from evaluating import median_seconds
from moving_digits import DIGIT_WORDS
from PIL import Image, ImageDraw
from swin_digits_model import FILE_SEED, write_png
from torch import Tensor

from accel.pipelines.provenance import device_name
from accel.pipelines.vision import VisionPipeline
from accel.pipelines.vision_images import ImageFolder

HERE = Path(__file__).parent
FIRST_CROP = 1000  # of the evaluation; those of the committed files come before it
BATCH = 32

__all__ = ["rates"]


def rates(digits: Tensor, found: Tensor) -> dict:
    """Crops, the share that is named rightly, and of every digit its own share and what it was
    most often taken for.
    """
    right = found == digits
    by_digit = {}
    for number, word in enumerate(DIGIT_WORDS):
        there = digits == number
        if not there.any():
            continue
        wrong = found[there & ~right]
        by_digit[word] = {
            "crops": int(there.sum()),
            "right": round(float(right[there].float().mean()), 4),
            "taken_for": DIGIT_WORDS[int(wrong.mode().values)] if len(wrong) else None,
        }
    return {
        "crops": len(digits),
        "top1": round(float(right.float().mean()), 4),
        "by_digit": by_digit,
    }


def judged(pipe: VisionPipeline, crops: int) -> dict:
    """Rates of crops of held-out scans."""
    made = [make_crop(FILE_SEED, FIRST_CROP + i, split="held-out") for i in range(crops)]
    digits = torch.tensor([digit for _, digit in made])
    found = pipe(torch.stack([image for image, _ in made]), batch_size=BATCH).labels
    return rates(digits, found)


def judged_files(pipe: VisionPipeline, folder: Path) -> dict:
    """Top-1 of the committed pictures, as a comparison reads them."""
    files = ImageFolder.of(str(folder))
    right = [
        pipe(files.images(name)).labels.numpy() == files.right(name, pipe.classes, "classification")
        for name in files.names
    ]
    return {"images": len(right), "top1": round(float(np.mean(right)), 4)}


def draw(pipe: VisionPipeline, path: Path, columns: int = 8, rows: int = 3) -> None:
    """Crops, each over what was found in it, in red where that is wrong."""
    sheet = Image.new("RGB", (columns * (CROP + 6), rows * (CROP + 18)), "white")
    pen = ImageDraw.Draw(sheet)
    for number in range(columns * rows):
        image, digit = make_crop(FILE_SEED, FIRST_CROP + number, split="held-out")
        found = int(pipe(image).labels[0])
        left, top = number % columns * (CROP + 6), number // columns * (CROP + 18)
        sheet.paste(Image.fromarray(image.permute(1, 2, 0).numpy()), (left, top))
        colour = "black" if found == digit else "red"
        pen.text((left + 2, top + CROP + 2), DIGIT_WORDS[found], fill=colour)
    write_png(torch.from_numpy(np.array(sheet)).permute(2, 0, 1), path)


def main(model: Path, crops: int, threads: int, out: Path | None) -> None:
    torch.set_num_threads(threads)
    pipe = VisionPipeline.from_pretrained(model)
    out = out or model
    blank = torch.zeros(1, 3, CROP, CROP)
    result = {
        "device": device_name(torch.device("cpu")),
        **judged(pipe, crops),
        "test_files": judged_files(pipe, model / "test"),
        "seconds": round(median_seconds(lambda: pipe(blank)), 4),
    }
    print(json.dumps(result, indent=1))
    (out / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(pipe, out / "samples.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=HERE / "models" / "vit-digits")
    parser.add_argument("--crops", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="instead of the model folder")
    main(**vars(parser.parse_args()))
