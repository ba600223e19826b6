"""The sections of a report that show what was seen in images: maps of classes, what differs from
dense, and which windows were computed.
"""

import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image

from accel.pipelines.paths import find_path
from accel.pipelines.report_parts import image, section
from accel.pipelines.vision_config import VisionConfig
from accel.pipelines.vision_images import IGNORED, ImageFolder, folder_of
from accel.pipelines.vision_output import ClassesOutput, Seen

__all__ = ["by_class", "kept_over", "pictures"]

SIDE = 256  # pixels of a picture in the page, of images that are larger
SHOWN = 3  # images of one report
LISTED = 24  # images of a classifier, whose classes are listed

Pixels = NDArray[np.uint8]


def by_class(results: Mapping[str, Any]) -> str:
    """IoU of every arm by class; nothing of a classifier."""
    arms = {name: arm["iou"] for name, arm in results["arms"].items() if arm.get("iou")}
    classes = list(dict.fromkeys(name for found in arms.values() for name in found))
    if not classes:
        return ""
    dense = arms.get("dense", {})
    rows = []
    for name, found in arms.items():
        cells = "".join(f"<td>{_share(found.get(c), dense.get(c))}</td>" for c in classes)
        rows.append(f"<tr><td>{escape(name)}</td>{cells}</tr>")
    head = "".join(f"<th>{escape(name)}</th>" for name in classes)
    return section(
        "IoU by class",
        f"<div class=wide><table><thead><tr><th>arm</th>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
        "<p>Intersection over union in percent, of all images together, and how many points that is"
        " above or below dense.</p>",
    )


def _share(found: float | None, dense: float | None) -> str:
    if found is None:
        return "-"
    apart = "" if dense in (None, found) else f" <i>{100 * (found - dense):+.1f}</i>"
    return f"{100 * found:.1f}{apart}"


def pictures(folder: Path, results: Mapping[str, Any], shown: str) -> list[str]:
    """The first image, and those in which the shown arm is furthest from dense; of a classifier a
    list of classes.
    """
    settings, seen = results["settings"], _seen(folder, results)
    if "dense" not in seen:
        return []
    classes = VisionConfig.load(Path(find_path(settings["model_path"]))).classes
    (_, first), *_ = seen["dense"].items()
    if first.labels.ndim == 1:
        return [_classified(settings, seen, classes)]
    return [_maps(settings, seen, classes, at) for at in _chosen(seen, shown)]


def _seen(folder: Path, results: Mapping[str, Any]) -> dict[str, dict[int, Seen]]:
    """What every arm saw, by the number of the prompt."""
    kind = ClassesOutput()
    return {
        name: made
        for name, arm in results["arms"].items()
        if (
            made := {
                number: kind.load(folder / one["file"])
                for number, one in enumerate(arm.get("groups") or ())
                if one
            }
        )
    }


def _chosen(seen: Mapping[str, Mapping[int, Seen]], shown: str) -> list[tuple[int, int]]:
    """(prompt, number of the image in it): the first, then those with the most differences."""
    dense, own = seen["dense"], seen.get(shown, seen["dense"])
    differ = {
        (prompt, number): float((one != dense[prompt].labels[number]).mean())
        for prompt, made in own.items()
        if prompt in dense
        for number, one in enumerate(made.labels)
    }
    first = min(differ)
    worst = sorted(differ, key=lambda at: (-differ[at], at))
    return sorted(dict.fromkeys([first, *worst][: SHOWN + 1]))[:SHOWN]


def _maps(
    settings: Mapping[str, Any],
    seen: Mapping[str, Mapping[int, Seen]],
    classes: Sequence[str],
    at: tuple[int, int],
) -> str:
    prompt, number = at
    folder, group = _folder(settings, prompt)
    name = folder.members(group)[number]
    pixels = np.asarray(folder.images(group)[number])
    dense = seen["dense"][prompt].labels[number]
    right = folder.right(group, classes, "segmentation")
    figures = [_figure(pixels, "image")]
    if right is not None:
        figures.append(_figure(coloured(right[number], len(classes)), "what is right"))
    figures.append(_figure(coloured(dense, len(classes)), "dense"))
    rows = [f"<div class=moving>{''.join(figures)}</div>"]
    for arm, made in seen.items():
        if arm == "dense" or prompt not in made:
            continue
        labels = made[prompt].labels[number]
        apart = float((labels != dense).mean())
        parts = [
            _figure(coloured(labels, len(classes)), arm),
            _figure(differing(pixels, labels != dense), f"{apart:.2%} differs from dense"),
        ]
        for stage, kept in made[prompt].windows.items():
            if number < len(kept):
                told = f"{stage}: {kept[number].mean():.0%} of its windows"
                parts.append(_figure(kept_over(pixels, kept[number]), told))
        rows.append(f"<div class=moving>{''.join(parts)}</div>")
    return section(f"Image {folder.path.name}/{name}", "\n".join(rows))


def _classified(
    settings: Mapping[str, Any],
    seen: Mapping[str, Mapping[int, Seen]],
    classes: Sequence[str],
) -> str:
    """The first images with the class that each arm found; wrong ones are marked."""
    arms = list(seen)
    rows = []
    for prompt, first in seen["dense"].items():
        folder, group = _folder(settings, prompt)
        right = folder.right(group, classes, "classification")
        images = folder.images(group)
        for number, name in enumerate(folder.members(group)):
            if len(rows) == LISTED:
                break
            known = first.labels[number] if right is None else right[number]
            cells = []
            for arm in arms:
                made = seen[arm].get(prompt)
                found = None if made is None else made.labels[number]
                word = "-" if found is None else escape(classes[found])
                cells.append(f"<td>{word if found == known else f'<mark>{word}</mark>'}</td>")
            truth = "-" if right is None else escape(classes[known])
            small = image(_png(np.asarray(images[number]), 48), "png", name)
            rows.append(f"<tr><td>{small} {escape(name)}</td><td>{truth}</td>{''.join(cells)}</tr>")
    head = "".join(f"<th>{escape(arm)}</th>" for arm in arms)
    return section(
        "Classes of the first images",
        f"<div class=wide><table><thead><tr><th>image</th><th>right</th>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div><p>Marked: what is not right, or, where"
        " nobody knows what is, not what dense found.</p>",
    )


def _folder(settings: Mapping[str, Any], prompt: int) -> tuple[ImageFolder, str]:
    return folder_of(settings["prompts"][prompt], settings["images"])


def coloured(labels: NDArray[np.integer], classes: int) -> Pixels:
    """A colour for each class: the first, which is most of an image, is near white; what is ignored
    is grey.
    """
    palette = np.array([colormaps["tab20"](i % 20)[:3] for i in range(max(classes, IGNORED + 1))])
    palette[1:] = palette[:-1].copy()
    palette[0] = 0.97
    shown = (255 * palette).astype(np.uint8)
    if classes <= IGNORED:
        shown[IGNORED] = 128
    return shown[labels]


def differing(pixels: Pixels, where: NDArray[np.bool_]) -> Pixels:
    """The image pale and grey, with the pixels that differ in red."""
    grey = 192 + pixels.mean(-1, keepdims=True).repeat(3, -1) / 4
    grey[where] = (200, 30, 30)
    return grey.astype(np.uint8)


def kept_over(pixels: Pixels, kept: NDArray[np.bool_]) -> Pixels:
    """The image, dark where windows are not kept, with the outline of every window.

    kept: [rows, columns] of windows, which cover the image evenly; those at its edge may reach
    beyond it, where the model fills them up, so that pictures are a little off there.
    """
    height, width = pixels.shape[:2]
    rows = np.arange(height) * kept.shape[0] // height
    columns = np.arange(width) * kept.shape[1] // width
    shown = pixels.astype(np.float32)
    shown[~kept[rows][:, columns]] *= 0.25
    edges = (np.diff(rows, prepend=-1) > 0)[:, None] | (np.diff(columns, prepend=-1) > 0)
    shown[edges] = 0.5 * shown[edges] + (10, 60, 55)
    return shown.astype(np.uint8)


def _figure(pixels: Pixels, told: str) -> str:
    caption = f"<figcaption>{escape(told)}</figcaption>"
    return f"<figure>{image(_png(pixels, SIDE), 'png', told)}{caption}</figure>"


def _png(pixels: Pixels, side: int) -> bytes:
    """At most `side` pixels high, by whole steps, so that lines and colours stay what they are."""
    step = max(1, -(-pixels.shape[0] // side))
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels[::step, ::step])).save(buffer, "png", optimize=True)
    return buffer.getvalue()
