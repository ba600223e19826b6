"""What a comparison has measured so far, as files: one for every arm, prompt and round.

Each names by a key what it depends on (model files, plan, prompt, seed, precision, device,
versions, the code that computes), so that a comparison goes on where it stopped and never mixes in
what was measured of something else. Videos and maps have the key in their names: they are written
by the arm, and a comparison may be killed before it has noted them.

    arms/<arm>/start.json   p00-r0.json   p00-<key>.npz (the video of round 0)   p00-quality.json
    arms/dense/p00-r0-g1.json (timed again beside the second group of arms)   p00-r0-s1.json (and
        beside arms that took this turn in a later sitting)
"""

import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accel.files import write_atomically
from accel.pipelines.compare_arms import ArmSpec
from accel.pipelines.host import ModelConfig, find_path
from accel.pipelines.provenance import code_digest, device_name, versions

# beside a model's files, but nothing that its outputs depend on
UNREAD = {".md", ".png", ".jpg", ".gif", ".mp4"}
# what runs an arm, besides the code that every measurement depends on
CODE = tuple(
    Path(__file__).parent / f"{name}.py"
    for name in (
        "arm_meter",
        "arm_plan",
        "cache_hooks",
        "caches",
        "calibration",
        "calibrator",
        "candidate_measures",
        "compare_arm",
        "cost_files",
        "dense_run",
        "host",
        "mass_observer",
        "pricing",
        "seen_keeps",
    )
)


@dataclass(frozen=True, slots=True)
class Job:
    """One generation: prompt number `prompt` in round `round` by `arm`.

    beside: the number of the group of arms beside which it is timed. Only a dense arm is in more
    than one, and makes its video in the first. sample: counts the sittings in which it was timed
    beside them, of a dense arm again.
    """

    arm: ArmSpec
    prompt: int
    round: int
    beside: int = 0
    sample: int = 0

    @property
    def stem(self) -> str:
        marks = (("g", self.beside), ("s", self.sample))
        more = "".join(f"-{mark}{number}" for mark, number in marks if number)
        return f"p{self.prompt:02d}-r{self.round}{more}"

    @property
    def makes_video(self) -> bool:
        return self.round == self.beside == self.sample == 0


class Book:
    """The files of one comparison.

    sitting: names the time at which a group of arms took turns; it is a new one for every group
        and every run of the command, and times of one sitting were measured beside each other.
    priced: plans run with predictions, and so dense wherever that is predicted to be faster.
    classifier: its directory, or ""; it alone decides, with the model's places, what is read in a
        video.
    """

    def __init__(
        self,
        folder: Path,
        model: ModelConfig,
        prompts: tuple[str, ...],
        seed: int,
        sitting: str,
        priced: bool = False,
        classifier: str = "",
    ) -> None:
        self.folder = folder
        self.prompts = prompts
        self.seed = seed
        self.sitting = sitting
        self._priced = priced
        # nobody else writes here: what was read or written once is known
        self._records: dict[Path, dict[str, Any]] = {}
        self._calibration = list(model.calibration)
        judge = json.dumps(files_of(find_path(classifier)) if classifier else "")
        if model.places:
            judge += json.dumps({k: list(v) for k, v in model.places.items()}, sort_keys=True)
        self._classifier_key = hashlib.sha256(judge.encode()).hexdigest()[:16]
        self._model: dict[str, Any] = {
            "versions": versions(),
            "code": code_digest(*CODE),
            "pipeline": model.pipeline,
            "files": files_of(find_path(model.path)),
            "call": dict(model.call),
            "load": dict(model.load),
            "dtype": model.dtype,
            "device": device_name(model.resolved_device()),
        }

    @property
    def calibration_folder(self) -> Path:
        """What plans and caches are calibrated by, for all arms that are."""
        what = json.dumps({**self._model, "calibration": self._calibration}, sort_keys=True)
        return self.folder / "calibration" / hashlib.sha256(what.encode()).hexdigest()[:16]

    def arm_folder(self, arm: ArmSpec) -> Path:
        return self.folder / "arms" / arm.name

    def video(self, arm: ArmSpec, prompt: int) -> Path:
        return self.arm_folder(arm) / f"p{prompt:02d}-{self.key(arm, prompt)}.npz"

    def maps(self, arm: ArmSpec) -> Path:
        """The attention maps of the first prompt."""
        return self.arm_folder(arm) / f"maps-{self.key(arm, 0)}.npz"

    def key(self, arm: ArmSpec, prompt: int | None = None) -> str:
        """What a measurement of `arm`, or of one of its prompts, depends on.

        Nothing of accel touches an arm without a plan, so prices do not change it.
        """
        what: dict[str, Any] = {**self._model, "plan": arm.identity}
        if arm.plan is not None:
            what["priced"] = self._priced
        if arm.cache:
            what["cache"] = arm.cache
        if arm.calibrated:
            what["calibration"] = self._calibration
        if prompt is not None:
            what |= {"prompt": self.prompts[prompt], "seed": self.seed + prompt}
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]

    def read(self, arm: ArmSpec, name: str, prompt: int | None = None) -> dict[str, Any] | None:
        """The record `name` of an arm; None where there is none, or one of something else."""
        path = self.arm_folder(arm) / f"{name}.json"
        if path not in self._records:
            if not path.is_file():
                return None
            self._records[path] = json.loads(path.read_text(encoding="utf-8"))
        record = self._records[path]
        return record if record["key"] == self.key(arm, prompt) else None

    def write(
        self, arm: ArmSpec, name: str, record: dict[str, Any], prompt: int | None = None
    ) -> dict[str, Any]:
        record = {"key": self.key(arm, prompt), "sitting": self.sitting, **record}
        path = self.arm_folder(arm) / f"{name}.json"
        write_atomically(path, json.dumps(record, indent=1))
        self._records[path] = record
        return record

    def drop_others(self, path: Path) -> None:
        """Remove what `video` or `maps` named under other keys: its records were overwritten."""
        for other in path.parent.glob(f"{path.name.rsplit('-', 1)[0]}-*.npz"):
            if other != path:
                other.unlink(missing_ok=True)

    def quality(self, arm: ArmSpec, prompt: int) -> dict[str, Any] | None:
        """How the video of a prompt was judged, if it was, and by this classifier."""
        found = self.read(arm, f"p{prompt:02d}-quality", prompt)
        return found if found and found["classifier"] == self._classifier_key else None

    def write_quality(self, arm: ArmSpec, prompt: int, quality: dict[str, Any]) -> None:
        quality = {**quality, "classifier": self._classifier_key}
        self.write(arm, f"p{prompt:02d}-quality", quality, prompt)

    def result(self, job: Job) -> dict[str, Any] | None:
        """The record of a finished job; round 0 counts only together with its video."""
        if job.makes_video and not self.video(job.arm, job.prompt).is_file():
            return None
        return self.read(job.arm, job.stem, job.prompt)

    def samples(self, job: Job) -> list[Job]:
        """The finished ones of a job's samples, by number, however many there are."""
        made: list[Job] = []
        while self.result(one := replace(job, sample=len(made))) is not None:
            made.append(one)
        return made


def files_of(path: str) -> list[tuple[str, int, int]] | str:
    """Name, size and time of every file that a local model is read from; a hub name stands for
    itself.
    """
    if not os.path.isdir(path):
        return path
    found = sorted(p for p in Path(path).rglob("*") if p.is_file() and p.suffix not in UNREAD)
    return [(str(p.relative_to(path)), p.stat().st_size, int(p.stat().st_mtime)) for p in found]
