"""What a comparison has measured so far, as files: one for every arm, prompt and round.

Each names by a key what it depends on (model files, plan, prompt, seed, precision, device,
versions, the code that computes), so that a comparison goes on where it stopped and never mixes in
what was measured of something else. Videos and maps have the key in their names: they are written
by the arm, and a comparison may be killed before it has noted them.

    arms/<arm>/start.json   p00-r0.json   p00-<key>.npz (the video of round 0)   p00-quality.json
"""

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accel.errors import PlanError
from accel.files import write_atomically
from accel.pipelines.enable import HUB_FILE
from accel.pipelines.host import ModelConfig, find_path
from accel.pipelines.provenance import code_digest, device_name, versions
from accel.plan import Plan

# beside a model's files, but nothing that its outputs depend on
UNREAD = {".md", ".png", ".jpg", ".gif", ".mp4"}
# what runs an arm, besides the code that every measurement depends on
CODE = tuple(Path(__file__).parent / f"{name}.py" for name in ("compare_arm", "host", "pricing"))


@dataclass(frozen=True, slots=True)
class ArmSpec:
    """One arm. plan: a plan file, the name of a recipe, or None for the dense run.

    identity: names what the plan does and expects, since it runs dense where it expects dense to
    be faster; what cannot be read has only its path.
    """

    name: str
    plan: str | None = None
    identity: str = ""

    @classmethod
    def of(cls, name: str, plan: str) -> "ArmSpec":
        identity, path = plan, Path(plan)
        if path.exists():
            with suppress(PlanError):
                found = Plan.load(path / HUB_FILE if path.is_dir() else path)
                expected = json.dumps(found.expected, sort_keys=True)
                identity = f"{found.digest} {expected}"
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
    classifier: its directory, or ""; it alone decides what is read in a video.
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
        judge = json.dumps(files_of(find_path(classifier)) if classifier else "")
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
        if job.round == 0 and not self.video(job.arm, job.prompt).is_file():
            return None
        return self.read(job.arm, job.stem, job.prompt)


def files_of(path: str) -> list[tuple[str, int, int]] | str:
    """Name, size and time of every file that a local model is read from; a hub name stands for
    itself.
    """
    if not os.path.isdir(path):
        return path
    found = sorted(p for p in Path(path).rglob("*") if p.is_file() and p.suffix not in UNREAD)
    return [(str(p.relative_to(path)), p.stat().st_size, int(p.stat().st_mtime)) for p in found]
