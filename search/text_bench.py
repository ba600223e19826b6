"""Whole generations of a text model on tasks, with plans and without: seconds, how much of the
answer is right, and how many tokens are those of dense decoding. Nothing is generated twice.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from accel.files import write_atomically
from accel.pipelines.cost_files import kept
from accel.pipelines.enable import enabled
from accel.pipelines.host import Host
from accel.pipelines.tasks import Task
from accel.plan import Plan
from accel.search.known import read_known
from accel.search.worth import Worth

__all__ = ["TextBench"]

ENTRY = {"seconds", "score", "agreement", "calls"}


class TextBench:
    """Measures plans on tasks. key: names what generations depend on, model and device."""

    def __init__(self, host: Host, folder: Path, key: str, seed: int) -> None:
        self._host, self._folder, self._key, self._seed = host, folder, key, seed
        self._path = folder / f"measured-{key}.json"
        self._known: dict[str, dict[str, dict[str, float]]] = (
            kept(self._path, lambda p: read_known(p, ENTRY)) or {}
        )
        self._warm = False

    def dense(self, tasks: Sequence[Task]) -> Worth:
        """Of the untouched pipeline; made where it is not known."""
        missing = [task for task in tasks if task.id not in self._known.get("dense", {})]
        for task in tqdm(missing, desc="dense decoding", unit="text", disable=not missing):
            self._reference(task)
        return self._worth("dense", tasks)

    def trial(self, plan: Plan, tasks: Sequence[Task]) -> Worth:
        """What evolution goes by: here a measurement."""
        return self.measure(plan, tasks)

    def measure(self, plan: Plan, tasks: Sequence[Task]) -> Worth:
        """Of a plan on tasks whose dense decoding is known."""
        of_plan = self._known.setdefault(plan.digest, {})
        for task in tasks:
            if task.id in of_plan:
                continue
            reference = self._reference(task)
            self._warm_up()
            with enabled(self._host.pipe, plan, check=False, guard=False):
                made, seconds = self._generate(task)
            same = float((made.tokens == reference).mean())
            self._note(plan.digest, task, seconds, made, same)
        return self._worth(plan.digest, tasks)

    def _reference(self, task: Task) -> NDArray[np.int64]:
        """The tokens of dense decoding, made once."""
        name = f"{self._key} {self._seed} {json.dumps([task.id, task.prompt])}"
        path = self._folder / "dense" / f"{hashlib.sha256(name.encode()).hexdigest()[:12]}.npy"
        if path.is_file() and task.id in self._known.get("dense", {}):
            return np.load(path, allow_pickle=False)
        self._warm_up()
        made, seconds = self._generate(task)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part.npy")
        np.save(part, made.tokens)
        part.replace(path)
        self._note("dense", task, seconds, made, 1.0)
        return made.tokens

    def _warm_up(self) -> None:
        """Kernels are built and memory is touched before the first time counts."""
        if not self._warm:
            short = self._host.kind.shortened(self._host.config.call, 2)
            self._host.generate(self._host.config.calibrated_on[0], self._seed, **short)
            self._warm = True

    def _generate(self, task: Task) -> tuple[Any, float]:
        start = time.perf_counter()
        made = self._host.generate(task.prompt, self._seed)
        return made, time.perf_counter() - start

    def _note(self, of: str, task: Task, seconds: float, made: Any, agreement: float) -> None:
        self._known.setdefault(of, {})[task.id] = {
            "seconds": seconds,
            "score": task.score(made.text),
            "agreement": agreement,
            "calls": made.calls,
        }
        write_atomically(self._path, json.dumps(self._known, indent=1))

    def _worth(self, of: str, tasks: Sequence[Task]) -> Worth:
        found = [self._known[of][task.id] for task in tasks]
        dense = [self._known["dense"][task.id] for task in tasks]
        return Worth(
            time=mean(f["seconds"] / d["seconds"] for f, d in zip(found, dense, strict=True)),
            accuracy=mean(f["score"] for f in found),
            agreement=mean(f["agreement"] for f in found),
            calls=float(mean(f["calls"] for f in found)),
        )
