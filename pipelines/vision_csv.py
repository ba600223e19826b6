"""Results of a comparison as a table of comma-separated values, as timm's own scripts name them."""

import csv
import io
from collections.abc import Mapping
from typing import Any

__all__ = ["as_csv"]

COLUMNS = (
    *("model", "arm", "kind", "infer_samples_per_sec", "infer_step_time", "infer_batch_size"),
    *("infer_img_size", "precision", "speedup", "compile_s", "peak_memory_mib", "miou", "top1"),
    *("top1_err", "agreement", "keep", "param_count"),
)


def as_csv(results: Mapping[str, Any]) -> str:
    """A row for every arm, with the columns of timm's benchmark and validate scripts."""
    buffer = io.StringIO()
    settings = results["settings"]
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for name, arm in results["arms"].items():
        about, top1 = arm["about"], arm["top1"]
        size = about.get("image_size")
        memory = arm["peak_memory_bytes"]
        row = {
            "model": settings["model"],
            "arm": name,
            "kind": arm["kind"],
            "infer_samples_per_sec": _rounded(arm["images_per_second"], 2),
            "infer_step_time": _rounded(arm["batch_seconds"], 3, 1000.0),
            "infer_batch_size": settings["call"]["batch_size"],
            "infer_img_size": None if size is None else "x".join(map(str, size)),
            "precision": settings["dtype"],
            "speedup": _rounded(arm["speedup"], 3),
            "compile_s": _rounded(arm["compile_seconds"], 2),
            "peak_memory_mib": _rounded(memory, 1, 2**-20),
            "miou": _rounded(arm["miou"], 3, 100.0),
            "top1": _rounded(top1, 3, 100.0),
            "top1_err": None if top1 is None else _rounded(1 - top1, 3, 100.0),
            "agreement": _rounded((arm["agreement"] or {}).get("mean"), 3, 100.0),
            "keep": _rounded(arm["keep"], 4),
            "param_count": _rounded(about.get("parameters"), 2, 1e-6),
        }
        writer.writerow(row)
    return buffer.getvalue()


def _rounded(value: float | None, digits: int, times: float = 1.0) -> float | None:
    return None if value is None else round(times * value, digits)
