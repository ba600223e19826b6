"""What lies on a sheet of paper beside the digits of `digit_canvases.py`: rulings, scribbles,
strokes, stains, uneven light, grain. All of it is background.

Colours are (red, green, blue) in 0..255, places (h, w) in pixels. Every function draws into the
array that it is given, from the generator that it is given, and gives nothing back.
"""

from collections.abc import Callable, Sequence

import cv2
import numpy as np

__all__ = ["draw_rulings", "draw_scribbles", "draw_stains", "draw_strokes", "grain", "light"]

FRACTION = 4  # bits behind the point of the places that OpenCV draws at
BASELINES = (-0.45, 0.0, 0.45)  # where the parts of a letter begin and end, in its heights
Image = np.ndarray  # uint8 [h, w, 3]
Colour = tuple[float, float, float]


def _fixed(points: np.ndarray) -> np.ndarray:
    """Places [n, 2] (h, w) as OpenCV takes them: (x, y) in sixteenths of a pixel."""
    return np.round(points[:, ::-1] * 2**FRACTION).astype(np.int32)[:, None]


def _line(image: Image, points: np.ndarray, colour: Colour, width: float) -> None:
    thickness = max(1, round(width))
    cv2.polylines(image, [_fixed(points)], False, colour, thickness, cv2.LINE_AA, FRACTION)


def draw_rulings(image: Image, random: np.random.Generator, paper: Colour) -> None:
    """Faint lines across the sheet: none, one way, or squares; a margin now and then."""
    height, width = image.shape[:2]
    kind = random.choice(3, p=(0.45, 0.35, 0.2))
    if kind == 0:
        return
    spacing, slope = random.uniform(14, 44), random.normal(0, 0.01)
    tint = np.asarray(((120, 150, 210), (150, 150, 150), (190, 140, 140))[random.integers(3)])
    colour = tuple((np.asarray(paper) * 0.55 + tint * 0.45 * paper[1] / 240).tolist())
    for start in np.arange(random.uniform(0, spacing), height, spacing):
        _line(image, np.array([[start, 0], [start + slope * width, width]]), colour, 1)
    for start in np.arange(random.uniform(0, spacing), width, spacing) if kind == 2 else ():
        _line(image, np.array([[0, start], [height, start - slope * height]]), colour, 1)
    if kind == 1 and random.random() < 0.4:
        start = random.uniform(0.08, 0.2) * width
        red = tuple((np.asarray(paper) * (0.9, 0.6, 0.6)).tolist())
        _line(image, np.array([[0, start], [height, start - slope * height]]), red, 2)


def draw_stains(image: Image, random: np.random.Generator, count: int) -> None:
    """Soft spots and rings that darken what is below them by a few percent, in shades of brown."""
    height, width = image.shape[:2]
    for _ in range(count):
        radius = random.uniform(8, 70)
        centre = np.array([[random.uniform(0, height), random.uniform(0, width)]])
        side = int(2 * radius) + 9
        top, left = (int(c - side // 2) for c in centre[0])
        rows, columns = slice(max(top, 0), top + side), slice(max(left, 0), left + side)
        part = image[rows, columns]
        if not part.size:
            continue
        spot = np.zeros(part.shape[:2], np.float32)
        middle = tuple(_fixed(centre - (rows.start, columns.start))[0, 0].tolist())
        axes = tuple(int(radius * random.uniform(0.6, 1) * 2**FRACTION) for _ in range(2))
        ring = max(1, int(radius * 0.12)) if random.random() < 0.4 else -1
        angle = random.uniform(0, 180)
        cv2.ellipse(spot, middle, axes, angle, 0, 360, 1.0, ring, cv2.LINE_AA, FRACTION)
        spot = cv2.blur(spot, (7, 7)) * random.uniform(0.05, 0.2)
        shade = np.float32(random.uniform((0.1, 0.3, 0.6), (0.5, 0.7, 1.0)))
        part[:] = part * (1 - spot[..., None] * shade)


def _curve(random: np.random.Generator, start: np.ndarray, length: float) -> np.ndarray:
    """A path [12, 2] that bends evenly as it goes."""
    turn = random.uniform(0, 2 * np.pi) + np.cumsum(np.full(11, random.normal(0, 0.16)))
    steps = np.stack([np.sin(turn), np.cos(turn)], 1) * (length / 11)
    return start + np.concatenate([np.zeros((1, 2)), np.cumsum(steps, 0)])


def draw_strokes(
    image: Image, random: np.random.Generator, colours: Sequence[Colour], count: int
) -> None:
    """Long thin strokes, straight or bent, in one of the inks; a few cross one another."""
    height, width = image.shape[:2]
    for _ in range(count):
        start = np.array([random.uniform(0, height), random.uniform(0, width)])
        path = _curve(random, start, random.uniform(30, 260))
        _line(image, path, colours[random.integers(len(colours))], random.uniform(1, 4))


def _letter(random: np.random.Generator) -> list[np.ndarray]:
    """Paths [n, 2] of something like a letter, one high around the origin: a stem, and two or three
    strokes and bows that begin on it. No digit is made like this.
    """
    stem = (-0.3, 0.0, 0.3)[random.integers(3)]
    paths = [np.array([[-0.5, stem], [0.5, stem + random.normal(0, 0.08)]])]
    for _ in range(random.integers(2, 4)):
        begin, side = random.integers((3, 2))
        end = (begin + random.integers(1, 3)) % 3  # another one
        far = stem + (2 * side - 1) * random.uniform(0.35, 0.65)
        first, last = (BASELINES[begin], stem), (BASELINES[end], far)
        if random.random() < 0.6:
            paths.append(np.array([first, last]))
        else:
            angle = np.linspace(0, np.pi / 2, 7)[:, None]
            paths.append(
                np.asarray(first)
                + np.hstack([1 - np.cos(angle), np.sin(angle)]) * (np.asarray(last) - first)
            )
    return paths


def draw_scribbles(
    image: Image,
    random: np.random.Generator,
    colours: Sequence[Colour],
    count: int,
    free: Callable[[float, float, float], bool],
) -> None:
    """Words of letters that nobody can read. free: of a centre (h, w) and a radius, whether a
    letter may stand there.
    """
    height, width = image.shape[:2]
    for _ in range(count):
        size = float(np.exp(random.uniform(np.log(9), np.log(64))))
        letters = int(random.integers(1, max(2, int(160 / size))))
        place = np.array([random.uniform(0, height), random.uniform(-0.1, 0.9) * width])
        slant, angle = random.normal(0, 0.2), random.normal(0, 0.12)
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        colour, thick = colours[random.integers(len(colours))], size * random.uniform(0.04, 0.12)
        for number in range(letters):
            middle = place + turn @ np.array([0.0, number * size * 0.95])
            if not free(middle[0], middle[1], 0.75 * size):
                continue
            for path in _letter(random):
                bent = path + np.stack([np.zeros(len(path)), -slant * path[:, 0]], 1)
                _line(image, middle + size * bent @ turn.T, colour, thick)


def light(random: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Factors [h, w], float32, of a lamp to one side and of a soft shadow."""
    rows = np.linspace(-1, 1, 16, dtype=np.float32)[:, None]
    columns = np.linspace(-1, 1, 16, dtype=np.float32)[None]
    angle, fall = random.uniform(0, 2 * np.pi), random.uniform(0, 0.22)
    field = 1 - fall * (np.sin(angle) * rows + np.cos(angle) * columns + 1) / 2
    if random.random() < 0.35:
        h, w = random.uniform(-1.2, 1.2, 2)
        distance = (rows - h) ** 2 + (columns - w) ** 2
        field = field * (1 - random.uniform(0.1, 0.3) * np.exp(-distance / random.uniform(0.1, 1)))
    return cv2.resize(np.float32(field), (width, height), interpolation=cv2.INTER_CUBIC)


def grain(random: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Noise [h, w] of the sheet and of the camera, in levels: a tile, turned from copy to
    copy.
    """
    tile = random.standard_normal((128, 128), dtype=np.float32) * random.exponential(0.5)
    if random.random() < 0.5:
        tile = cv2.GaussianBlur(tile, (3, 3), 0.7)
    rows, columns = -(-height // 128), -(-width // 128)
    turned = [[np.rot90(tile, (3 * r + c) % 4) for c in range(columns)] for r in range(rows)]
    return np.block(turned)[:height, :width]
