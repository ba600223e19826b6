"""Windows of whole tiles."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from accel.kind import each, register
from accel.layout import Grid, as_grid
from accel.pattern import PATTERNS, Extent, Pattern, Term

__all__ = ["TileWindow"]


@register(PATTERNS, "tile_window")
@dataclass(frozen=True, slots=True)
class TileWindow(Pattern):
    """The tiles of a window around the query's own, moved inside the grid at its borders.

    Sliding tile attention (arXiv 2502.04507): every query sees the same number of whole tiles, so
    in the order `tile(...)` of these tiles, with blocks of one tile each, no block is cut.

    tile: sizes (t, h, w) in tokens; tiles at the far edges are smaller. window: how many tiles
    along each axis, the query's own among them: an int, a float in (0, 1] for a part of the axis'
    tiles (rounded, at least 1), None for all. Of an even number one more lies before the query.
    """

    tile: Grid
    window: tuple[Extent, Extent, Extent] = (None, None, None)
    readers: ClassVar = dict.fromkeys(("tile", "window"), lambda sizes: each(lambda n: n, sizes))

    def __post_init__(self) -> None:
        object.__setattr__(self, "tile", as_grid(self.tile))
        if len(self.window) != 3 or not all(map(_is_count, self.window)):
            raise ValueError(
                "window is (t, h, w), each a number of tiles (at least 1), a fraction in (0, 1] or"
                f" None, got {self.window!r}"
            )
        # as numbers 1.0 and 1 are equal while they mean different things here
        window = tuple(None if type(n) is float and n == 1 else n for n in self.window)
        object.__setattr__(self, "window", window)

    def terms(self, grid: Grid, device: torch.device | str | None = None) -> list[Term]:
        term = []
        for size, side, count in zip(grid, self.tile, self.window, strict=True):
            tiles = -(-size // side)
            wide = int(count * tiles + 0.5) if type(count) is float else (count or tiles)
            wide = min(max(wide, 1), tiles)
            at = torch.arange(size, device=device) // side
            first = (at - wide // 2).clamp(0, tiles - wide)[:, None]
            term.append((first <= at) & (at < first + wide))
        return [tuple(term)]


def _is_count(value: object) -> bool:
    return (
        value is None
        or (type(value) is int and value >= 1)
        or (type(value) is float and 0 < value <= 1)
    )
