"""Whole generations with plans beside dense ones: seconds and PSNR, kept plan by plan and prompt by
prompt, so that nothing is generated twice.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

from tqdm import tqdm

from accel.files import write_atomically
from accel.pipelines.cost_files import kept
from accel.pipelines.enable import enabled
from accel.pipelines.host import Host, Video
from accel.pipelines.pricing import warm_up_steps
from accel.plan import Plan
from accel.schedule import Schedule
from accel.search.known import read_known
from accel.search.objective import Objective

ENTRY = {"seconds", "dense_seconds", "psnr"}


@dataclass(frozen=True, slots=True)
class Measured:
    """What a plan was measured at: seconds of a generation (median over the prompts), times the
    host's dense generation beside it (median of ratios), PSNR in dB (mean), and that by prompt.
    """

    seconds: float
    speedup: float
    psnr: float
    by_prompt: tuple[float, ...]


class Bench:
    """Measures plans on the calibration prompts. reference: of fidelity `whole`."""

    def __init__(self, host: Host, reference: Objective, path: Path, seed: int) -> None:
        self._host = host
        self._reference = reference
        self._path = path
        self._seed = seed
        self._known: dict[str, dict[str, dict[str, float]]] = (
            kept(path, lambda p: read_known(p, ENTRY)) or {}
        )

    def measure(
        self, plans: Mapping[str, Plan], prompts: Sequence[str], what: str
    ) -> dict[str, Measured]:
        """By name, as far as it is not known yet.

        The plans and a dense run take turns, prompt by prompt, every other time backwards; each was
        warmed up by a short run before.
        """
        todo = {
            prompt: {n: p for n, p in plans.items() if prompt not in self._known.get(p.digest, {})}
            for prompt in prompts
        }
        count = sum(len(missing) + 1 for missing in todo.values() if missing)
        with tqdm(total=count, desc=what, unit="video", disable=not count) as bar:
            warm: set[str | None] = set()
            for turn, (prompt, missing) in enumerate(todo.items()):
                if missing:
                    self._turn(prompt, missing, turn % 2 == 1, warm, bar)
        return {name: self._of(plan, prompts) for name, plan in plans.items()}

    def _turn(
        self,
        prompt: str,
        plans: Mapping[str, Plan],
        backwards: bool,
        warm: set[str | None],
        bar: tqdm,
    ) -> None:
        seconds: dict[str | None, float] = {}
        videos: dict[str | None, Video] = {}
        arms: list[tuple[str | None, Plan | None]] = [(None, None), *plans.items()]
        for name, plan in arms[::-1] if backwards else arms:
            if name not in warm:
                self._generate(plan, prompt, short=True)
                warm.add(name)
            videos[name], seconds[name] = self._generate(plan, prompt)
            bar.update()
        dense = self._reference.dense(prompt, known=videos[None])
        for name, plan in plans.items():
            self._known.setdefault(plan.digest, {})[prompt] = {
                "seconds": seconds[name],
                "dense_seconds": seconds[None],
                "psnr": self._reference.quality(videos[name], dense),
            }
        write_atomically(self._path, json.dumps(self._known, indent=1))

    def _generate(self, plan: Plan | None, prompt: str, short: bool = False) -> tuple[Video, float]:
        """A generation with a plan, or by the untouched host, and its seconds."""
        steps = self._host.steps
        if short:
            schedule = Schedule(dense_start=1.0) if plan is None else plan.schedule
            steps = warm_up_steps(schedule, steps)
        start = time.perf_counter()
        if plan is None:
            video = self._host.generate(prompt, self._seed, num_inference_steps=steps)
        else:
            with enabled(self._host.pipe, plan, check=False, guard=False):
                start = time.perf_counter()
                video = self._host.generate(prompt, self._seed, num_inference_steps=steps)
        return video, time.perf_counter() - start

    def _of(self, plan: Plan, prompts: Sequence[str]) -> Measured:
        found = [self._known[plan.digest][prompt] for prompt in prompts]
        return Measured(
            seconds=median(f["seconds"] for f in found),
            speedup=median(f["dense_seconds"] / f["seconds"] for f in found),
            psnr=mean(f["psnr"] for f in found),
            by_prompt=tuple(f["psnr"] for f in found),
        )
