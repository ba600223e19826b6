"""The arms of a comparison, one process each, run in turn: a busy machine slows all alike.

Not all of them fit into memory at once, so they come in groups. The dense arms stay loaded and are
timed beside every group, in every turn that its arms take, and again where some of these take it in
a later sitting: every time of an arm has one of dense beside it.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from accel.files import write_atomically
from accel.pipelines.compare_arms import DENSE, ArmSpec
from accel.pipelines.compare_book import Book, Job
from accel.pipelines.compare_findings import findings_of
from accel.pipelines.compare_probe import Launch, fastest_dense, fastest_dtype, say
from accel.pipelines.compare_results import (
    dense_runs_of,
    fastest_of,
    measure_quality,
    records_of,
    results_of,
)
from accel.pipelines.compare_settings import CompareSettings
from accel.pipelines.compare_turns import is_of_use, missing_of, turns_of
from accel.pipelines.compare_worker import ArmFailed, Worker
from accel.pipelines.host import ModelConfig
from accel.pipelines.provenance import versions

SCHEMA = 1


class Comparison:
    """The arms of a comparison, run in turn. launch: starts the process of an arm."""

    def __init__(
        self, model: ModelConfig, settings: CompareSettings, folder: Path, launch: Launch = Worker
    ) -> None:
        self.folder = folder
        self._launch = launch
        self._sitting = _now()
        self._workers: dict[ArmSpec, Any] = {}
        self._errors: dict[ArmSpec, str] = {}
        self._unseen: dict[ArmSpec, str] = {}  # arms without maps, and why
        self.kind = model.kind
        # predictions are of what plans select; of other kinds of output there are none yet
        self.predict = settings.predict and self.kind.priced
        prompts = settings.prompts_of(model)
        self.probe = fastest_dtype(
            model, settings, prompts, folder / "probe", self._sitting, launch
        )
        dtype = self.probe.get("chosen", model.dtype)
        self.model = replace(model, dtype=dtype, prompts=prompts)
        if settings.scaled:
            found = fastest_dense(self.model, settings, folder / "probe", self._sitting, launch)
            self.probe |= found
            settings = replace(settings, fastest=found["fastest"])
        self.settings = settings
        self.arms = settings.arms
        self.groups = settings.groups
        self.book = Book(
            folder,
            self.model,
            prompts,
            settings.seed,
            self._sitting,
            self.predict,
        )
        self._judge = self.kind.judge(model)

    @property
    def jobs(self) -> list[Job]:
        """The jobs of all groups, one group after the other, with what was sampled again."""
        jobs = (job for number in range(len(self.groups)) for job in self.jobs_of(number))
        return [one for job in jobs for one in (self.book.samples(job) or [job])]

    def jobs_of(self, group: int) -> list[Job]:
        return turns_of(self.settings, len(self.book.prompts), group)

    def run(self) -> dict[str, Any]:
        """Do what is not done yet; every arm that can finish does. Returns the results."""
        try:
            for group, arms in enumerate(self.groups):
                self._run_group(group)
                for arm in set(arms) - set(self.settings.dense_arms):
                    if arm in self._workers:
                        self._workers.pop(arm).close()
        finally:
            for worker in self._workers.values():
                worker.close()
        return self.results()

    def _run_group(self, group: int) -> None:
        """The generations of one group that are missing, in one sitting."""
        self.book.sitting = _now() + (f" {group}" if group else "")
        dense = self.settings.dense_arms
        todo = missing_of(self.book, self.jobs_of(group), dense)
        for arm in self.groups[group]:
            if any(job.arm == arm for job in todo) and arm not in self._workers | self._errors:
                self._start(arm)
        with tqdm(todo, unit=self.kind.one, disable=not todo, dynamic_ncols=True) as bar:
            for job in bar:
                if not is_of_use(job, todo, list(self._workers), dense):
                    continue
                bar.set_description(f"{job.arm.name}, prompt {job.prompt + 1}")
                self._generate(job)
        self._look(self.groups[group])

    def _start(self, arm: ArmSpec) -> None:
        """Open the process of an arm, let it warm up and, with predictions, measure its costs."""
        say(f"{arm.name}: loading and warming up")
        self._workers[arm] = self._launch(self.book.arm_folder(arm), self._spec(arm))
        started = self._ask(arm, {"do": "start"}, "start")
        if started and self.predict and arm.plan is not None:
            say(f"{arm.name}: measuring what it costs here")
            costs = str(self.folder / "costs" / self.book.key(DENSE))
            self._ask(arm, {"do": "price", "folder": costs}, "price")

    def results(self) -> dict[str, Any]:
        """The results so far, also written to results.json."""
        measure_quality(self.book, self.arms, self.kind, self._judge)
        baselines = self.settings.dense_arms
        records = records_of(self.book, self.jobs)
        fastest = fastest_of(records, baselines)
        arms = {}
        for arm in self.arms:
            arms[arm.name] = results_of(self.book, arm, records, baselines, fastest, self.kind)
            if arm in self._errors:
                arms[arm.name]["error"] = self._errors[arm]
            if arm in self._unseen:
                arms[arm.name]["maps_error"] = self._unseen[arm]
        starts = [self.book.read(arm, "start") for arm in self.arms]
        sittings = sorted({record["sitting"] for made in records.values() for record in made})
        results = {
            "schema": SCHEMA,
            "arms": arms,
            "baseline": fastest.name,
            "baselines": [arm.name for arm in baselines],
            "dense_runs": dense_runs_of(records, baselines),
            "device": next((s["device"] for s in starts if s), "unknown"),
            "versions": versions(),
            "settings": {
                "model": self.model.name,
                "output": self.kind.name,
                "dtype": self.model.dtype,
                "probe": self.probe,
                "prompts": list(self.book.prompts),
                "seed": self.settings.seed,
                "rounds": self.settings.rounds,
                "predict": self.predict,
                "timing_prompts": self.settings.timing_prompts,
                "loaded_at_once": self.settings.loaded_at_once,
                "steps": self.model.steps,
                "call": dict(self.model.call),
                "fps": self.model.fps,
                "tasks": self.model.tasks,
                "images": self.model.images,
                "model_path": self.model.path,
                "command": self.settings.command,
            },
            "date": (sittings[-1] if sittings else self._sitting)[:19],
            "sittings": sittings,
        }
        results |= findings_of(results)
        write_atomically(self.folder / "results.json", json.dumps(results, indent=1))
        return results

    def _spec(self, arm: ArmSpec) -> dict[str, Any]:
        return {
            "plan": arm.plan,
            "cache": json.loads(arm.cache) if arm.cache else None,
            "model": asdict(self.model),
            "folder": str(self.book.calibration_folder) if arm.calibrated else "",
            "precision": arm.precision,
            "parameters": json.loads(arm.parameters) if arm.parameters else {},
            "setup": json.loads(arm.setup) if arm.setup else {},
        }

    def _ask(
        self, arm: ArmSpec, command: dict[str, Any], name: str, prompt: int | None = None
    ) -> bool:
        """Do one thing in the process of `arm` and keep the answer; an arm that fails is out."""
        worker = self._workers.get(arm)
        if worker is None:
            return False
        try:
            answer = worker.ask(command, self.settings.arms_timeout_s)
        except ArmFailed as error:
            self._errors[arm] = str(error)
            del self._workers[arm]
            say(f"{arm.name} failed: {error}")
            return False
        self.book.write(arm, name, answer, prompt)
        return True

    def _generate(self, job: Job) -> None:
        command: dict[str, Any] = {
            "do": "generate",
            "prompt": self.book.prompts[job.prompt],
            "seed": self.settings.seed + job.prompt,
        }
        video = self.book.video(job.arm, job.prompt)
        if job.makes_video:
            command["save"] = str(video)
        if self._ask(job.arm, command, job.stem, job.prompt):
            self.book.drop_others(video)
            self.results()

    def _look(self, group: Sequence[ArmSpec]) -> None:
        """Keep attention maps of the first plan or recipe that did not fail, with its group.

        They are pictures: where they cannot be had, what was measured of the arm stands.
        """
        sparse = (a for a in self.arms if a.kind in ("plan", "front", "recipe"))
        shown = next((arm for arm in sparse if arm not in self._errors), None)
        if (
            not self.kind.mapped
            or shown is None
            or shown not in group
            or self.book.read(shown, "maps", 0) is not None
        ):
            return
        if shown not in self._workers:
            self._start(shown)
        command = {
            "do": "look",
            "prompt": self.book.prompts[0],
            "seed": self.settings.seed,
            "save": str(self.book.maps(shown)),
        }
        if self._ask(shown, command, "maps", 0):
            self.book.drop_others(self.book.maps(shown))
        elif shown in self._errors:
            self._unseen[shown] = self._errors.pop(shown)
            say(f"{shown.name}: only its attention maps are missing")


def _now() -> str:
    """Names a sitting: no two begin in the same moment."""
    return datetime.now().isoformat(timespec="microseconds")
