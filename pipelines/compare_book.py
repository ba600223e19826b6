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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accel.files import write_atomically
from accel.pipelines.compare_arms import ArmSpec
from accel.pipelines.host import ModelConfig
from accel.pipelines.model_files import files_of
from accel.pipelines.output import Output
from accel.pipelines.paths import find_path
from accel.pipelines.provenance import code_digest, device_name, versions

# what runs an arm, besides the code that every measurement depends on
CODE = (
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

    What was generated is a video where the model generates frames, else its kind's.
    """

    def __init__(
        self,
        folder: Path,
        model: ModelConfig,
        prompts: tuple[str, ...],
        seed: int,
        sitting: str,
        priced: bool = False,
    ) -> None:
        self.folder = folder
        self.prompts = prompts
        self.seed = seed
        self.sitting = sitting
        self._priced = priced
        # nobody else writes here: what was read or written once is known
        self._records: dict[Path, dict[str, Any]] = {}
        self._asked = [model.kind.stands_for(model, prompt) for prompt in prompts]
        self._calibration = list(model.calibration)
        self._judge = model.kind.judges(model)
        self._model: dict[str, Any] = {
            "versions": versions(),
            "code": code_digest(*code_of(model.kind)),
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
        if arm.setup:
            what["setup"] = arm.setup
        if arm.calibrated:
            what["calibration"] = self._calibration
        if prompt is not None:
            what |= {"prompt": self._asked[prompt], "seed": self.seed + prompt}
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
        """How the video of a prompt was judged, if it was, and by what judges now."""
        found = self.read(arm, f"p{prompt:02d}-quality", prompt)
        return found if found and found.get("judge") == self._judge else None

    def write_quality(self, arm: ArmSpec, prompt: int, quality: dict[str, Any]) -> None:
        quality = {**quality, "judge": self._judge}
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


def code_of(kind: Output) -> list[Path]:
    """The files that run an arm of this kind of output, besides what all measurements depend on."""
    return [Path(__file__).parent / f"{name}.py" for name in CODE] + [*kind.sources]
