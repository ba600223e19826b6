"""Measure samples/models/swin-digits: which pixels of held-out digits have their class?

    python samples/evaluate_swin_digits.py --canvases 64
    python samples/evaluate_swin_digits.py --canvases 64 --keeps 0.8 0.6 0.4
    python samples/evaluate_swin_digits.py --canvases 64 --plans samples/plans/swin-digits.json

Writes `evaluation.json` and `samples.png` into the model folder. Canvases are made of held-out
scans and are others than those of the folder `test`, which is measured beside them. With --keeps
every block computes that share of its windows: how much the model has adapted to it. With --plans
it computes what each plan says.
"""

import argparse
import json
from contextlib import nullcontext
from pathlib import Path

import cv2
import numpy as np
import torch
from digit_canvases import APART, CANVAS, CLASSES, draw_canvas, render_canvas
from evaluating import median_seconds
from swin_digits_model import FILE_SEED, WINDOW, write_png
from torch import Tensor
from window_adaptation import SCORE, keeps_plan, window_blocks

from accel.pipelines.enable import enabled
from accel.pipelines.provenance import device_name
from accel.pipelines.vision import VisionPipeline
from accel.pipelines.vision_images import ImageFolder
from accel.pipelines.vision_scores import counts_of, scores_of
from accel.plan import Plan
from accel.window_keeps import WindowKeeps

HERE = Path(__file__).parent
FIRST_CANVAS = 1000  # of the evaluation; those of the committed files come before it
BINS = ((20, 40), (40, 80), (80, 141))  # pixels, heights of digits
INKS = np.array(  # of the classes in pictures
    [
        *((245, 245, 240), (31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40)),
        *((148, 103, 189), (140, 86, 75), (227, 119, 194), (90, 90, 90), (188, 189, 34)),
        (23, 190, 207),
    ],
    np.uint8,
)

__all__ = ["background_windows", "digits_right", "judged", "share_table"]


def background_windows(classes: Tensor, patch: int = 4) -> dict[str, float]:
    """Of a map of classes [h, w], by stage: the share of windows that show no digit."""
    found = {}
    for stage in range(4):
        side = WINDOW * patch * 2**stage
        windows = classes.unfold(0, side, side).unfold(1, side, side)
        found[f"stage {stage + 1}"] = float((windows.amax((2, 3)) == 0).float().mean())
    return found


def digits_right(canvas, classes: Tensor, found: Tensor) -> list[tuple[float, bool]]:
    """Size of every digit, and whether most of its pixels are found as its own."""
    result = []
    for digit in canvas.digits:
        reach = APART * digit.size
        cut = tuple(slice(max(0, int(c - reach)), int(c + reach) + 1) for c in digit.centre)
        ink = classes[cut] == 1 + digit.digit
        right = (found[cut] == 1 + digit.digit)[ink].float().mean()
        result.append((digit.size, bool(right > 0.5)))
    return result


def share_table(digits: list[tuple[float, bool]]) -> dict[str, dict[str, float]]:
    """By sizes of digits: how many there are, and the share of those that are right."""
    table = {}
    for low, high in BINS:
        hits = [hit for size, hit in digits if low <= size < high]
        right = round(float(np.mean(hits)), 4) if hits else None
        table[f"{low} to {high - high % 20}"] = {"digits": len(hits), "right": right}
    return table


def same_keep(pipe: VisionPipeline, keep: float) -> Plan:
    """The plan of one keep for all blocks."""
    keeps = dict.fromkeys(window_blocks(pipe.model), keep)
    return keeps_plan(pipe.model, WindowKeeps(keeps, SCORE), f"keep {keep:g}")


def judged(pipe: VisionPipeline, canvases: int, plan: Plan | None = None) -> dict:
    """Scores of canvases of held-out scans, dense or by a plan."""
    counts, digits, empty = [], [], []
    with nullcontext() if plan is None else enabled(pipe, plan):
        for index in range(FIRST_CANVAS, FIRST_CANVAS + canvases):
            canvas = draw_canvas(FILE_SEED, index, split="held-out")
            image, classes = render_canvas(canvas, split="held-out")
            found = pipe(image).labels
            right = classes[None].long()
            counts.append(counts_of(found.numpy(), right.numpy(), len(CLASSES)))
            digits += digits_right(canvas, right[0], found[0])
            empty.append(background_windows(right[0]))
    scores = scores_of(counts, CLASSES)
    return {
        "canvases": canvases,
        "miou": round(scores["miou"], 4),
        "iou": {name: round(value, 4) for name, value in scores["iou"].items()},
        "pixels_right": round(scores["right"], 4),
        "digits": len(digits),
        "digits_right": round(float(np.mean([hit for _, hit in digits])), 4),
        "by_size": share_table(digits),
        "background_windows": {
            stage: round(float(np.mean([one[stage] for one in empty])), 4) for stage in empty[0]
        },
    }


def judged_files(pipe: VisionPipeline, folder: Path) -> dict:
    """mIoU of the committed pictures, as a comparison reads them."""
    files = ImageFolder.of(str(folder))
    counts = []
    for name in files.names:
        found = pipe(files.images(name)).labels.numpy()
        counts.append(counts_of(found, files.right(name, CLASSES, "segmentation"), len(CLASSES)))
    return {"images": len(counts), "miou": round(scores_of(counts, CLASSES)["miou"], 4)}


def draw(pipe: VisionPipeline, path: Path, count: int = 3) -> None:
    """Canvases, what is right and what is found, one below the other."""
    columns = []
    for index in range(FIRST_CANVAS, FIRST_CANVAS + count):
        image, classes = render_canvas(
            draw_canvas(FILE_SEED, index, split="held-out"), split="held-out"
        )
        found = pipe(image).labels[0]
        maps = [INKS[c.numpy()] for c in (classes, found)]
        column = np.concatenate([image.permute(1, 2, 0).numpy(), *maps])
        columns.append(np.pad(column, ((0, 0), (0, 8), (0, 0)), constant_values=255))
    sheet = cv2.resize(
        np.concatenate(columns, 1), None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA
    )
    write_png(torch.from_numpy(sheet).permute(2, 0, 1), path)


def main(
    model: Path,
    canvases: int,
    keeps: list[float],
    plans: list[Path],
    threads: int,
    out: Path | None,
) -> None:
    torch.set_num_threads(threads)
    pipe = VisionPipeline.from_pretrained(model)
    out = out or model
    blank = torch.zeros(1, 3, CANVAS, CANVAS)
    loaded = {str(path): Plan.load(path) for path in plans}
    result = {
        "device": device_name(torch.device("cpu")),
        **judged(pipe, canvases),
        "test_files": judged_files(pipe, model / "test"),
        "seconds": round(median_seconds(lambda: pipe(blank)), 4),
        "keeps": {f"{k:g}": judged(pipe, canvases, same_keep(pipe, k))["miou"] for k in keeps},
        "plans": {name: judged(pipe, canvases, plan)["miou"] for name, plan in loaded.items()},
    }
    print(json.dumps(result, indent=1))
    (out / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(pipe, out / "samples.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=HERE / "models" / "swin-digits")
    parser.add_argument("--canvases", type=int, default=64)
    parser.add_argument("--keeps", type=float, nargs="*", default=[], help="of all blocks, below 1")
    parser.add_argument("--plans", type=Path, nargs="*", default=[], help="plan files")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="instead of the model folder")
    main(**vars(parser.parse_args()))
