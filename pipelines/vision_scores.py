"""How right predicted classes are: counts of one group of images, and shares of all of them.

IoU of a class is the number of pixels that both have of it, over those that either has; mIoU is its
mean over classes. Counts are summed over all images first, so that an image that shows little of a
class counts little; classes that neither has anywhere are left out.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel.errors import AccelError
from accel.pipelines.paths import find_path
from accel.pipelines.vision_config import VisionConfig
from accel.pipelines.vision_images import IGNORED, folder_of

__all__ = ["Judge", "counts_of", "scores_of"]

Classes = NDArray[np.int64]


def counts_of(found: Classes, right: Classes, classes: int) -> dict[str, Any]:
    """Of every class: `both`, as found and as right; `either`. `places`: that are not ignored.

    found, right: [images] of a classification, [images, height, width] of a segmentation.
    """
    counted = right != IGNORED if right.ndim > 1 else np.ones_like(right, bool)
    found, right = found[counted], right[counted]
    both = np.bincount(found[found == right], minlength=classes)
    either = np.bincount(found, minlength=classes) + np.bincount(right, minlength=classes) - both
    return {"both": both.tolist(), "either": either.tolist(), "places": int(counted.sum())}


def scores_of(counts: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> dict[str, Any]:
    """`right`: the share of places; `iou`: by class; `miou`. None, and no classes, of nothing."""
    places = sum(one["places"] for one in counts)
    if not places:
        return {"right": None, "iou": {}, "miou": None}
    both = np.sum([one["both"] for one in counts], axis=0)
    either = np.sum([one["either"] for one in counts], axis=0)
    iou = {name: float(b / e) for name, b, e in zip(classes, both, either, strict=True) if e}
    return {"right": float(both.sum() / places), "iou": iou, "miou": mean(iou.values())}


class Judge:
    """What is right of images, and the names of classes."""

    def __init__(self, config: Any) -> None:
        self._config = config
        self.model = VisionConfig.load(Path(find_path(config.path)))

    def right(self, prompt: str) -> Classes | None:
        """The classes of the images of a prompt, or of their pixels."""
        paths = (self._config.images, self._config.calibration_images)
        folder, group = folder_of(prompt, *paths)
        return folder.right(group, self.model.classes, self.model.task)

    def counts(self, found: Classes, prompt: str) -> dict[str, Any] | None:
        """`counts_of` what was found in the images of a prompt; None where nobody knows better."""
        right = self.right(prompt)
        if right is None:
            return None
        if found.shape != right.shape:
            raise AccelError(
                f"{prompt!r}: classes are found of {list(found.shape)}, and known of"
                f" {list(right.shape)}; maps of classes are as large as their images"
            )
        return counts_of(found, right, len(self.model.classes))
