"""What a comparison has measured so far, as files: one for every arm, prompt and round.

Each names by a key what it depends on (model files, plan, prompt, seed, precision), so that a
comparison goes on where it stopped and never mixes in what was measured of something else.

    arms/<arm>/start.json   p00-r0.json   p00.npz (the video of round 0)   p00-quality.json
"""

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accel import __version__
from accel.errors import PlanError
from accel.files import write_atomically
from accel.pipelines.host import ModelConfig, find_path
from accel.plan import Plan


@dataclass(frozen=True, slots=True)
class ArmSpec:
    """One arm. plan: a plan file, the name of a recipe, or None for the dense run.

    identity: names what the plan does; what cannot be read has only its path.
    """

    name: str
    plan: str | None = None
    identity: str = ""

    @classmethod
    def of(cls, name: str, plan: str) -> "ArmSpec":
        identity = plan
        if Path(plan).is_file():
            with suppress(PlanError):
                identity = Plan.load(plan).digest
        return cls(name, plan, identity)


@dataclass(frozen=True, slots=True)
class Job:
    """One generation: prompt number `prompt` in round `round` by `arm`."""

    arm: ArmSpec
    prompt: int
    round: int

    @property
    def stem(self) -> str:
        return f"p{self.prompt:02d}-r{self.round}"


class Book:
    """The files of one comparison.

    sitting: names this run of the command; times of one sitting were measured beside each other.
    priced: plans run with predictions, and so dense wherever that is predicted to be faster.
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
        self._model: dict[str, Any] = {
            "accel": __version__,
            "pipeline": model.pipeline,
            "files": files_of(find_path(model.path)),
            "call": dict(model.call),
            "load": dict(model.load),
            "dtype": model.dtype,
            "device": str(model.resolved_device()),
            "priced": priced,
        }

    def arm_folder(self, arm: ArmSpec) -> Path:
        return self.folder / "arms" / arm.name

    def video(self, arm: ArmSpec, prompt: int) -> Path:
        return self.arm_folder(arm) / f"p{prompt:02d}.npz"

    def key(self, arm: ArmSpec, prompt: int | None = None) -> str:
        """What a measurement of `arm`, or of one of its prompts, depends on."""
        what: dict[str, Any] = {**self._model, "plan": arm.identity}
        if prompt is not None:
            what |= {"prompt": self.prompts[prompt], "seed": self.seed + prompt}
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]

    def read(self, arm: ArmSpec, name: str, prompt: int | None = None) -> dict[str, Any] | None:
        """The record `name` of an arm; None where there is none, or one of something else."""
        path = self.arm_folder(arm) / f"{name}.json"
        if not path.is_file():
            return None
        record = json.loads(path.read_text(encoding="utf-8"))
        return record if record["key"] == self.key(arm, prompt) else None

    def write(
        self, arm: ArmSpec, name: str, record: dict[str, Any], prompt: int | None = None
    ) -> dict[str, Any]:
        record = {"key": self.key(arm, prompt), "sitting": self.sitting, **record}
        write_atomically(self.arm_folder(arm) / f"{name}.json", json.dumps(record, indent=1))
        return record

    def result(self, job: Job) -> dict[str, Any] | None:
        """The record of a finished job; round 0 counts only together with its video."""
        if job.round == 0 and not self.video(job.arm, job.prompt).is_file():
            return None
        return self.read(job.arm, job.stem, job.prompt)


def files_of(path: str) -> list[tuple[str, int, int]] | str:
    """Name, size and time of every file of a local model; a hub name stands for itself."""
    if not os.path.isdir(path):
        return path
    found = sorted(p for p in Path(path).rglob("*") if p.is_file())
    return [(str(p.relative_to(path)), p.stat().st_size, int(p.stat().st_mtime)) for p in found]
