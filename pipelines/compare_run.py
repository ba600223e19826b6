"""The arms of a comparison, one process each, run in turn: a busy machine slows all alike."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from accel.errors import AccelError
from accel.files import write_atomically
from accel.metrics import Classifier
from accel.pipelines.compare_book import ArmSpec, Book, Job
from accel.pipelines.compare_results import fastest_of, measure_quality, results_of
from accel.pipelines.compare_settings import DENSE, CompareSettings
from accel.pipelines.compare_worker import ArmFailed, Worker
from accel.pipelines.host import ModelConfig, find_path
from accel.pipelines.provenance import versions

SCHEMA = 1
PROBE_STEPS = 4

Launch = Callable[[Path, dict[str, Any]], Any]


class Comparison:
    """The arms of a comparison, run in turn. launch: starts the process of an arm."""

    def __init__(
        self, model: ModelConfig, settings: CompareSettings, folder: Path, launch: Launch = Worker
    ) -> None:
        self.settings = settings
        self.folder = folder
        self.arms = settings.arms
        self._launch = launch
        self._sitting = time.strftime("%Y-%m-%dT%H:%M:%S")
        self._workers: dict[ArmSpec, Any] = {}
        self._errors: dict[ArmSpec, str] = {}
        prompts = settings.prompts_of(model)
        self.probe = self._probe(model, prompts)
        dtype = self.probe.get("chosen", model.dtype)
        self.model = replace(model, dtype=dtype, prompts=prompts)
        self.book = Book(
            folder,
            self.model,
            prompts,
            settings.seed,
            self._sitting,
            settings.predict,
            model.classifier,
        )
        self._classifier = _classifier_of(model)

    @property
    def jobs(self) -> list[Job]:
        """Every prompt once, then the timing prompts again; arms take turns in being first."""
        jobs = []
        for number in range(self.settings.rounds):
            count = len(self.book.prompts)
            if number > 0:
                count = min(count, self.settings.timing_prompts)
            for prompt in range(count):
                first = (number + prompt) % len(self.arms)
                turn = self.arms[first:] + self.arms[:first]
                jobs += [Job(arm, prompt, number) for arm in turn]
        return jobs

    def run(self) -> dict[str, Any]:
        """Do what is not done yet; every arm that can finish does. Returns the results."""
        todo = [job for job in self.jobs if self.book.result(job) is None]
        try:
            for arm in self.arms:
                if any(job.arm == arm for job in todo):
                    self._start(arm)
            with tqdm(todo, unit="video", disable=not todo, dynamic_ncols=True) as bar:
                for job in bar:
                    bar.set_description(f"{job.arm.name}, prompt {job.prompt + 1}")
                    self._generate(job)
            self._look()
        finally:
            for worker in self._workers.values():
                worker.close()
        return self.results()

    def _start(self, arm: ArmSpec) -> None:
        """Open the process of an arm, let it warm up and, with predictions, measure its costs."""
        _say(f"{arm.name}: loading and warming up")
        self._workers[arm] = self._launch(self.book.arm_folder(arm), self._spec(arm, self.model))
        started = self._ask(arm, {"do": "start"}, "start")
        if started and self.settings.predict and arm != DENSE:  # accel never touches the dense arm
            _say(f"{arm.name}: measuring what it costs here")
            costs = str(self.folder / "costs" / self.book.key(DENSE))
            self._ask(arm, {"do": "price", "folder": costs}, "price")

    def results(self) -> dict[str, Any]:
        """The results so far, also written to results.json."""
        measure_quality(self.book, self.arms, self._classifier)
        baselines = self.settings.dense_arms
        fastest = fastest_of(self.book, baselines, self.jobs)
        arms = {}
        for arm in self.arms:
            arms[arm.name] = results_of(self.book, arm, self.jobs, baselines, fastest)
            if arm in self._errors:
                arms[arm.name]["error"] = self._errors[arm]
        starts = [self.book.read(arm, "start") for arm in self.arms]
        done = [r for r in map(self.book.result, self.jobs) if r is not None]
        sittings = sorted({record["sitting"] for record in done})
        results = {
            "schema": SCHEMA,
            "arms": arms,
            "baseline": fastest.name,
            "baselines": [arm.name for arm in baselines],
            "device": next((s["device"] for s in starts if s), "unknown"),
            "versions": versions(),
            "settings": {
                "model": self.model.name,
                "dtype": self.model.dtype,
                "probe": self.probe,
                "prompts": list(self.book.prompts),
                "seed": self.settings.seed,
                "rounds": self.settings.rounds,
                "predict": self.settings.predict,
                "timing_prompts": self.settings.timing_prompts,
                "steps": self.model.call["num_inference_steps"],
                "call": dict(self.model.call),
                "fps": self.model.fps,
                "command": self.settings.command,
            },
            "date": sittings[-1] if sittings else self._sitting,
            "sittings": sittings,
        }
        write_atomically(self.folder / "results.json", json.dumps(results, indent=1))
        return results

    def _spec(self, arm: ArmSpec, model: ModelConfig) -> dict[str, Any]:
        return {"plan": arm.plan, "model": asdict(model)}

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
            _say(f"{arm.name} failed: {error}")
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
        if job.round == 0:
            command["save"] = str(video)
        if self._ask(job.arm, command, job.stem, job.prompt):
            self.book.drop_others(video)
            self.results()

    def _look(self) -> None:
        """Keep attention maps of the first arm that leaves something out and did not fail."""
        sparse = (arm for arm in self.arms if arm not in self.settings.dense_arms)
        shown = next((arm for arm in sparse if arm not in self._errors), None)
        if shown is None or self.book.read(shown, "maps", 0) is not None:
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

    def _probe(self, model: ModelConfig, prompts: tuple[str, ...]) -> dict[str, Any]:
        """The precision in which dense is fastest, from a few steps in each; kept with the times.

        Seconds are those of a whole generation: what is outside the steps, plus all of them.
        """
        dtypes = list(self.settings.dtypes)
        if len(dtypes) < 2:
            return {"chosen": dtypes[0]} if dtypes else {}
        found: dict[str, Any] = {"seconds": {}, "errors": {}}
        for dtype in dtypes:
            one = replace(model, dtype=dtype)
            folder = self.folder / "probe" / dtype
            book = Book(folder, one, prompts, self.settings.seed, self._sitting)
            probed = book.read(DENSE, "probe", 0)
            if probed is None:
                _say(f"how fast is dense in {dtype}?")
                worker = self._launch(book.arm_folder(DENSE), self._spec(DENSE, one))
                try:
                    worker.ask({"do": "start"}, self.settings.arms_timeout_s)
                    command = {"do": "generate", "prompt": prompts[0], "seed": self.settings.seed}
                    answer = worker.ask(
                        {**command, "steps": PROBE_STEPS}, self.settings.arms_timeout_s
                    )
                except ArmFailed as error:
                    found["errors"][dtype] = str(error)
                    continue
                finally:
                    worker.close()
                probed = book.write(DENSE, "probe", answer, 0)
            rest = int(model.call["num_inference_steps"]) - PROBE_STEPS
            found["seconds"][dtype] = probed["seconds"] + rest * probed["step_seconds"]["all"]
        if not found["seconds"]:
            raise AccelError(f"the model runs in none of {dtypes}: {found['errors']}")
        found["chosen"] = min(found["seconds"], key=found["seconds"].__getitem__)
        return found


def _classifier_of(model: ModelConfig) -> Classifier | None:
    path = find_path(model.classifier)
    if not model.classifier or not Path(path).exists():
        return None
    return Classifier.load(path)


def _say(what: str) -> None:
    tqdm.write(what, file=sys.stderr)
