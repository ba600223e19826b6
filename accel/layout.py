"""Where the visual grids, the text and the padding sit in the joint sequence of a site.

A layout is a value: it can be a dictionary key, be compared, and be carried to another grid.
Grids are `(t, h, w)` in that order everywhere: frames, rows, columns. An image has `t = 1`.
A reference image (of an editing model) is a condition as text is, not what is generated: it is
always attended, and always attends.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

__all__ = ["Grid", "Layout", "Segment", "as_grid"]

Grid = tuple[int, int, int]
SegmentKind = Literal["grid", "text", "reference", "pad"]
KINDS = ("grid", "text", "reference", "pad")
CONDITIONS = ("text", "reference")  # always kept


def as_grid(grid) -> Grid:
    """`grid` as a tuple of three positive ints; refuses everything else."""
    sizes = tuple(grid) if isinstance(grid, tuple | list) else (grid,)
    if len(sizes) != 3 or any(type(n) is not int or n < 1 for n in sizes):
        raise ValueError(f"a grid is (t, h, w), three whole numbers of at least 1, got {grid!r}")
    return sizes


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens of one kind: `[start, start + length)`; `grid` only for visual tokens.

    Tokens of a grid lie in `thw` order: columns fastest, then rows, then frames.
    """

    kind: SegmentKind
    start: int
    length: int
    grid: Grid | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"a segment's kind is one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.start < 0 or self.length < 1:
            raise ValueError(
                f"a {self.kind} segment needs start >= 0 and length >= 1, "
                f"got start {self.start} and length {self.length}"
            )
        if (self.kind == "grid") != (self.grid is not None):
            raise ValueError(f"exactly grid segments have a grid, got {self.kind} with {self.grid}")
        if self.grid is not None:
            object.__setattr__(self, "grid", as_grid(self.grid))
            if prod(self.grid) != self.length:
                tokens = prod(self.grid)
                raise ValueError(f"grid {self.grid} makes {tokens} tokens, not {self.length}")

    @property
    def stop(self) -> int:
        """First token after the segment."""
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class Layout:
    """The segments of a sequence, contiguous from token 0.

    Any number of grids and text spans in any order; a sequence of text alone is a layout too.
    Padding is last, or anywhere (`padded_inside`): then it is cut out before anything is computed.
    """

    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "segments", tuple(self.segments))
        if not self.segments:
            raise ValueError("a layout needs at least one segment")
        expected = 0
        for index, segment in enumerate(self.segments):
            if segment.start != expected:
                raise ValueError(
                    f"segment {index} ({segment.kind}) starts at token {segment.start}, "
                    f"but the one before it ends at {expected}"
                )
            expected = segment.stop
        if all(segment.kind == "pad" for segment in self.segments):
            raise ValueError(f"{expected} tokens of padding alone have nothing to attend to")

    @classmethod
    def join(cls, runs: Iterable[tuple[SegmentKind, int] | Grid]) -> "Layout":
        """From runs in order: a grid, or a kind with its number of tokens; those of none are left
        out.

            >>> Layout.join([("text", 11), (5, 7, 3), ("pad", 4)]).length
            120
        """
        segments, start = [], 0
        for run in runs:
            kind, length = run if len(run) == 2 else ("grid", prod(as_grid(run)))
            if length:
                segments.append(Segment(kind, start, length, None if len(run) == 2 else run))
                start += length
        return cls(tuple(segments))

    @classmethod
    def of(
        cls,
        grid: tuple | list = (),
        *,
        text_before: int = 0,
        text_after: int = 0,
        padding: int = 0,
    ) -> "Layout":
        """Text, then the grid or grids, then text, then padding; counts in tokens, 0 for none.

        `grid` is one `(t, h, w)`, or a list of them (reference images beside the generated
        one), or empty for a sequence of text alone.

            >>> Layout.of((5, 7, 3), text_before=11, padding=4).length
            120
        """
        counts = {"text_before": text_before, "text_after": text_after, "padding": padding}
        for name, count in counts.items():
            if count < 0:
                raise ValueError(f"{name} is a number of tokens, at least 0, got {count}")
        grids = [grid] if grid and not isinstance(grid[0], tuple | list) else grid
        runs: list[tuple[SegmentKind, int] | Grid] = [("text", text_before)]
        runs += [as_grid(sizes) for sizes in grids]
        return cls.join([*runs, ("text", text_after), ("pad", padding)])

    @property
    def length(self) -> int:
        """Tokens in all, padding included."""
        return self.segments[-1].stop

    @property
    def valid_length(self) -> int:
        """Tokens before the trailing padding."""
        last = self.segments[-1]
        return last.start if last.kind == "pad" else last.stop

    @property
    def padded_inside(self) -> bool:
        """Whether there is padding before the last token that is none."""
        return any(segment.kind == "pad" for segment in self.segments[:-1])

    def valid(self, device: torch.device | str | None = None) -> Bool[Tensor, " length"]:
        """Which tokens are no padding."""
        out = torch.ones(self.length, dtype=torch.bool, device=device)
        for segment in self.segments:
            if segment.kind == "pad":
                out[segment.start : segment.stop] = False
        return out

    def without_padding(self) -> "Layout":
        """The layout of the tokens that are no padding, in their order."""
        kept = [s for s in self.segments if s.kind != "pad"]
        return Layout.join([s.grid or (s.kind, s.length) for s in kept])

    @property
    def grids(self) -> tuple[Grid, ...]:
        """Every grid, in sequence order."""
        return tuple(segment.grid for segment in self.segments if segment.grid is not None)

    @property
    def grid(self) -> Grid:
        """The first grid; an error where the sequence is text alone."""
        if not self.grids:
            raise ValueError(f"this layout of {self.length} tokens has no grid")
        return self.grids[0]

    @property
    def text_tokens(self) -> int:
        """Tokens of text, in all spans together."""
        return sum(segment.length for segment in self.segments if segment.kind == "text")

    def coordinates(self, device: torch.device | str | None = None) -> Int[Tensor, "length 3"]:
        """`(t, h, w)` of every token in natural order, -1 for text and padding; int32."""
        out = torch.full((self.length, 3), -1, dtype=torch.int32, device=device)
        for segment in self.segments:
            if segment.grid is not None:
                axes = [torch.arange(n, dtype=torch.int32, device=device) for n in segment.grid]
                volume = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
                out[segment.start : segment.stop] = volume.reshape(-1, 3)
        return out

    def grid_index(self, device: torch.device | str | None = None) -> Int[Tensor, " length"]:
        """Which grid (0, 1, …) every token belongs to, -1 for text and padding; int32."""
        out = torch.full((self.length,), -1, dtype=torch.int32, device=device)
        grids = [segment for segment in self.segments if segment.kind == "grid"]
        for index, segment in enumerate(grids):
            out[segment.start : segment.stop] = index
        return out

    def with_grid(self, grid: tuple | list) -> "Layout":
        """The same layout at another grid; text and padding keep their lengths.

        One `(t, h, w)` replaces the first grid; a list replaces them all, one for one.
        """
        several = bool(grid) and isinstance(grid[0], tuple | list)
        new = list(grid) if several else [grid, *self.grids[1:]]
        if len(new) != len(self.grids):
            raise ValueError(f"this layout has {len(self.grids)} grids, got {len(new)}: {new}")
        sizes = iter(map(as_grid, new))
        segments, start = [], 0
        for segment in self.segments:
            size = next(sizes) if segment.kind == "grid" else None
            length = segment.length if size is None else prod(size)
            segments.append(Segment(segment.kind, start, length, size))
            start += length
        return Layout(tuple(segments))
