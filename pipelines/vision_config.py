"""`config.json` of a vision model: timm's own layout, with what a pipeline needs beside it.

A folder of a classifier is also one that timm reads: `timm.create_model("local-dir:FOLDER",
pretrained=True)`. The file is untrusted: nothing in it names a class, a file or a place to load
from, and every number in it is bounded.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

from torch import nn

from accel.errors import AccelError, PlanError, nearest
from accel.pipelines.segmenter import Segmenter
from accel.untrusted import bounded_int, check_whole, finite, table, typed

__all__ = ["CONFIG", "VisionConfig"]

CONFIG = "config.json"
TASKS = ("classification", "segmentation")
MOST_BYTES = 2**22
MOST_CLASSES = 2**16
MOST = 4096  # pixels of a side, channels, blocks: any number in model_args
MOST_LISTED = 64
LONGEST = 256  # letters of a name
CROPS = ("squash", "center")
INTERPOLATIONS = ("bilinear", "bicubic")
# keys of the file, and of `pretrained_cfg` in it; those that only timm reads are written, not read
KEYS = {
    *("architecture", "num_classes", "label_names", "model_args", "pretrained_cfg"),
    *("num_features", "global_pool", "label_descriptions"),
    *("task", "size", "head_width"),
}
# arguments of timm's factory that say where weights come from, or that the pipeline decides
NEVER = {
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"),
    *("scriptable", "exportable", "no_jit", "pretrained_model_args", "pruned", "device", "dtype"),
    *("features_only", "feature_cls", "num_classes", "in_chans", "model_name"),
}
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class VisionConfig:
    """What a vision model is, without its weights.

    architecture, model_args: of `timm.create_model`; classes: their names, in the model's order.
    task: `classification`, or `segmentation` by a `Segmenter` with a head of `head_width` channels.
    mean, std: of colours in [0, 1]. size: (height, width) that images are brought to; None: as
    they are, for models that take any size. crop_mode: `squash`, whatever an image's shape, or
    `center`, the largest part of that shape from its middle; crop_pct: the share of either side
    that is seen; interpolation: of both. These are timm's.
    """

    architecture: str
    classes: tuple[str, ...]
    task: str = "classification"
    model_args: Mapping[str, Any] = field(default_factory=dict)
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF
    size: tuple[int, int] | None = None
    head_width: int = 64
    crop_pct: float = 1.0
    crop_mode: str = "squash"
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise AccelError(f"task {self.task!r:.80} is unknown; {nearest(str(self.task), TASKS)}")
        _check_names(self.architecture, self.classes)
        object.__setattr__(self, "classes", tuple(self.classes))
        object.__setattr__(self, "model_args", _arguments(self.model_args))
        for name in ("mean", "std"):
            values = tuple(getattr(self, name))
            if len(values) != 3 or not all(finite(v) and abs(v) <= MOST for v in values):
                raise AccelError(f"{name} is {values!r:.80}; it is three numbers, one a colour")
            object.__setattr__(self, name, tuple(map(float, values)))
        if min(self.std) <= 0:
            raise AccelError(f"std is {self.std}; give numbers above 0")
        for name, known in (("crop_mode", CROPS), ("interpolation", INTERPOLATIONS)):
            word = getattr(self, name)
            if word not in known:
                raise AccelError(f"{name} is {word!r:.80}; {nearest(str(word), known)}")
        if not finite(self.crop_pct) or not 0.1 <= self.crop_pct <= 1:
            raise AccelError(f"crop_pct is {self.crop_pct!r:.80}; it is a share from 0.1 to 1")
        if self.task == "segmentation" and (self.crop_pct, self.crop_mode) != (1, "squash"):
            raise AccelError(
                "every pixel of a segmentation is seen; leave crop_pct and crop_mode out"
            )
        check_whole("head_width", self.head_width, 1)
        sides = () if self.size is None else tuple(self.size)
        if self.size is not None:
            if len(sides) != 2:
                raise AccelError(f"size is {self.size!r:.80}; give (height, width) in pixels")
            object.__setattr__(self, "size", sides)
        for side in (*sides, self.head_width):
            check_whole("a side of size", side, 1)
            if side > MOST:
                raise AccelError(f"{side} is too large for a size or a head_width; {MOST} at most")

    def build(self) -> nn.Module:
        """A new model with weights as timm begins them; nothing is downloaded."""
        import timm

        classes = len(self.classes)
        segments = self.task == "segmentation"
        if not timm.is_model(self.architecture):
            raise AccelError(
                f"timm has no architecture {self.architecture!r}; "
                + nearest(self.architecture, _kin(self.architecture))
            )
        more: dict[str, Any] = {"num_classes": classes}
        if segments:
            # a getter keeps the model whole inside, under the names of its own modules
            more = {"features_only": True, "feature_cls": "getter"}
        try:
            made: nn.Module = timm.create_model(self.architecture, **{**self.model_args, **more})
        except (TypeError, ValueError, AssertionError, RuntimeError, AttributeError) as error:
            raise AccelError(self._refused(error)) from error
        return Segmenter(made, classes, self.head_width) if segments else made

    def _refused(self, error: Exception) -> str:
        """Why timm takes these arguments for no model, with the nearest it takes."""
        import timm

        told = f"timm makes no {self.architecture!r} of {dict(self.model_args)!r:.300}: {error}"
        module = import_module(timm.model_entrypoint(self.architecture).__module__)
        for cls in vars(module).values():
            if isinstance(cls, type) and f"{cls.__name__}.__init__" in str(error):
                known = set(signature(cls).parameters) - NEVER
                for name in set(self.model_args) - known:
                    return f"model_args has no {name!r}; {nearest(name, known)}"
        return told

    def save(self, folder: Path, model: nn.Module) -> None:
        """Write `config.json`, as timm has it. model: what timm's own part is read of."""
        size = self.size or _made_for(model)
        timms = dict(getattr(model, "pretrained_cfg", None) or {})
        kept = ("first_conv", "classifier", "fixed_input_size", "pool_size")
        content = {
            "architecture": self.architecture,
            "num_classes": len(self.classes),
            "label_names": list(self.classes),
            "model_args": dict(self.model_args),
            "pretrained_cfg": {
                **{name: timms[name] for name in kept if timms.get(name) is not None},
                "num_classes": len(self.classes),
                "input_size": [3, *size],
                "mean": list(self.mean),
                "std": list(self.std),
                "crop_pct": self.crop_pct,
                "crop_mode": self.crop_mode,
                "interpolation": self.interpolation,
            },
            "task": self.task,
            "size": None if self.size is None else list(self.size),
            "head_width": self.head_width,
        }
        (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def of(cls, name: str | os.PathLike[str]) -> "VisionConfig":
        """Of a folder with `config.json`, or of a model of timm by its name."""
        folder = Path(name)
        return cls.load(folder) if folder.exists() or not _is_timms(str(name)) else cls._timms(name)

    @classmethod
    def _timms(cls, name: Any) -> "VisionConfig":
        """Of a classifier of timm, prepared as timm says; its classes are numbers."""
        import timm
        import torch

        with torch.device("meta"):
            model: Any = timm.create_model(name)
        data = timm.data.resolve_model_data_config(model)
        mode = data["interpolation"]
        return cls(
            architecture=name.partition(".")[0],
            classes=tuple(map(str, range(model.num_classes))),
            mean=tuple(data["mean"]),
            std=tuple(data["std"]),
            size=tuple(data["input_size"][1:]),
            crop_pct=data["crop_pct"],
            crop_mode="squash" if data["crop_mode"] == "squash" else "center",
            interpolation=mode if mode in INTERPOLATIONS else cls.interpolation,
        )

    @classmethod
    def load(cls, folder: Path) -> "VisionConfig":
        """Read and check `config.json` of a folder."""
        path = folder / CONFIG
        try:
            if path.stat().st_size > MOST_BYTES:
                raise AccelError(f"{path} is larger than a configuration, {MOST_BYTES} bytes")
            content = json.loads(
                path.read_text(encoding="utf-8"), parse_constant=_constant, parse_int=bounded_int
            )
            return cls._read(content)
        except (OSError, ValueError, AccelError, RecursionError) as error:
            raise AccelError(f"no vision model can be read from {path}: {error}") from error

    @classmethod
    def _read(cls, content: Any) -> "VisionConfig":
        needed = {"architecture", "label_names", "pretrained_cfg", "task"}
        content = table(CONFIG, content, KEYS, needed)
        timms = table("pretrained_cfg", content["pretrained_cfg"], None, {"mean", "std"})
        size = content.get("size")
        made = cls(
            architecture=typed("architecture", content["architecture"], str),
            classes=tuple(typed("label_names", content["label_names"], list)),
            task=typed("task", content["task"], str),
            model_args=table("model_args", content.get("model_args", {}), None, set()),
            mean=tuple(typed("mean", timms["mean"], list)),
            std=tuple(typed("std", timms["std"], list)),
            size=None if size is None else tuple(typed("size", size, list)),
            head_width=content.get("head_width", cls.head_width),
            crop_pct=timms.get("crop_pct", cls.crop_pct),
            crop_mode=timms.get("crop_mode", cls.crop_mode),
            interpolation=timms.get("interpolation", cls.interpolation),
        )
        if content.get("num_classes", len(made.classes)) != len(made.classes):
            raise PlanError(
                f"num_classes is {content['num_classes']!r:.80}, but label_names has"
                f" {len(made.classes)} names"
            )
        return made


def _is_timms(name: str) -> bool:
    import timm

    return timm.is_model(name.partition(".")[0]) and "/" not in name


def _constant(word: str) -> None:
    raise PlanError(f"{word} is not a number that a configuration may hold")


def _check_names(architecture: Any, classes: Any) -> None:
    if not isinstance(architecture, str) or not architecture.isidentifier():
        raise AccelError(
            f"architecture is {architecture!r:.80}; give a name of timm.list_models(), and no tag"
        )
    good = all(isinstance(name, str) and 0 < len(name) <= LONGEST for name in classes)
    if isinstance(classes, str) or not good or not 1 <= len(classes) <= MOST_CLASSES:
        raise AccelError(
            f"classes must be 1 to {MOST_CLASSES} names of at most {LONGEST} letters, got"
            f" {classes!r:.80}"
        )


def _arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of an architecture: numbers, switches and words, and lists of them."""
    if len(given) > MOST_LISTED:
        raise AccelError(f"model_args has {len(given)} keys; {MOST_LISTED} at most")
    for name in given:
        if name in NEVER or not isinstance(name, str) or not name.isidentifier():
            raise AccelError(
                f"model_args.{name!s:.80} is decided elsewhere; leave it out. model_args are those"
                " of the architecture, as img_size or window_size"
            )
    return {name: _argument(f"model_args.{name}", value, 0) for name, value in given.items()}


def _argument(name: str, value: Any, depth: int) -> Any:
    if isinstance(value, list | tuple) and depth < 3 and len(value) <= MOST_LISTED:
        return tuple(_argument(name, item, depth + 1) for item in value)
    plain = value is None or isinstance(value, bool)
    word = isinstance(value, str) and len(value) <= LONGEST
    if plain or word or (finite(value) and abs(value) <= MOST):
        return value
    raise AccelError(
        f"{name} is {value!r:.80}; it is a number of at most {MOST}, a switch, a word, or a list of"
        f" at most {MOST_LISTED} of these"
    )


def _made_for(model: nn.Module) -> tuple[int, int]:
    """(height, width) of the images that a model of timm was made for."""
    for module in model.modules():
        size = getattr(getattr(module, "patch_embed", None), "img_size", None)
        if size is not None:
            return int(size[0]), int(size[1])
    known = getattr(model, "pretrained_cfg", None) or {}
    height, width = known.get("input_size", (3, 224, 224))[1:]
    return int(height), int(width)


def _kin(architecture: str) -> list[str]:
    """Names of timm that begin as this one does: all of them are too many to tell."""
    import timm

    found: list[str] = timm.list_models(architecture.partition("_")[0][:4] + "*")
    return found
