"""Handwritten digits at named places of a large canvas: the data of flux-digits.

Every image is a pure function of `(seed, index)`: `make_image(seed, index)` gives the same pixels
on every call. One to four digits stand at different places of a 3 x 3 raster on 256 x 256 pixels.
Scans and textures are those of `moving_digits.py`, as is the split. Axis order is (h, w), pixel
values lie in [-1, 1].

All digits of an image have one colour and the whole ground has one hue, both drawn anew for every
image: what tokens at one end of the canvas show is told by those at the other end.
"""

import colorsys
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from moving_digits import DIGIT_WORDS, coloured_field, scans, stroke

__all__ = [
    "CANVAS",
    "PLACES",
    "PlacedDigit",
    "PlacedScene",
    "draw_placed_scene",
    "make_image",
    "parse_placed_prompt",
    "placed_prompt",
    "prompt_of_placed",
    "render_placed",
    "window_of",
]

CANVAS = 256  # pixels, height and width
_LINES = (44, 128, 212)  # centres of the rows and columns of the raster, pixels
_NAMES = (
    *("top left", "top", "top right"),
    *("left", "center", "right"),
    *("bottom left", "bottom", "bottom right"),
)
# name to centre (h, w) in pixels, in reading order
PLACES = {name: (_LINES[i // 3], _LINES[i % 3]) for i, name in enumerate(_NAMES)}
WINDOW = 80  # pixels around a place: all of its digit, nothing of the next one
JITTER = 5.0  # pixels that a digit may stand off the centre of its place, on either axis
SHARES = (0.25, 0.3, 0.25, 0.2)  # of images with one, two, three and four digits


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedDigit:
    """One digit: which scan, where its centre lies (h, w, in pixels), how it is drawn."""

    digit: int
    scan: int
    place: str
    centre: tuple[float, float]
    size: float
    shear: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedScene:
    """Everything that decides the pixels of an image; digits in reading order."""

    digits: tuple[PlacedDigit, ...]
    colour: tuple[float, float, float]
    texture_seed: int
    wavelength: float
    ground: tuple[float, float, float]


def _phrase(digit: int, place: str) -> str:
    return f"{'an' if digit == 8 else 'a'} {DIGIT_WORDS[digit]} {place}"


def placed_prompt(digits: list[tuple[int, str]]) -> str:
    """`[(7, "top left"), (3, "right")]` gives `a seven top left and a three right`; the order is
    kept.
    """
    return " and ".join(_phrase(digit, place) for digit, place in digits)


def prompt_of_placed(scene: PlacedScene) -> str:
    """The prompt that asks for the digits of `scene`."""
    return placed_prompt([(d.digit, d.place) for d in scene.digits])


def parse_placed_prompt(prompt: str) -> list[tuple[int, str]]:
    """The inverse of `placed_prompt`."""
    parts = [part.split(" ", 2) for part in prompt.split(" and ")]
    return [(DIGIT_WORDS.index(word), place) for _, word, place in parts]


def window_of(place: str) -> tuple[int, int, int, int]:
    """Top, left, bottom and right of the pixels that show a place, within the canvas."""
    top, left = (int(np.clip(centre - WINDOW // 2, 0, CANVAS - WINDOW)) for centre in PLACES[place])
    return top, left, top + WINDOW, left + WINDOW


def draw_placed_scene(
    seed: int, index: int, *, split: Literal["train", "held-out"] = "train"
) -> PlacedScene:
    """The scene of image `index`; digits and places are independent of each other."""
    rng = np.random.default_rng([seed, index, 9])
    labels = scans(split)[1].numpy()
    count = 1 + int(rng.choice(4, p=SHARES))
    digits = []
    for number in sorted(rng.choice(9, count, replace=False).tolist()):
        digit, place = int(rng.integers(10)), _NAMES[number]
        digits.append(
            PlacedDigit(
                digit=digit,
                scan=int(rng.choice(np.flatnonzero(labels == digit))),
                place=place,
                centre=tuple(c + rng.uniform(-JITTER, JITTER) for c in PLACES[place]),
                size=rng.uniform(36, 42),
                shear=rng.uniform(-0.15, 0.15),
            )
        )
    return PlacedScene(
        digits=tuple(digits),
        colour=colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.05, 0.45), 1.0),
        texture_seed=int(rng.integers(2**31)),
        wavelength=rng.uniform(28, 48),
        ground=tuple(rng.uniform(-0.1, 0.1, 3)),
    )


def render_placed(
    scene: PlacedScene, *, split: Literal["train", "held-out"] = "train"
) -> torch.Tensor:
    """Pixels `[3, h, w]` in [-1, 1]."""
    rng = np.random.default_rng(scene.texture_seed)
    field = 0.12 * coloured_field(rng, CANVAS, scene.wavelength)
    ground = torch.tensor(scene.ground, dtype=torch.float32).view(3, 1, 1)
    image = (0.3 + torch.from_numpy(field).float() + ground).clamp(0, 0.62)
    colour = torch.tensor(scene.colour, dtype=torch.float32).view(3, 1, 1)
    for digit in scene.digits:
        scan, centre = scans(split)[0][digit.scan], np.array([digit.centre])
        opacity = stroke(scan, centre, size=digit.size, shear=digit.shear, canvas=CANVAS)[0]
        image = image + opacity * (colour - image)
    return image * 2 - 1


def make_image(
    seed: int, index: int, *, split: Literal["train", "held-out"] = "train"
) -> tuple[torch.Tensor, str]:
    """Image `[3, h, w]` in [-1, 1] and its prompt."""
    scene = draw_placed_scene(seed, index, split=split)
    return render_placed(scene, split=split), prompt_of_placed(scene)
