"""What tables and pictures say of what is seen in images: images a second, mIoU, agreement."""

from collections.abc import Mapping
from typing import Any

from accel.pipelines.measures import Column, Measure, Quality, above_front, number
from accel.pipelines.output import Picture

__all__ = ["PICTURES", "QUALITY", "SPEED"]


def _percent(*path: str) -> Any:
    def of(arm: Mapping[str, Any]) -> float | None:
        found: Any = arm
        for key in path:
            found = None if found is None else found.get(key)
        return None if found is None else 100 * found

    return of


SCORE = Quality(
    label="mIoU, of a classifier top-1 (percent)",
    of=_percent("score"),
    worst=lambda arm: None,  # of all images together
    name="score",
    short="score",
    unit="points",
    floor=0.0,
    cap=100.0,
)
AGREEMENT = Quality(
    label="classed as dense has it (percent)",
    of=_percent("agreement", "mean"),
    worst=_percent("agreement", "worst"),
    name="agreement",
    short="agreement",
    unit="points of agreement",
    floor=0.0,
    cap=100.0,
)
IMAGES = Measure("images a second", lambda arm: arm.get("images_per_second"))
PICTURES = (
    Picture("trade-off.svg", IMAGES, SCORE, "A mark is of all images together."),
    Picture(
        "agreement.svg",
        IMAGES,
        AGREEMENT,
        "A mark is the mean over all images, the whisker goes down to the group of images that is"
        " least like dense's.",
    ),
)
SPEED = (
    Column(
        "images/s",
        "images over the seconds that they took, from pixels in memory to classes: median",
        number("{:.1f}", "images_per_second"),
    ),
    Column(
        "ms a batch",
        "milliseconds of one call of the model: median",
        number("{:.2f}", "batch_seconds", times=1000.0),
    ),
    Column(
        "compile s",
        "seconds that the first call took longer than another one; in no other number",
        number("{:.1f}", "compile_seconds"),
    ),
)
QUALITY = (
    Column(
        "mIoU",
        "intersection over union of found and right pixels of a class, of all images together, in"
        " the mean over the classes that there are",
        number("{:.2%}", "miou"),
    ),
    Column("top-1", "share of images whose class is right", number("{:.2%}", "top1")),
    Column(
        "points",
        "how far mIoU, or top-1, is from that of dense, in points",
        number("{:+.2f}", "score_change", times=100.0),
    ),
    Column(
        "front points",
        "what the (first) front is worth at the measured time of this arm, above this arm's mIoU"
        " or top-1, in points: linear between those of its points that no other beats",
        above_front,
    ),
    Column(
        "scaled points",
        "what the fastest dense model is worth on inputs so small that it takes as long, above this"
        " arm's mIoU or top-1, in points; below zero the arm is better than that",
        number("{:+.2f}", "against_scaled", "above"),
    ),
    Column(
        "agreement",
        "share of pixels, of a classifier of images, that have the class that dense found: mean",
        number("{:.2%}", "agreement", "mean"),
    ),
)
