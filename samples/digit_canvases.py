"""Handwritten digits on large cluttered sheets of paper: the data of swin-digits.

Every canvas is a pure function of `(seed, index)` and its size: `make_canvas(seed, index)` gives
the same pixels and the same classes on every call. Scans and their split are those of
`moving_digits.py`; axis order is (h, w).

Most of a canvas is empty or cluttered (`paper_clutter.py`), and digits differ in size by a factor
of seven: windows that hold nothing of interest are the many, and which they are differs from image
to image. A pixel's class is 0, or 1 + the digit whose ink it shows.
"""

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import torch
from jaxtyping import UInt8
from moving_digits import DIGIT_WORDS, scans
from paper_clutter import draw_rulings, draw_scribbles, draw_stains, draw_strokes, grain, light
from torch import Tensor

__all__ = [
    "APART",
    "CANVAS",
    "CLASSES",
    "SIZES",
    "SOLID",
    "Canvas",
    "CanvasDigit",
    "Split",
    "draw_canvas",
    "draw_digits",
    "ink_of",
    "make_canvas",
    "render_canvas",
]

CANVAS = 512  # pixels, height and width
CLASSES = ("background", *DIGIT_WORDS)
SIZES = (20.0, 140.0)  # pixels, the height of a digit on a canvas
MOST = 8  # digits on a canvas of 512 x 512 pixels, in proportion on others
APART = 0.62  # of a size: the circle around a digit that no other digit's circle meets
TRIES = 40  # sizes and places that are tried for a digit
SOLID = 0.5  # opacity from which a pixel shows a digit
Split = Literal["train", "held-out"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CanvasDigit:
    """One digit: which scan, its centre (h, w) and size in pixels, how it is turned and drawn.

    angle: radians; shear, stretch: of its width; contrast: of its ink to the paper, up to 1.
    """

    digit: int
    scan: int
    centre: tuple[float, float]
    size: float
    angle: float
    shear: float
    stretch: float
    ink: tuple[float, float, float]
    contrast: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Canvas:
    """Everything that decides the pixels of a canvas. clutter: how much of it, from 0 to 1."""

    height: int
    width: int
    digits: tuple[CanvasDigit, ...]
    paper: tuple[float, float, float]
    clutter: float
    seed: int


def _paper(random: np.random.Generator) -> tuple[float, float, float]:
    """A shade of paper; of a blackboard one time in eight."""
    if random.random() < 0.125:
        return tuple(random.uniform(25, 60) + random.uniform(-10, 10, 3))
    return tuple(random.uniform(196, 250) + random.uniform((-2, -6, -22), (5, 3, 4)))


def _ink(random: np.random.Generator, dark_paper: bool) -> tuple[float, float, float]:
    """Black, blue, red, green or pencil; chalk on a blackboard."""
    if dark_paper:
        return tuple(random.uniform(190, 255, 3))
    inks = ((25, 25, 30), (25, 40, 130), (150, 30, 35), (25, 95, 50), (85, 85, 90))
    chosen = inks[random.choice(len(inks), p=(0.35, 0.3, 0.12, 0.08, 0.15))]
    return tuple(np.clip(np.asarray(chosen) + random.uniform(-20, 20, 3), 0, 255))


def _place(
    random: np.random.Generator,
    sides: tuple[int, int],
    sizes: tuple[float, float],
    taken: list[CanvasDigit],
) -> tuple[float, tuple[float, float]] | None:
    """A size and a centre whose circle is on the canvas and meets no other one, drawn anew until
    they fit; None where they do not in a few tries. Small and large sizes are as many by ratio.
    """
    for _ in range(TRIES):
        size = float(np.exp(random.uniform(*np.log(sizes))))
        reach = APART * size
        height, width = (random.uniform(reach, max(side - reach, reach)) for side in sides)
        apart = (np.hypot(height - d.centre[0], width - d.centre[1]) for d in taken)
        if all(a > reach + APART * d.size for a, d in zip(apart, taken, strict=True)):
            return size, (height, width)
    return None


def draw_digits(
    random: np.random.Generator,
    sides: tuple[int, int],
    count: int,
    sizes: tuple[float, float],
    split: Split,
) -> Canvas:
    """A canvas of `sides` (h, w) pixels with so many digits, as far as they find room."""
    labels = scans(split)[1].numpy()
    paper = _paper(random)
    digits: list[CanvasDigit] = []
    largest = min(sizes[1], 0.7 * min(sides))
    for _ in range(count):
        found = _place(random, sides, (min(sizes[0], largest), largest), digits)
        if found is None:
            break
        digit = int(random.integers(10))
        digits.append(
            CanvasDigit(
                digit=digit,
                scan=int(random.choice(np.flatnonzero(labels == digit))),
                size=found[0],
                centre=found[1],
                angle=float(np.clip(random.normal(0, 0.16), -0.4, 0.4)),
                shear=random.uniform(-0.2, 0.2),
                stretch=random.uniform(0.8, 1.2),
                ink=_ink(random, paper[1] < 128),
                contrast=random.uniform(0.6, 1.0),
            )
        )
    return Canvas(
        height=sides[0],
        width=sides[1],
        digits=tuple(digits),
        paper=paper,
        clutter=random.uniform(0, 1),
        seed=int(random.integers(2**31)),
    )


def draw_canvas(
    seed: int,
    index: int,
    *,
    height: int = CANVAS,
    width: int = CANVAS,
    split: Split = "train",
    digits: tuple[int, int] | None = None,
    sizes: tuple[float, float] = SIZES,
) -> Canvas:
    """Canvas `index`, of any size. digits: the least and the most of them, as far as they find
    room; None: one to eight on 512 x 512 pixels, in proportion to the area on others. sizes: of
    digits, pixels.
    """
    random = np.random.default_rng([seed, index, height, width, 21])
    most = max(1, round(MOST * height * width / CANVAS**2))
    low, high = digits or (1, most)
    return draw_digits(random, (height, width), int(random.integers(low, high + 1)), sizes, split)


def ink_of(digit: CanvasDigit, split: Split) -> tuple[np.ndarray, int, int]:
    """Opacity `[n, n]` in [0, 1], float32, of a digit's ink, and the row and column of the canvas
    where the array begins.

    The scan is enlarged by cubic interpolation, turned, sheared and stretched in one step, and cut
    at a level of grey with an edge that is two pixels wide at any size.
    """
    scan = np.pad(scans(split)[0][digit.scan].numpy(), 1)
    side = int(np.ceil(digit.size * 1.6)) + 4
    top, left = (round(c - side / 2) for c in digit.centre)
    cosine, sine = np.cos(digit.angle), np.sin(digit.angle)
    scale = 8 / digit.size
    # from the patch to the scan, (x, y): turned back, then sheared and stretched back
    back = np.array([[1 / digit.stretch, digit.shear], [0, 1]]) * scale
    back = back @ np.array([[cosine, sine], [-sine, cosine]])
    middle = np.array([digit.centre[1] - left, digit.centre[0] - top]) - 0.5
    matrix = np.hstack([back, (4.5 - back @ middle)[:, None]])
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    grey = cv2.warpAffine(scan, matrix, (side, side), flags=flags)
    return np.clip((grey - 0.46) * (1.1 / scale) / 2 + 0.5, 0, 1), top, left


def _blend(pixels: np.ndarray, canvas: Canvas, split: Split, random: np.random.Generator):
    """Lay the digits' ink on `pixels` [3, h, w]; returns the classes [h, w]."""
    classes = np.zeros(pixels.shape[1:], np.uint8)
    for digit in canvas.digits:
        opacity, top, left = ink_of(digit, split)
        cut = (slice(max(0, -top), canvas.height - top), slice(max(0, -left), canvas.width - left))
        opacity = opacity[cut]
        here = (
            slice(max(0, top), max(0, top) + opacity.shape[0]),
            slice(max(0, left), max(0, left) + opacity.shape[1]),
        )
        side = 3 if digit.size < 60 else 5
        shown = cv2.dilate((opacity > SOLID).astype(np.uint8), np.ones((side, side), np.uint8))
        classes[here][shown > 0] = 1 + digit.digit
        patches = random.uniform(0.75, 1.0, (6, 6)).astype(np.float32)  # ink is uneven
        uneven = cv2.resize(patches, opacity.shape[::-1], interpolation=cv2.INTER_CUBIC)
        opacity = opacity * uneven * np.float32(digit.contrast)
        below = pixels[:, here[0], here[1]]
        below += opacity * (np.float32(digit.ink)[:, None, None] - below)
    return classes


def render_canvas(
    canvas: Canvas, *, split: Split = "train"
) -> tuple[UInt8[Tensor, "3 height width"], UInt8[Tensor, "height width"]]:
    """Pixels and classes. Clutter lies below the digits, and no word of it where one stands."""
    random = np.random.default_rng(canvas.seed)
    area = canvas.height * canvas.width / CANVAS**2
    image = np.empty((canvas.height, canvas.width, 3), np.uint8)
    image[:] = np.clip(canvas.paper, 0, 255)

    def free(h: float, w: float, radius: float) -> bool:
        return all(
            np.hypot(h - d.centre[0], w - d.centre[1]) > radius + APART * d.size
            for d in canvas.digits
        )

    def some(most: float) -> int:
        """A number of things, most of them on canvases with much clutter."""
        return int(random.poisson(most * area * canvas.clutter))

    colours = [
        tuple(c * 0.8 + p * 0.2 for c, p in zip(d.ink, canvas.paper, strict=True))
        for d in canvas.digits
    ]
    colours.append(_ink(random, canvas.paper[1] < 128))
    draw_stains(image, random, some(5))
    draw_rulings(image, random, canvas.paper)
    draw_strokes(image, random, colours, some(9))
    draw_scribbles(image, random, colours, some(9), free)
    pixels = np.ascontiguousarray(image.transpose(2, 0, 1), dtype=np.float32)
    classes = _blend(pixels, canvas, split, random)
    pixels *= light(random, canvas.height, canvas.width)
    pixels += grain(random, canvas.height, canvas.width) + np.float32(0.5)
    np.clip(pixels, 0, 255, out=pixels)
    return torch.from_numpy(pixels.astype(np.uint8)), torch.from_numpy(classes)


def make_canvas(
    seed: int,
    index: int,
    *,
    height: int = CANVAS,
    width: int = CANVAS,
    split: Split = "train",
    digits: tuple[int, int] | None = None,
    sizes: tuple[float, float] = SIZES,
) -> tuple[UInt8[Tensor, "3 height width"], UInt8[Tensor, "height width"]]:
    """Pixels and classes of canvas `index`; see `draw_canvas`."""
    canvas = draw_canvas(
        seed, index, height=height, width=width, split=split, digits=digits, sizes=sizes
    )
    return render_canvas(canvas, split=split)
