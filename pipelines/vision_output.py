"""What is seen in images: classes of images or of their pixels, judged by what is right, and by
dense.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from accel.errors import AccelError
from accel.files import write_atomically
from accel.pipelines.frames_output import spanned
from accel.pipelines.output import Judged, Output
from accel.pipelines.vision import fuse_attention
from accel.pipelines.vision_columns import PICTURES, QUALITY, SPEED
from accel.pipelines.vision_csv import as_csv
from accel.pipelines.vision_images import ImageFolder, folder_of
from accel.pipelines.vision_scores import Judge, scores_of
from accel.recipes import Recipe
from accel.untrusted import check_whole

__all__ = ["ClassesOutput", "Seen"]

WINDOWS = "windows-"  # before the names of stages, in a file


@dataclass(frozen=True)
class Seen:
    """Classes of a group of images, [images] or [images, height, width]; windows: which the plan
    keeps of them, by stage, [images, rows, columns].
    """

    labels: NDArray[np.int64]
    calls: int = 1
    windows: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)


class ClassesOutput(Output):
    """Classes that a vision model finds (`accel.pipelines.vision.VisionPipeline`)."""

    name = "vision"
    one, many = "group", "groups"
    code = ("image_models", "vision", "vision_scores")
    baselines = ("dense", "fused", "compiled")
    names_of_dense = ("eager", "dense")
    first = None  # mIoU and top-1 are of all images
    repeats = 3
    scales = True
    caches = False
    priced = False
    mapped = False
    pictures = PICTURES
    quality = PICTURES[0].quality
    told = ("agreement",)
    columns_of_speed = SPEED
    measured = (
        "Images are read beforehand; what is timed begins with their pixels and ends with classes."
        " mIoU is of all images together, and agreement the share of pixels, of a classifier of"
        " images, that have the class that dense found. Dense is the model as timm makes it"
        " (eager attention in Swin), fused has scaled_dot_product_attention wherever timm has it"
        " (TIMM_FUSED_ATTN=2), compiled is that with torch.compile, and scaled-0.5 the fastest of"
        " these on images of half the size, with its answer brought back. Plans run on the fused"
        " model."
    )
    output_type = "labels"

    def check(self, config: Any) -> None:
        check_whole("model.call.batch_size", config.call.get("batch_size"), 1)
        folders = [Path(p).name for p in (config.images, config.calibration_images) if p]
        if len(set(folders)) < len(folders):
            raise AccelError(
                f"model.images and model.calibration_images are both called {folders[0]!r}; prompts"
                " tell them by their names, so give them two"
            )

    def asked(self, config: Any, name: str) -> tuple[str, ...]:
        path = {"prompts": config.images, "calibration": config.calibration_images}[name]
        return ImageFolder.of(path).groups(config.call.get("batch_size", 1)) if path else ()

    def stands_for(self, config: Any, prompt: str) -> str:
        folder, group = _folder(config, prompt)
        return f"{prompt} {folder.digest(group)}"

    def given(self, host: Any, prompt: str) -> Any:
        """A tensor where the model computes, of images of one size; else the images. The path of
        an image stands for itself, where it is no comparison.
        """
        if Path(prompt).suffix and Path(prompt).is_file():
            return [prompt]
        folder, group = _folder(host.config, prompt)
        images = folder.images(group)
        if len({image.size for image in images}) > 1:
            return images
        pixels = np.stack([np.asarray(image) for image in images]).transpose(0, 3, 1, 2)
        return torch.from_numpy(np.ascontiguousarray(pixels)).to(host.device)

    def setup(self, name: str, options: Mapping[str, Any]) -> dict[str, Any] | None:
        fused: dict[str, Any] = {"fused": True}
        return {"fused": fused, "compiled": {**fused, "compile": dict(options)}}.get(name)

    def set_up(self, host: Any, setup: Mapping[str, Any]) -> None:
        if setup.get("fused"):
            fuse_attention(host.pipe.model)
        if "scale" in setup:
            host.pipe.set_input_size(*_smaller(host, setup["scale"]))
        if "compile" in setup:
            host.pipe.compile(**setup["compile"])

    def about(self, host: Any) -> dict[str, Any]:
        model = host.pipe.model
        size = host.pipe.size or tuple(host.pipe.config.size or ()) or None
        return {
            "parameters": sum(weight.numel() for weight in model.parameters()),
            "image_size": None if size is None else list(size),
            "task": host.pipe.config.task,
            "architecture": host.pipe.config.architecture,
        }

    def serves(self, recipe: Recipe) -> bool:
        return recipe.vision

    def steps(self, call: Mapping[str, Any]) -> int:
        return 1

    def shortened(self, call: Mapping[str, Any], steps: int) -> dict[str, Any]:
        return {}

    def call(self, pipe: Any, call: Mapping[str, Any]) -> dict[str, Any]:
        return dict(call)

    def callback(self, done: Any) -> dict[str, Any]:
        return {}

    def read(self, made: Any) -> Seen:
        return Seen(made.labels.numpy(), made.calls)

    def dense_steps(self, schedule: Any, steps: int) -> list[bool]:
        return []

    def place(self, session: Any, steps: int) -> dict[str, Any]:
        grids = session.run.layouts.grids
        return {
            "grid": max((list(g[0]) for g in grids if g), key=prod, default=None),
            "steps": steps,
        }

    def counts(self, generation: Seen) -> dict[str, Any]:
        return {"images": len(generation.labels), "calls": generation.calls}

    def save(self, path: Path, generation: Seen, host: Any, prompt: str) -> None:
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {f"{WINDOWS}{k}": v for k, v in _windows(host, prompt).items()}
        np.savez_compressed(
            buffer, labels=generation.labels.astype(np.uint16), calls=generation.calls, **arrays
        )
        write_atomically(path, buffer.getvalue())

    def load(self, path: Path) -> Seen:
        with np.load(path, allow_pickle=False) as file:
            windows = {
                key.removeprefix(WINDOWS): file[key] for key in file if key.startswith(WINDOWS)
            }
            return Seen(file["labels"].astype(np.int64), int(file["calls"]), windows)

    def judges(self, config: Any) -> str:
        return ImageFolder.of(config.images).answers if config.images else ""

    def judge(self, config: Any) -> Judge:
        return Judge(config)

    def judged(
        self, generation: Seen, dense: Seen | None, prompt: str, judge: Any
    ) -> dict[str, Any]:
        alike = None if dense is None else float((generation.labels == dense.labels).mean())
        return {
            "agreement": alike,
            "counts": judge.counts(generation.labels, prompt),
            "classes": list(judge.model.classes),
            "task": judge.model.task,
        }

    def results(
        self, found: Judged, dense: Judged, records: Mapping[int, Sequence[Mapping[str, Any]]]
    ) -> dict[str, Any]:
        beside = [(q, d) for q, d in zip(found, dense, strict=True) if q and d]
        scores, own = _scores([q for q in found if q]), _scores([q for q, _ in beside])
        dense_score = _scores([d for _, d in beside])["score"]
        change = None if own["score"] is None or dense_score is None else own["score"] - dense_score

        def middle(of: Any) -> float | None:
            """Median over groups of the median over what was measured of each."""
            values = [median(map(of, made)) for made in records.values() if made]
            return float(median(values)) if values else None

        return {
            "images_per_second": middle(lambda r: r["images"] / r["seconds"]),
            "batch_seconds": middle(lambda r: r["seconds"] / r["calls"]),
            **scores,
            "score_change": change,
            "agreement": spanned([q for q in found if q], "agreement"),
        }

    def columns_of_quality(self, arms: Mapping[str, Any]) -> Any:
        return QUALITY

    def words(self, settings: Mapping[str, Any]) -> tuple[str, ...]:
        batch = settings["call"]["batch_size"]
        return ("images one by one" if batch == 1 else f"images in batches of {batch}",)

    def prompts_in_words(self, prompts: Sequence[str]) -> str:
        return "images " + ", ".join(prompts)

    def tiles(self, arm: Mapping[str, Any]) -> list[tuple[str, str]]:
        tiles = []
        if arm.get("images_per_second"):
            tiles.append((f"{arm['images_per_second']:.1f}", "images a second"))
        if arm.get("score") is not None:
            what = "top-1" if arm["top1"] is not None else "mIoU"
            tiles.append((f"{arm['score']:.1%}", what))
        if arm.get("agreement"):
            tiles.append((f"{arm['agreement']['mean']:.1%}", "classed as dense has it"))
        return tiles

    def sections(self, folder: Path, results: Mapping[str, Any], shown: str) -> list[str]:
        from accel.pipelines.report_vision import by_class, pictures

        return [by_class(results), *pictures(folder, results, shown)]

    def files(self, results: Mapping[str, Any]) -> dict[str, str]:
        return {"results.csv": as_csv(results)}

    def checked_path(self, out: str | None) -> Path | None:
        if out is not None and Path(out).suffix.lower() != ".png":
            raise AccelError(f"a map of classes is not written to {out!r}; write 'classes.png'")
        return None if out is None else Path(out)

    def write(self, path: Path | None, generation: Seen, *, fps: int | float, min_side: int) -> str:
        """A map in colours, one after the other from top to bottom; of a classifier nothing but the
        numbers of classes.
        """
        labels = generation.labels
        if labels.ndim == 1 or path is None:
            numbers = labels if labels.ndim == 1 else np.unique(labels)
            return f"classes {', '.join(map(str, numbers.tolist()))}"
        from accel.pipelines.report_vision import coloured, png

        whole = labels.reshape(-1, labels.shape[-1])
        write_atomically(path, png(coloured(whole, int(whole.max()) + 1)))
        found = ", ".join(map(str, np.unique(whole).tolist()))
        return f"{path}: classes {found} in {len(labels)} images"


def _folder(config: Any, prompt: str) -> tuple[ImageFolder, str]:
    return folder_of(prompt, config.images, config.calibration_images)


def _smaller(host: Any, scale: float) -> tuple[int, int]:
    """The input's size times `scale`, in whole patches."""
    size = host.pipe.size
    if size is None:
        pixels = host.kind.given(host, host.config.prompts[0])
        if not isinstance(pixels, torch.Tensor):
            raise AccelError("images of many sizes are not scaled; set a size in config.json")
        size = tuple(pixels.shape[2:])
    patch = host.pipe.patch
    height, width = (max(1, round(side * scale / patch)) * patch for side in size)
    return height, width


def _windows(host: Any, prompt: str) -> dict[str, NDArray[np.bool_]]:
    """Which windows the plan keeps, by stage, [images, rows, columns]."""
    from accel.pipelines.adapters import denoisers_of
    from accel.pipelines.enable import plan_of, session_of
    from accel.pipelines.window_blocks import kept_windows

    (model,) = denoisers_of(host.pipe)
    plan = plan_of(model)
    if plan is None or plan.windows is None:
        return {}
    images, batch = host.kind.given(host, prompt), host.config.call["batch_size"]
    parts: dict[str, list[NDArray[np.bool_]]] = {}
    for start in range(0, len(images), batch):
        host.pipe(images[start : start + batch], batch_size=batch)
        for stage, kept in kept_windows(session_of(model)).items():
            parts.setdefault(stage, []).append(kept.cpu().numpy())
    return {stage: np.concatenate(kept) for stage, kept in parts.items()}


def _scores(judged: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    counts = [q["counts"] for q in judged if q["counts"] is not None]
    classes, task = (judged[0]["classes"], judged[0]["task"]) if judged else ((), "")
    told = scores_of(counts, classes)
    segments = task == "segmentation"
    score = told["miou"] if segments else told["right"]
    return {
        "score": score,
        "miou": told["miou"] if segments else None,
        "top1": None if segments else told["right"],
        "pixel_accuracy": told["right"] if segments else None,
        "iou": told["iou"] if segments else {},
    }
