"""The sections of a report that show frames: moving, as strips, and what differs from dense."""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from accel.files import write_atomically
from accel.pipelines import figures
from accel.pipelines.report_parts import image, section
from accel.pipelines.video_files import encode_animation, load_frames

__all__ = ["videos"]

ANIMATION_SIDE = 192  # pixels; smaller frames are enlarged
UNFOLDED_TO = 8  # arms: of more, the frames are folded away


def videos(folder: Path, results: Mapping[str, Any], shown: str) -> list[str]:
    """A section for the first prompt, and for the one in which the shown arm is furthest from
    dense; with `animations/*.gif` in the folder.
    """
    return [_videos(folder, results, prompt) for prompt in _prompts(results["arms"][shown])]


def _prompts(arm: Mapping[str, Any]) -> list[int]:
    """The first prompt, and the one in which the shown arm is furthest from dense."""
    made = {n: v.get("psnr", np.inf) for n, v in enumerate(arm.get("videos", ())) if v}
    return sorted({min(made), min(made, key=made.__getitem__)}) if made else []


def _videos(folder: Path, results: Mapping[str, Any], prompt: int) -> str:
    videos = {}
    for name, arm in results["arms"].items():
        made = arm.get("videos", [])
        if prompt < len(made) and made[prompt]:
            videos[name] = load_frames(folder / made[prompt]["file"])
    fps = results["settings"]["fps"]
    moving, still = [], []
    for name, video in videos.items():
        gif = encode_animation(video, "gif", fps=fps, min_side=ANIMATION_SIDE)
        write_atomically(folder / "animations" / f"p{prompt:02d}-{name}.gif", gif)
        webp = encode_animation(video, "webp", fps=fps, min_side=ANIMATION_SIDE)
        label = f"<figcaption>{escape(name)}</figcaption>"
        moving.append(f"<figure>{image(webp, 'webp', f'{name}, moving')}{label}</figure>")
        still.append(_stills(name, video, videos.get("dense")))
    text = results["settings"]["prompts"][prompt]
    content = (
        f"<div class=moving>{''.join(moving)}</div>"
        f"<details{' open' if len(videos) <= UNFOLDED_TO else ''}><summary>Frames and differences"
        "</summary><div class=strips><span></span><span>frames from first to last</span>"
        f"<span>difference to dense, {figures.AMPLIFIED} times</span>{''.join(still)}</div>"
        "</details>"
    )
    return section(f"Prompt {prompt + 1}: “{text}”", content)


def _stills(name: str, video: np.ndarray, dense: np.ndarray | None) -> str:
    frames = image(figures.strip(video), "png", f"{name}, frames")
    apart = "<i>reference</i>" if name == "dense" else ""
    if dense is not None and name != "dense":
        apart = image(figures.strip(figures.difference(video, dense)), "png", f"{name}, difference")
    return f"<b>{escape(name)}</b><div>{frames}</div><div>{apart}</div>"
