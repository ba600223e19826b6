"""Moving handwritten digits on drifting textures: the data of the sample models.

Every video is a pure function of `(seed, index)`: `make_video(seed, index)` gives the same pixels
on every call. The scans are the 8x8 UCI optical digits that ship with scikit-learn; four fifths of
the writers' scans are for training and one fifth is held out (`SPLITS`). Axis order is (t, h, w),
pixel values lie in [-1, 1].

The backgrounds are band-limited coloured noise that drifts at a constant velocity. They are there
for a reason: on plain canvases most tokens have nothing to look at, their attention stays uniform,
and a sparse pattern has nothing to find.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

__all__ = [
    "CANVAS",
    "DIGIT_WORDS",
    "MOTIONS",
    "Actor",
    "Scene",
    "coloured_field",
    "coverage",
    "draw_scene",
    "make_video",
    "positions",
    "prompt_of",
    "render",
    "scans",
    "stroke",
]

CANVAS = 64  # pixels, height and width
FRAMES = 33
CASTS = 32
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MOTIONS = {
    "moving left": (0, -1),
    "moving right": (0, 1),
    "moving up": (-1, 0),
    "moving down": (1, 0),
    "standing still": (0, 0),
}
SPLITS = ("train", "held-out")
_FIELD = (
    112  # pixels of the background field: the canvas plus room for the largest drift on either side
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Actor:
    """One digit: which scan, where its centre starts (pixels), how it moves (pixels per frame), how
    it is drawn.
    """

    digit: int
    scan: int
    motion: str
    start: tuple[float, float]
    velocity: tuple[float, float]
    size: float
    shear: float
    colour: tuple[float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Everything that decides the pixels of a video."""

    actors: tuple[Actor, ...]
    texture_seed: int
    wavelength: float
    drift: tuple[float, float]


def prompt_of(scene: Scene) -> str:
    """`a two moving right and a nine moving down`."""
    return " and ".join(
        f"{'an' if actor.digit == 8 else 'a'} {DIGIT_WORDS[actor.digit]} {actor.motion}"
        for actor in scene.actors
    )


@cache
def scans(split: Literal["train", "held-out"]) -> tuple[torch.Tensor, torch.Tensor]:
    """Scans `[n, 8, 8]` in [0, 1] and their digits `[n]`; every fifth scan is held out."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    data = load_digits()
    held_out = np.arange(len(data.target)) % 5 == 4
    chosen = held_out if split == "held-out" else ~held_out
    return torch.from_numpy(data.images[chosen]).float() / 16, torch.from_numpy(
        data.target[chosen]
    ).long()


def positions(actor: Actor, frames: int) -> np.ndarray:
    """Centres `[frames, 2]` as (h, w): straight lines folded back at the border."""
    low, high = actor.size / 2, CANVAS - actor.size / 2
    line = np.asarray(actor.start) + np.arange(frames)[:, None] * np.asarray(actor.velocity)
    phase = (line - low) % (2 * (high - low))
    return low + np.minimum(phase, 2 * (high - low) - phase)


def _draw_actor(
    rng: np.random.Generator, digit: int, motion: str, labels: torch.Tensor, size: float
) -> Actor:
    """An actor that starts far enough upstream that its prompted direction dominates the clip."""
    scan = int(rng.choice(np.flatnonzero(labels.numpy() == digit)))
    low, high = size / 2, CANVAS - size / 2
    speed = rng.uniform(0.65, 1.0)
    start, velocity = [], []
    for sign in MOTIONS[motion]:
        upstream = rng.uniform(0.0, 0.3) if sign else rng.uniform(0.0, 1.0)
        start.append(low + (high - low) * (1 - upstream if sign < 0 else upstream))
        velocity.append(sign * speed)
    colour = rng.uniform(0.85, 1.0, 3)
    return Actor(
        digit=digit,
        scan=scan,
        motion=motion,
        start=tuple(start),
        velocity=tuple(velocity),
        size=size,
        shear=rng.uniform(-0.15, 0.15),
        colour=tuple(colour),
    )


def _in_reading_order(a: Actor, b: Actor) -> tuple[Actor, Actor]:
    """The left one first, or the upper one where they lie further apart in height, on average.

    Prompts name digits in this order. Without it nothing says which of two digits with the same
    motion goes where, and a model draws something between both in both places.
    """
    apart = (positions(b, FRAMES) - positions(a, FRAMES)).mean(0)
    return (a, b) if apart[np.abs(apart).argmax()] >= 0 else (b, a)


def draw_scene(
    seed: int, index: int, *, split: Literal["train", "held-out"] = "train", two: float = 0.4
) -> Scene:
    """The scene of video `index`; a share `two` of the scenes holds two different digits, the left
    or upper one first.
    """
    rng = np.random.default_rng([seed, index])
    labels = scans(split)[1]
    count = 2 if rng.random() < two else 1
    digits = rng.choice(10, count, replace=False)
    motions = rng.choice(list(MOTIONS), count, p=[0.22, 0.22, 0.22, 0.22, 0.12])
    size = rng.uniform(25, 30) if count == 1 else rng.uniform(23, 27)
    best, best_distance = (), -1.0
    # of some casts take the one whose two digits keep furthest apart: most never meet then
    for _ in range(CASTS if count == 2 else 1):
        actors = tuple(
            _draw_actor(rng, int(d), str(m), labels, size)
            for d, m in zip(digits, motions, strict=True)
        )
        places = [positions(actor, FRAMES) for actor in actors]
        distance = (
            np.sort(np.abs(places[0] - places[-1]).max(1))[: FRAMES // 3].mean()
            if count == 2
            else 0.0
        )
        if distance > best_distance:
            best, best_distance = actors, distance
    if count == 2:
        best = _in_reading_order(*best)
    angle, speed = rng.uniform(0, 2 * np.pi), rng.uniform(0.1, 0.45)
    return Scene(
        actors=best,
        texture_seed=int(rng.integers(2**31)),
        wavelength=rng.uniform(14, 24),
        drift=(speed * np.sin(angle), speed * np.cos(angle)),
    )


def coloured_field(rng: np.random.Generator, side: int, wavelength: float) -> np.ndarray:
    """Noise `[3, side, side]` of deviation 1 that tiles: an annulus of the spectrum around
    `wavelength` (pixels), mixed into colours.
    """
    radius = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None]) * wavelength
    band = np.exp(-((np.log(np.maximum(radius, 1e-3)) / 0.45) ** 2))
    field = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((3, side, side))) * band, s=(side, side))
    field = np.einsum("ij,jhw->ihw", rng.standard_normal((3, 3)) * 0.6 + 0.4, field / field.std())
    return field / field.std()


def _background(scene: Scene, frames: int) -> torch.Tensor:
    """Drifting texture `[frames, 3, h, w]` in [0, 0.62]."""
    rng = np.random.default_rng(scene.texture_seed)
    field = 0.16 * coloured_field(rng, _FIELD, scene.wavelength)
    field = 0.3 + field + rng.uniform(-0.06, 0.06, (3, 1, 1))
    time = np.arange(frames) - (frames - 1) / 2
    theta = torch.zeros(frames, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = CANVAS / _FIELD
    theta[:, 1, 2] = torch.from_numpy(-2 * scene.drift[0] * time / _FIELD)
    theta[:, 0, 2] = torch.from_numpy(-2 * scene.drift[1] * time / _FIELD)
    grid = F.affine_grid(theta, (frames, 3, CANVAS, CANVAS), align_corners=False)
    image = torch.from_numpy(field).float()[None].expand(frames, -1, -1, -1)
    return F.grid_sample(image, grid, mode="bilinear", align_corners=False).clamp(0, 0.62)


def stroke(
    scan: torch.Tensor, centres: np.ndarray, *, size: float, shear: float, canvas: int
) -> torch.Tensor:
    """Opacity `[n, 1, canvas, canvas]` of a scan `[8, 8]`, `size` pixels high, around `centres`
    `[n, 2]` (h, w).
    """
    count = len(centres)
    centre = torch.from_numpy(centres).float() / canvas * 2 - 1
    zoom = canvas / size
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1], theta[:, 1, 1] = zoom, zoom * shear, zoom
    theta[:, 0, 2] = -zoom * (centre[:, 1] + shear * centre[:, 0])
    theta[:, 1, 2] = -zoom * centre[:, 0]
    grid = F.affine_grid(theta, (count, 1, canvas, canvas), align_corners=False)
    ink = F.grid_sample(
        F.pad(scan, (1, 1, 1, 1))[None, None].expand(count, -1, -1, -1),
        grid * 0.8,
        mode="bicubic",
        align_corners=False,
    )
    return ((ink - 0.25) / 0.4).clamp(0, 1)


def _stroke(actor: Actor, scan: torch.Tensor, frames: int) -> torch.Tensor:
    """Opacity `[frames, 1, h, w]` of the digit along its path."""
    path = positions(actor, frames)
    return stroke(scan, path, size=actor.size, shear=actor.shear, canvas=CANVAS)


def coverage(
    scene: Scene, *, frames: int = FRAMES, split: Literal["train", "held-out"] = "train"
) -> torch.Tensor:
    """Opacity of the digits `[frames, h, w]` in [0, 1]."""
    strokes = [_stroke(actor, scans(split)[0][actor.scan], frames)[:, 0] for actor in scene.actors]
    return torch.stack(strokes).amax(0)


def render(
    scene: Scene, *, frames: int = FRAMES, split: Literal["train", "held-out"] = "train"
) -> torch.Tensor:
    """Pixels `[3, frames, h, w]` in [-1, 1]; later actors stand in front."""
    video = _background(scene, frames)
    for actor in scene.actors:
        opacity = _stroke(actor, scans(split)[0][actor.scan], frames)
        video = (
            video * (1 - opacity)
            + opacity * torch.tensor(actor.colour, dtype=video.dtype)[:, None, None]
        )
    return video.transpose(0, 1).contiguous() * 2 - 1


def make_video(
    seed: int, index: int, *, frames: int = FRAMES, split: Literal["train", "held-out"] = "train"
) -> tuple[torch.Tensor, str]:
    """Video `[3, frames, h, w]` in [-1, 1] and its prompt."""
    scene = draw_scene(seed, index, split=split)
    return render(scene, frames=frames, split=split), prompt_of(scene)
