"""One handwritten digit on a small cluttered canvas: the data of vit-digits.

Crop `(seed, index)` is a canvas as `digit_canvases.py` has them, with one digit anywhere on it:
`make_crop(seed, index)` gives the same pixels on every call.
"""

import numpy as np
from digit_canvases import Canvas, Split, draw_digits, render_canvas
from jaxtyping import UInt8
from torch import Tensor

__all__ = ["CROP", "CROP_SIZES", "draw_crop", "make_crop"]

CROP = 112  # pixels, height and width
CROP_SIZES = (26.0, 76.0)  # pixels, the height of the digit; in proportion on other crops


def draw_crop(
    seed: int,
    index: int,
    *,
    side: int = CROP,
    split: Split = "train",
    sizes: tuple[float, float] = CROP_SIZES,
) -> Canvas:
    """Everything that decides the pixels of crop `index`."""
    random = np.random.default_rng([seed, index, side, 22])
    scaled = (sizes[0] * side / CROP, sizes[1] * side / CROP)
    return draw_digits(random, (side, side), 1, scaled, split)


def make_crop(
    seed: int, index: int, *, side: int = CROP, split: Split = "train"
) -> tuple[UInt8[Tensor, "3 side side"], int]:
    """Pixels of crop `index`, and its digit."""
    canvas = draw_crop(seed, index, side=side, split=split)
    return render_canvas(canvas, split=split)[0], canvas.digits[0].digit
