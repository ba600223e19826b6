"""Videos and images: arrays of frames, judged by PSNR, SSIM, flicker and a classifier."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel.errors import AccelError
from accel.metrics import Classifier, capped, flicker, psnr, ssim
from accel.pipelines.measures import Column, Measure, Quality, above_front, mean_and_worst, number
from accel.pipelines.model_files import files_of
from accel.pipelines.output import Judged, Output, Picture
from accel.pipelines.paths import find_path
from accel.pipelines.trade_off import CAP_DB, FLOOR_DB
from accel.pipelines.video_files import checked_path, load_frames, save_frames, write_video
from accel.recipes import Recipe
from accel.untrusted import check_whole

__all__ = ["PSNR", "FramesOutput"]

PSNR = Quality(
    label="PSNR against dense (dB)",
    of=lambda arm: arm["psnr"]["mean"] if arm.get("psnr") else None,
    worst=lambda arm: arm["psnr"]["worst"] if arm.get("psnr") else None,
    name="psnr",
    short="PSNR",
    unit="dB",
    floor=FLOOR_DB,
    cap=CAP_DB,
)
SPEED_UP = Measure("speed-up over the fastest dense run (times)", lambda arm: arm.get("speedup"))


class FramesOutput(Output):
    """Frames [frames, height, width, 3] in [0, 1]; an image is one frame."""

    name = "frames"
    one, many = "video", "videos"
    quality = PSNR
    pictures = (
        Picture(
            "trade-off.svg",
            SPEED_UP,
            PSNR,
            "A mark is the mean over all videos, the whisker goes down to the worst one.",
        ),
    )
    told = ("psnr", "ssim", "flicker", "reads")
    measured = "Quality is that of the 8-bit frames."
    output_type = "np"

    def check(self, config: Any) -> None:
        for place, bounds in dict(config.places).items():
            whole = len(bounds) == 4 and all(type(b) is int and b >= 0 for b in bounds)
            if not (whole and bounds[0] < bounds[2] and bounds[1] < bounds[3]):
                raise AccelError(
                    f"model.places.{place} must be [top, left, bottom, right] in pixels, got"
                    f" {list(bounds)}"
                )
        check_whole("model.call.num_inference_steps", config.call.get("num_inference_steps"), 1)

    def serves(self, recipe: Recipe) -> bool:
        return recipe.frames

    def steps(self, call: Mapping[str, Any]) -> int:
        return int(call["num_inference_steps"])

    def shortened(self, call: Mapping[str, Any], steps: int) -> dict[str, Any]:
        return {"num_inference_steps": steps}

    def call(self, pipe: Any, call: Mapping[str, Any]) -> dict[str, Any]:
        return dict(call)

    def read(self, made: Any) -> NDArray[np.float32]:
        frames = made.frames[0] if "frames" in made else made.images[:1]
        return np.asarray(frames, dtype=np.float32)

    def dense_steps(self, schedule: Any, steps: int) -> list[bool]:
        return [schedule.phase(step, steps).dense for step in range(steps)]

    def place(self, session: Any, steps: int) -> dict[str, Any]:
        grids = session.run.layouts.grids
        grid = max((list(g[0]) for g in grids if g), key=prod, default=None)
        return {"grid": grid, "steps": steps}

    def save(self, path: Path, generation: Any, host: Any, prompt: str) -> None:
        save_frames(path, generation)

    def load(self, path: Path) -> NDArray[np.float32]:
        return load_frames(path)

    def judges(self, config: Any) -> str:
        classifier = config.classifier
        judge = json.dumps(files_of(find_path(classifier)) if classifier else "")
        if config.places:
            judge += json.dumps({k: list(v) for k, v in config.places.items()}, sort_keys=True)
        return hashlib.sha256(judge.encode()).hexdigest()[:16]

    def judge(self, config: Any) -> Classifier | None:
        path = find_path(config.classifier)
        if not config.classifier or not Path(path).exists():
            return None
        return Classifier.load(path, {n: (t, l, b, r) for n, (t, l, b, r) in config.places.items()})

    def judged(self, generation: Any, dense: Any, prompt: str, judge: Any) -> dict[str, Any]:
        quality = {
            "flicker": flicker(generation),
            "reads": None if judge is None else judge.reads(generation, prompt),
        }
        if dense is not None:
            quality["psnr"] = capped(psnr(generation, dense))
            quality["ssim"] = ssim(generation, dense)
        return quality

    def results(
        self, found: Judged, dense: Judged, records: Mapping[int, Sequence[Mapping[str, Any]]]
    ) -> dict[str, Any]:
        judged = [q for q in found if q is not None]
        flickers = mean(q["flicker"] for q in judged) if judged else None
        beside = [d["flicker"] for q, d in zip(found, dense, strict=True) if q and d]
        steady = mean(beside) if beside else None
        reads = [q["reads"] for q in judged if q["reads"] is not None]
        return {
            "psnr": spanned(judged, "psnr"),
            "ssim": spanned(judged, "ssim"),
            "flicker": flickers,
            "flicker_ratio": flickers / steady if flickers is not None and steady else None,
            "accuracy": mean(reads) if reads else None,
        }

    def columns_of_quality(self, arms: Mapping[str, Any]) -> tuple[Column, ...]:
        return COLUMNS

    def words(self, settings: Mapping[str, Any]) -> tuple[str, ...]:
        call = settings.get("call") or {}
        frames = f"{call['num_frames']} frames" if "num_frames" in call else "images"
        return (
            f"{settings['steps']} steps",
            f"{frames} of {call.get('width')} x {call.get('height')}",
        )

    def prompts_in_words(self, prompts: Sequence[str]) -> str:
        return "; ".join(prompts)

    def tiles(self, arm: Mapping[str, Any]) -> list[tuple[str, str]]:
        if not arm.get("psnr"):
            return []
        return [
            (f"{arm['psnr']['mean']:.1f} dB", "mean PSNR against dense"),
            (f"{arm['psnr']['worst']:.1f} dB", "worst video"),
        ]

    def sections(self, folder: Path, results: Mapping[str, Any], shown: str) -> list[str]:
        from accel.pipelines.report_frames import videos

        return videos(folder, results, shown)

    def checked_path(self, out: str | None) -> Path | None:
        return None if out is None else checked_path(out)

    def write(self, path: Path | None, generation: Any, *, fps: int | float, min_side: int) -> str:
        path = path or Path("image.png" if len(generation) == 1 else "video.gif")
        write_video(path, generation, fps=fps, min_side=min_side)
        frames, height, width, _ = generation.shape
        count = "one frame" if frames == 1 else f"{frames} frames"
        return f"{path}: {count} of {width} x {height}"


def spanned(judged: Sequence[Mapping[str, Any]], name: str) -> dict[str, float] | None:
    """Mean and least of what was judged, where it was."""
    values = [q[name] for q in judged if q.get(name) is not None]
    return {"mean": mean(values), "worst": min(values)} if values else None


COLUMNS = (
    Column(
        "PSNR dB",
        "against dense with the same prompt and noise: mean (worst)",
        mean_and_worst(".1f", "psnr"),
    ),
    Column(
        "front dB",
        "what the (first) front is worth at the measured time of this arm, above this arm's PSNR:"
        " linear between those of its points that no other beats, and that of the slowest from"
        " there on",
        above_front,
    ),
    Column("SSIM", "structural similarity to dense: mean (worst)", mean_and_worst(".3f", "ssim")),
    Column(
        "flicker",
        "change between frames that motion does not explain, as a multiple of dense; lower is"
        " steadier",
        number("{:.2f}x", "flicker_ratio"),
    ),
    Column(
        "accuracy",
        "share of what the prompts name that a classifier sees",
        number("{:.0%}", "accuracy"),
    ),
)
