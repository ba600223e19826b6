"""From measurements to results: paired speed-ups, quality against dense, and the table of both."""

from collections.abc import Sequence
from statistics import mean, median
from typing import Any

import numpy as np

from accel.metrics import Classifier, capped, flicker, psnr, ssim
from accel.pipelines.compare_book import ArmSpec, Book, Job
from accel.pipelines.compare_settings import DENSE
from accel.pipelines.video_files import load_frames
from accel.records import DENSE_LABEL


def measure_quality(book: Book, arms: Sequence[ArmSpec], classifier: Classifier | None) -> None:
    """Judge every video that was not judged yet and whose dense counterpart is there."""
    for prompt in range(len(book.prompts)):
        dense = Job(DENSE, prompt, 0)
        if book.result(dense) is None:
            continue
        reference = None
        for arm in arms:
            name = f"p{prompt:02d}-quality"
            done = book.read(arm, name, prompt)
            if book.result(Job(arm, prompt, 0)) is None or (
                done is not None and (done["reads"] is not None or classifier is None)
            ):
                continue
            if reference is None:
                reference = load_frames(book.video(DENSE, prompt))
            video = load_frames(book.video(arm, prompt))
            text = book.prompts[prompt]
            quality = {
                "flicker": flicker(video),
                "reads": None if classifier is None else classifier.reads(video, text),
            }
            if arm != DENSE:
                quality["psnr"] = capped(psnr(video, reference))
                quality["ssim"] = ssim(video, reference)
            book.write(arm, name, quality, prompt)


def results_of(book: Book, arm: ArmSpec, jobs: Sequence[Job]) -> dict[str, Any]:
    """Everything measured of one arm; a field is None where nothing was measured for it."""
    done = {}
    for job in jobs:
        record = book.result(job) if job.arm == arm else None
        if record is not None:
            done[job.prompt, job.round] = record
    found = [book.read(arm, f"p{p:02d}-quality", p) for p in range(len(book.prompts))]
    judged = [q for q in found if q is not None]
    start = (book.read(arm, "start") or {}) | (book.read(arm, "price") or {})
    summary = next((r["summary"] for r in reversed(done.values()) if r["summary"]), None)
    reads = [q["reads"] for q in judged if q["reads"] is not None]
    result: dict[str, Any] = {
        "predicted_speedup": start.get("predicted_speedup"),
        "seconds": spread([r["seconds"] for r in done.values()]),
        "step_seconds": {
            phase: middle([r["step_seconds"][phase] for r in done.values()])
            for phase in ("all", "dense", "sparse")
        },
        "load_seconds": start.get("load_s"),
        "warm_up_seconds": start.get("warm_up_s"),
        "peak_memory_bytes": max((r["peak_memory_bytes"] for r in done.values()), default=None),
        "psnr": _mean_and_worst(judged, "psnr"),
        "ssim": _mean_and_worst(judged, "ssim"),
        "flicker": mean(q["flicker"] for q in judged) if judged else None,
        "flicker_ratio": None,
        "accuracy": mean(reads) if reads else None,
        "keep": 1.0 if arm == DENSE else keep_of(summary),
        "plan": start.get("plan"),
        "digest": start.get("digest"),
        "notices": {} if summary is None else summary["notices"],
        "summary": summary,
    }
    return result | _against_dense(book, done, result)


def _against_dense(
    book: Book, done: dict[tuple[int, int], dict[str, Any]], result: dict[str, Any]
) -> dict[str, Any]:
    """The paired speed-up, and flicker as a multiple of dense.

    Pairs of one sitting are used where there are any; else pairs whose two sides were measured at
    different times, and the result says so.
    """
    pairs = []
    ratios = []
    for (prompt, number), record in done.items():
        dense = book.result(Job(DENSE, prompt, number))
        if dense is not None:
            together = dense["sitting"] == record["sitting"]
            pairs.append((together, dense["seconds"] / record["seconds"]))
        own = book.read(DENSE, f"p{prompt:02d}-quality", prompt)
        if number == 0 and own is not None and own["flicker"] > 0:
            ratios.append(own["flicker"])
    together = [ratio for same, ratio in pairs if same]
    used = together or [ratio for _, ratio in pairs]
    flicker_of = result["flicker"]
    return {
        "speedup": middle(used),
        "pairs": len(used),
        "paired_in_one_sitting": bool(together),
        "flicker_ratio": flicker_of / mean(ratios) if ratios and flicker_of is not None else None,
    }


def keep_of(summary: dict[str, Any] | None) -> float | None:
    """Mean fraction of blocks computed over all calls of sparse steps."""
    rows = [] if summary is None else [r for r in summary["rows"] if r["phase"] != DENSE_LABEL]
    calls = sum(r["calls"] for r in rows)
    return sum(r["keep"] * r["calls"] for r in rows) / calls if calls else None


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Median with the 20th and 80th percentile."""
    if not values:
        return None
    p20, p50, p80 = (float(p) for p in np.percentile(values, (20, 50, 80)))
    return {"median": p50, "p20": p20, "p80": p80}


def middle(values: Sequence[float | None]) -> float | None:
    """Median of what is there."""
    found = [v for v in values if v is not None]
    return median(found) if found else None


def _mean_and_worst(judged: Sequence[dict[str, Any]], name: str) -> dict[str, float] | None:
    values = [q[name] for q in judged if name in q]
    return {"mean": mean(values), "worst": min(values)} if values else None
