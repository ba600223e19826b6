"""One arm of a comparison: a process with its own pipeline that obeys commands, a JSON line each.

    python -m accel.pipelines.compare_arm arms/sparsed/spec.json

On stdin {"do": "start"}, {"do": "generate", ...}, {"do": "look", ...}; on stdout one answer each,
{"ok": ...} or {"error": ...}. Whatever libraries print goes to stderr. It ends with its stdin, in
the middle of a generation too: a comparison that was killed leaves nobody behind.
"""

import json
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import torch

from accel.cost import dense_speedup
from accel.errors import AccelError
from accel.pipelines.adapters import by_denoiser, denoisers_of
from accel.pipelines.enable import disable, enable, session_of, summary
from accel.pipelines.host import Host
from accel.pipelines.look import look
from accel.pipelines.model_settings import model_config
from accel.pipelines.pricing import load_or_measure_baseline, priced, warm_up_steps
from accel.pipelines.provenance import device_name
from accel.pipelines.video_files import save_frames
from accel.plan import Plan
from accel.schedule import Schedule

COMMANDS = ("start", "price", "generate", "look")


class Arm:
    """The pipeline of one arm. plan: a plan file, the name of a recipe, or None for dense."""

    def __init__(self, model: dict[str, Any], plan: str | None) -> None:
        self._config = model_config(model)
        self._plan = plan
        self._host: Host | None = None

    @property
    def host(self) -> Host:
        if self._host is None:
            raise AccelError("the arm was not started")
        return self._host

    @property
    def schedule(self) -> Schedule:
        """When steps are dense; always, without a plan."""
        plans = self.plans
        return plans[0].schedule if plans else Schedule(dense_start=1.0)

    @property
    def plans(self) -> list[Plan]:
        if self._plan is None:
            return []
        return [session_of(model).plan for model in denoisers_of(self.host.pipe)]

    def start(self) -> dict[str, Any]:
        """Load, enable, and generate once with few steps, a sparse one among them."""
        begun = time.perf_counter()
        self._host = Host(self._config)
        if self._plan is not None:
            enable(self._host.pipe, self._plan)
        loaded = time.perf_counter()
        steps = warm_up_steps(self.schedule, self.host.steps)
        self.host.generate(self._config.prompts[0], 0, num_inference_steps=steps)
        reset_peak_memory(self.host.device)
        plan = self.plans[0] if self.plans else None
        return {
            "load_s": loaded - begun,
            "warm_up_s": time.perf_counter() - loaded,
            "device": device_name(self.host.device),
            "plan": None if plan is None else plan.name,
            "digest": None if plan is None else plan.digest,
            **predictions(plan),
        }

    def price(self, folder: str) -> dict[str, Any]:
        """Predict this arm's speed from costs measured here; its plans go on with the prediction.

        Sites at which dense is predicted to be faster then run dense, and dense calls go to accel's
        own kernel where that is. folder: keeps the timed dense generation and the costs, for all
        arms.
        """
        plans = self.plans
        disable(self.host.pipe)
        path = Path(folder) / "baseline.json"
        baseline = load_or_measure_baseline(self.host, self._config.calibration[0], 0, path)
        plans = [priced(self.host, plan, baseline, Path(folder)) for plan in plans]
        enable(self.host.pipe, by_denoiser(self.host.pipe, plans), check=False)
        reset_peak_memory(self.host.device)
        return {
            "attention_share": baseline.total_share,
            **predictions(plans[0]),
        }

    def generate(
        self, prompt: str, seed: int, steps: int | None = None, save: str | None = None
    ) -> dict[str, Any]:
        """One generation with its times in seconds; its frames go to the file `save`."""
        steps = self.host.steps if steps is None else steps
        clock = StepClock(self.host.device)
        begun = clock.now()
        video = self.host.generate(
            prompt, seed, num_inference_steps=steps, callback_on_step_end=clock
        )
        seconds = clock.now() - begun
        if save is not None:
            save_frames(save, video)
        dense = [self.schedule.phase(step, steps).dense for step in range(1, steps)]
        return {
            "seconds": seconds,
            "step_seconds": {
                "all": _median(clock.steps),
                "dense": _median(s for s, d in zip(clock.steps, dense, strict=False) if d),
                "sparse": _median(s for s, d in zip(clock.steps, dense, strict=False) if not d),
            },
            "peak_memory_bytes": peak_memory_bytes(self.host.device),
            "summary": None if self._plan is None else summary(self.host.pipe).to_dict(),
        }

    def look(self, prompt: str, seed: int, save: str) -> dict[str, Any]:
        """Attention maps of a few heads with what the plan keeps of them; see `look`."""
        return look(self.host, self.plans, prompt, seed, Path(save))


def predictions(plan: Plan | None) -> dict[str, Any]:
    """Speed-ups over the host's dense that a priced plan expects: its own, and dense recipes'."""
    found: dict[str, Any] = {"predicted_speedup": None, "predicted_dense": {}}
    if plan is not None and "speedup" in plan.expected:
        found["predicted_speedup"] = plan.expected["speedup"]
        for precision in plan.expected.get("dense_ratio", ()):
            found["predicted_dense"][precision] = dense_speedup(plan.expected, precision)
    return found


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


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return median(found) if found else None


def serve(arm: Any, lines: Iterable[str], say: Callable[[str], Any]) -> None:
    """Obey every line and `say` the answer; an error is one too, and the arm goes on."""
    for line in lines:
        command = json.loads(line)
        name = command.pop("do")
        try:
            if name not in COMMANDS:
                raise AccelError(f"an arm does {', '.join(COMMANDS)}, not {name!r}")
            do: Callable[..., dict[str, Any]] = getattr(arm, name)
            answer: dict[str, Any] = {"ok": do(**command)}
        except Exception as error:  # whatever a model raises is reported, and ends this arm alone
            traceback.print_exc()
            known = isinstance(error, AccelError)
            answer = {"error": str(error) if known else f"{type(error).__name__}: {error}"}
        say(json.dumps(answer))


def until_closed(stream: Iterable[str]) -> Iterator[str]:
    """The lines of `stream`; where it ends, so does this process, whatever it is doing."""
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in stream:
            lines.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield lines.get()


def main() -> None:
    """Serve the arm that the specification file describes."""
    answers = os.fdopen(os.dup(1), "w")  # what libraries print shall not be taken for one
    os.dup2(2, 1)
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    serve(
        Arm(spec["model"], spec["plan"]),
        until_closed(sys.stdin),
        lambda text: print(text, file=answers, flush=True),
    )


if __name__ == "__main__":
    main()
