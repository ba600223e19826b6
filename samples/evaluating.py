"""What the evaluations of the sample pipelines share: results kept in files, and times."""

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import DiffusionPipeline

from accel.pipelines.video_files import load_frames, save_frames

__all__ = ["kept_frames", "median_seconds", "weights_digest"]


def weights_digest(pipe: DiffusionPipeline, parts: Sequence[str]) -> str:
    """Sixteen hexadecimal digits that change with any weight of these parts or the scheduler."""
    made = hashlib.sha256(json.dumps(dict(pipe.scheduler.config), default=str).encode())
    for part in parts:
        for name, weight in sorted(getattr(pipe, part).state_dict().items()):
            made.update(name.encode() + weight.contiguous().numpy().tobytes())
    return made.hexdigest()[:16]


def kept_frames(folder: Path, words: Sequence[Any], make: Callable[[], np.ndarray]) -> np.ndarray:
    """Frames `[frames, h, w, 3]` of `make`, or the file that an earlier call with equal words kept
    in `folder`.

    They have 8 bits per channel either way, so that a resumed evaluation equals a whole one.
    """
    name = hashlib.sha256(json.dumps(list(words)).encode()).hexdigest()[:16]
    path = folder / f"{name}.npz"
    if not path.exists():
        save_frames(path, make())
    return load_frames(path)


def median_seconds(call: Callable[[], object], repeats: int = 5) -> float:
    """Median time of a call, after one that does not count."""
    call()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)
