"""The user's own pipeline, loaded and called as a model's configuration says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from accel.errors import AccelError, nearest
from accel.pipelines.output import Output
from accel.pipelines.outputs import output_of
from accel.pipelines.paths import find_path

Video = NDArray[np.float32]  # what `Host.generate` gives of frames
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelConfig:
    """One entry of `configs/model`.

    path: a directory below the current one or below the checkout, or a hub repository. call:
    arguments of the pipeline's `__call__`; prompts: what comparisons generate; calibration: what a
    search looks at, and methods that calibrate, not needed for anything else; output: what is
    generated, `frames`, `text` or `vision`. Of frames, classifier: a directory with a classifier,
    or ""; places: where the frames show the places that prompts name, for the classifier to look
    there: {name: [top, left, bottom, right]} in pixels. Of text, tasks and calibration_tasks: files
    of tasks (`accel.pipelines.tasks`), or ""; their prompts, of one kind after another, stand for
    those that are not given. Of vision, images and calibration_images: folders of images
    (`accel.pipelines.vision_images`), whose names are the prompts.
    """

    name: str
    pipeline: str
    path: str
    call: Mapping[str, Any]
    prompts: tuple[str, ...] = ()
    calibration: tuple[str, ...] = ()
    output: str = "frames"
    dtype: str = "float32"
    device: str = "auto"
    fps: int = 12
    classifier: str = ""
    places: Mapping[str, Sequence[int]] = field(default_factory=dict)
    tasks: str = ""
    calibration_tasks: str = ""
    images: str = ""
    calibration_images: str = ""
    load: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise AccelError(f"model.dtype is {self.dtype!r}; take one of {', '.join(DTYPES)}")
        if "." not in self.pipeline:
            raise AccelError(
                f"model.pipeline is {self.pipeline!r}; name its module too, as in"
                f" diffusers.{self.pipeline}"
            )
        for name in ("prompts", "calibration"):
            prompts = tuple(getattr(self, name)) or self.kind.asked(self, name)
            blank = any(not isinstance(p, str) or not p.strip() for p in prompts)
            if blank or (not prompts and name == "prompts"):
                raise AccelError(f"model.{name} must be prompts with text in them, got {prompts}")
            object.__setattr__(self, name, prompts)
        self.kind.check(self)
        self.resolved_device()

    @property
    def kind(self) -> Output:
        """How what is generated is kept, judged and shown."""
        return output_of(self.output)

    @property
    def calibrated_on(self) -> tuple[str, ...]:
        """The calibration prompts, of which there is one at least. Raises AccelError."""
        if not self.calibration:
            raise AccelError(
                f"model.calibration of {self.name!r} is empty: searches, methods that calibrate and"
                " MagCache look at prompts (tasks, images) that nothing else sees"
            )
        return self.calibration

    @property
    def steps(self) -> int:
        """The steps of a dense generation."""
        return self.kind.steps(self.call)

    def resolved_device(self) -> torch.device:
        return resolve_device("model.device", self.device)


def resolve_device(name: str, device: str) -> torch.device:
    """The device that a setting `name` asks for; "auto" is cuda where there is one, else cpu."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise AccelError(f"{name} is {device!r}, which cannot be used here: {reason}") from error
    return found


class Host:
    """A loaded pipeline with the call that its configuration describes."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        module, name = config.pipeline.rsplit(".", 1)
        path = find_path(config.path)
        try:
            pipeline = getattr(import_module(module), name)
            self.pipe = pipeline.from_pretrained(path, dtype=DTYPES[config.dtype], **config.load)
        except (ImportError, AttributeError, OSError, ValueError) as error:
            where = "" if Path(path).is_dir() else ", which is no folder here"
            raise AccelError(
                f"model {config.name!r} cannot be loaded from {path!r}{where}: {error}"
            ) from error
        self.device = config.resolved_device()
        self.pipe.to(self.device)
        self.pipe.set_progress_bar_config(disable=True)
        self._given: dict[str, Any] = {}  # prompts as the pipeline has them, read once

    @property
    def kind(self) -> Output:
        return self.config.kind

    @property
    def steps(self) -> int:
        return self.config.steps

    def generate(self, prompt: str, seed: int, **overrides: Any) -> Any:
        """One generation, which depends on `seed` alone: of frames one video
        [frames, height, width, 3] in [0, 1], where an image is a video of one frame; else what the
        kind of output says.

        Raises AccelError for arguments that the pipeline does not take.
        """
        return self.kind.read(self._call(prompt, seed, self.kind.output_type, overrides))

    def latents(self, prompt: str, seed: int, **overrides: Any) -> NDArray[np.float32]:
        """What `generate` would decode, of frames: latents [channels, frames, height, width], or of
        an image as its pipeline has them.
        """
        made = self._call(prompt, seed, "latent", overrides)
        return (made.frames[0] if "frames" in made else made.images[:1]).float().cpu().numpy()

    def _call(self, prompt: str, seed: int, kind: str, overrides: Mapping[str, Any]) -> Any:
        generator = torch.Generator("cpu").manual_seed(seed)
        call = {**self.kind.call(self.pipe, self.config.call), **overrides}
        known = signature(self.pipe.__call__).parameters
        for name in call:
            if name not in known:
                raise AccelError(
                    f"model.call.{name}: {self.config.pipeline} takes no such argument;"
                    f" {nearest(name, known)}"
                )
        if prompt not in self._given:
            self._given[prompt] = self.kind.given(self, prompt)
        try:
            return self.pipe(self._given[prompt], generator=generator, output_type=kind, **call)
        except ValueError as error:
            if isinstance(error, AccelError):
                raise
            raise AccelError(f"{self.config.pipeline} refuses {call}: {error}") from error
