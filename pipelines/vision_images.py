"""Folders of images with what is right: what prompts name where a model sees images.

    test/000.png  test/000-classes.png    a segmentation: 8 bits a pixel, class number, 255 ignored
    test/000.png  test/labels.json        a classification: {"000": "seven", ...}

A prompt is one image or a group of them in the order of their names, with the folder's own name
before it: `test/000`, `test/000-007`. Of a folder, groups are of as many images as a call takes,
and of more where that is few, so that a group is worth timing; what is left over is left out.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from accel.errors import AccelError, nearest
from accel.pipelines.paths import find_path
from accel.untrusted import refuse_constant, table, typed

__all__ = ["IGNORED", "ImageFolder", "folder_of"]

GROUP = 8  # images, where a call takes fewer
IGNORED = 255
CLASSES = "-classes"
LABELS = "labels.json"
MOST_PIXELS = 2**26


@dataclass(frozen=True)
class ImageFolder:
    """Images of a folder by their names, in order."""

    path: Path
    names: tuple[str, ...]

    @classmethod
    def of(cls, path: str) -> "ImageFolder":
        """The images below the current directory or below the checkout."""
        folder = Path(find_path(path))
        names = sorted(file.stem for file in folder.glob("*.png"))
        names = [name for name in names if not name.endswith(CLASSES)]
        if not names:
            raise AccelError(f"images: there is no folder {path!r} with images NNN.png")
        return cls(folder, tuple(names))

    def groups(self, batch: int) -> tuple[str, ...]:
        """Prompts for all images, `batch` in a call of the model."""
        batch = min(batch, len(self.names))
        size = max(min(GROUP, len(self.names)) // batch, 1) * batch
        starts = range(0, len(self.names) - size + 1, size)
        parts = [self.names[start : start + size] for start in starts]
        return tuple(
            f"{self.path.name}/{part[0]}" + (f"-{part[-1]}" if len(part) > 1 else "")
            for part in parts
        )

    def members(self, group: str) -> tuple[str, ...]:
        """The names of the images of a prompt, which is given without the folder's name."""
        if group in self.names:
            return (group,)
        for at in (i for i, letter in enumerate(group) if letter == "-"):
            first, last = group[:at], group[at + 1 :]
            if first in self.names and last in self.names and first <= last:
                return self.names[self.names.index(first) : self.names.index(last) + 1]
        raise AccelError(
            f"no images {group!r} in {self.path}; give a name, or the first and the last one as"
            f" {self.names[0]}-{self.names[-1]}. {nearest(group.partition('-')[0], self.names[:9])}"
        )

    def images(self, group: str) -> list[Image.Image]:
        """The pictures of a prompt."""
        return [_opened(self.path / f"{name}.png").convert("RGB") for name in self.members(group)]

    def digest(self, group: str) -> str:
        """Names what the images of a prompt show."""
        digest = hashlib.sha256()
        for name in self.members(group):
            digest.update((self.path / f"{name}.png").read_bytes())
        return digest.hexdigest()[:16]

    @property
    def answers(self) -> str:
        """Names what is right of all images."""
        digest = hashlib.sha256()
        for file in sorted([*self.path.glob(f"*{CLASSES}.png"), *self.path.glob(LABELS)]):
            digest.update(file.name.encode() + file.read_bytes())
        return digest.hexdigest()[:16]

    def right(self, group: str, classes: Sequence[str], task: str) -> NDArray[np.int64] | None:
        """Class numbers, [images] or [images, height, width]; None where the folder has none."""
        names = self.members(group)
        if task == "classification":
            labels = self._labels(classes)
            return np.array([labels[name] for name in names]) if labels else None
        files = [self.path / f"{name}{CLASSES}.png" for name in names]
        if not any(file.is_file() for file in files):
            return None
        maps = [np.asarray(_opened(file), np.int64) for file in files]
        for file, one in zip(files, maps, strict=True):
            if one.ndim != 2 or one.shape != maps[0].shape:
                raise AccelError(f"{file} is no map of classes of {maps[0].shape}, 8 bits a pixel")
            numbers = np.unique(one)
            wrong = numbers[(numbers >= len(classes)) & (numbers != IGNORED)]
            if len(wrong):
                raise AccelError(
                    f"{file} has class {wrong[0]}; the model has {len(classes)} classes, from 0,"
                    f" and {IGNORED} is ignored"
                )
        return np.stack(maps)

    def _labels(self, classes: Sequence[str]) -> dict[str, int]:
        path = self.path / LABELS
        if not path.is_file():
            return {}
        try:
            data = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse_constant)
            found = table(str(path), data, None, set(self.names))
            named = {name: typed(f"{path}: {name}", found[name], str) for name in self.names}
        except (ValueError, RecursionError) as error:
            raise AccelError(f"{path} does not name the class of every image: {error}") from error
        for name, word in named.items():
            if word not in classes:
                raise AccelError(
                    f"{path}: {name} is {word!r:.80}; {nearest(word, list(classes)[:99])}"
                )
        return {name: list(classes).index(word) for name, word in named.items()}


def folder_of(prompt: str, *paths: str) -> tuple[ImageFolder, str]:
    """The folder that a prompt is of, among those at `paths`, and the prompt without its name; one
    without a folder's name is of the first.
    """
    given = [path for path in paths if path]
    name, slash, group = prompt.rpartition("/")
    for path in given:
        if not slash or Path(path).name == name:
            return ImageFolder.of(path), group
    known = [Path(path).name for path in given]
    raise AccelError(f"images {prompt!r} are of no folder here; {nearest(name, known)}")


def _opened(path: Path) -> Image.Image:
    try:
        with Image.open(path) as file:
            if file.width * file.height > MOST_PIXELS:
                raise AccelError(f"{path} is too large an image, {MOST_PIXELS} pixels at most")
            return file.copy()
    except OSError as error:
        raise AccelError(f"image {str(path)!r} cannot be read: {error}") from error
