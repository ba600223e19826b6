"""What one generation takes: the seconds of its steps, and the memory at its peak."""

import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import torch


class StepClock:
    """Diffusers' `callback_on_step_end`: the time of every step but the first.

    The first step is left out because nothing marks where the text encoder ends.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last: float | None = None
        self.steps: list[float] = []

    def __call__(self, pipe: Any, step: int, timestep: Any, state: dict[str, Any]) -> dict:
        """Called by the pipeline `pipe` after every step; hands back its `state` unchanged."""
        now = self.now()
        if self._last is not None:
            self.steps.append(now - self._last)
        self._last = now
        return state

    def now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def peak_memory_bytes(device: torch.device) -> int:
    """Peak of the device's allocations; on the CPU, of the resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count the parent's memory before the start too
        line = next(s for s in status.read_text().splitlines() if s.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory_bytes` begin anew: what was loaded and measured before shall not count."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):  # elsewhere than on Linux the peak is that of the whole process
        Path("/proc/self/clear_refs").write_text("5")


def middle_of(values: Iterable[float]) -> float | None:
    found = list(values)
    return median(found) if found else None
