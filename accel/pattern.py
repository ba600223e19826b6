"""Patterns: families of attention masks with parameters in grid units.

A pattern knows frames, rows and columns, not tokens, so one pattern serves every grid. On a
blocking it becomes a block mask: a block is kept if ANY pair of a query token and a key token in
it satisfies the family's rule; then `Blocking.force` adds text and takes padding away. The mask
is exact whatever the order and however ragged the blocks.

How it is computed. Every rule here is a union of terms, each term a product of three relations,
one per axis: `A_t[t_q, t_k] and A_h[h_q, h_k] and A_w[w_q, w_k]`. The keys that a query block
reaches are then three small matrix products on the indicator volume of the block, so a mask costs
`blocks * tokens * (t + h + w)` per term instead of `tokens ** 2`, a few query blocks at a time.

A token of one grid sees every token of every other grid: reference images are attended in full.

Half-widths (`Extent`): an int counts grid units; a float in (0, 1] is a fraction of the axis
(rounded to the nearest unit); None is unlimited. 1.0 is stored as None, for as numbers 1.0 and 1
are equal while they mean different things here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from accel.blocking import Blocking
from accel.kind import Kind, from_kind, register
from accel.layout import Grid

__all__ = [
    "PATTERNS",
    "Band",
    "Extent",
    "FirstFrames",
    "Full",
    "Identity",
    "MultiDiagonal",
    "Pattern",
    "Radial",
    "Share",
    "Skip",
    "Stripe",
    "Window",
    "known_mask",
    "pattern_from_dict",
]

Extent = int | float | None
Term = tuple[Tensor, ...]
CHUNK_ELEMENTS = 1 << 22


PATTERNS: dict[str, type["Pattern"]] = {}


class Pattern(Kind):
    """A rule on `(t, h, w)` of a query and a key; the families below are frozen dataclasses."""

    __slots__ = ()

    def terms(self, grid: Grid, device: torch.device | str | None = None) -> list[Term]:
        """The rule on one grid: per term bool `[t, t]`, `[h, h]`, `[w, w]`, query axis first."""
        raise NotImplementedError(f"{type(self).__name__} has no rule")

    def mask(
        self, blocking: Blocking, device: torch.device | str | None = None
    ) -> Bool[Tensor, "q_blocks kv_blocks"]:
        """Kept blocks; every row that holds a valid token keeps at least one."""
        keep = torch.zeros(blocking.q_blocks, blocking.kv_blocks, dtype=torch.bool, device=device)
        order = blocking.indices(device)
        q_size, kv_size = blocking.block
        segments = [(s, s.grid) for s in blocking.layout.segments if s.grid is not None]
        for segment, grid in segments:
            places = torch.arange(segment.start, segment.stop, device=device)
            tokens = (places if order is None else order[places]) - segment.start
            terms = [[a.float() for a in term] for term in self.terms(grid, device)]
            for first, last in _chunks(segment.start, segment.stop, q_size, segment.length):
                own = slice(
                    max(first * q_size - segment.start, 0),
                    min(last * q_size, segment.stop) - segment.start,
                )
                volume = torch.zeros(last - first, segment.length, device=device)
                volume[places[own] // q_size - first, tokens[own]] = 1
                volume = volume.view(-1, *grid)
                reached = torch.zeros_like(volume)
                for term in terms:
                    reached += torch.einsum("nthw,tx,hy,wz->nxyz", volume, *term).clamp_(max=1)
                in_order = reached.view(last - first, -1)[:, tokens].clamp_(max=1)
                hits = torch.zeros(last - first, blocking.kv_blocks, device=device)
                hits.index_add_(1, places // kv_size, in_order)
                keep[first:last] |= hits > 0
            rows = slice(segment.start // q_size, -(-segment.stop // q_size))
            for other, _ in segments:
                if other is not segment:
                    keep[rows, other.start // kv_size : -(-other.stop // kv_size)] = True
        return blocking.force(keep)


def pattern_from_dict(data: Mapping) -> Pattern:
    """The pattern that `to_dict` wrote; unknown kinds, unknown keys and wrong types are refused."""
    return from_kind(data, PATTERNS, "pattern")


def known_mask(
    pattern: Pattern, blocking: Blocking, device: torch.device, known: dict[Any, Tensor]
) -> Bool[Tensor, "q_blocks kv_blocks"]:
    """`pattern.mask`, made once for each pattern, blocking and device: `known` is read and kept."""
    key = (pattern, blocking, device)
    if key not in known:
        known[key] = pattern.mask(blocking, device)
    return known[key]


def _chunks(start: int, stop: int, size: int, row: int) -> Iterator[tuple[int, int]]:
    """Ranges `[first, last)` of the blocks that meet tokens `[start, stop)`, bounded in memory."""
    step = max(1, CHUNK_ELEMENTS // row)
    end = -(-stop // size)
    for first in range(start // size, end, step):
        yield first, min(first + step, end)


def _check_extent(name: str, value, least: int = 0) -> Extent:
    """`value` if it is an extent of at least `least` units, with 1.0 turned into None."""
    if value is None or (type(value) is int and value >= least):
        return value
    if type(value) is float and 0 < value <= 1:
        return None if value == 1 else value
    raise ValueError(
        f"{name} is a whole number of grid units (at least {least}), a fraction in (0, 1] "
        f"or None (unlimited), got {value!r}"
    )


def _units(extent: Extent, size: int) -> int:
    """An extent in units of an axis of `size`."""
    if extent is None:
        return size
    return int(extent * size + 0.5) if isinstance(extent, float) else extent


def _distance(size: int, device) -> Tensor:
    """`|i - j|` on an axis."""
    place = torch.arange(size, device=device)
    return (place[:, None] - place[None, :]).abs()


def _near(extent: Extent, size: int, device) -> Tensor:
    """`|i - j| <= extent` on an axis."""
    return _distance(size, device) <= _units(extent, size)


def _all(size: int, device) -> Tensor:
    """Every place of an axis with every other."""
    return torch.ones(size, size, dtype=torch.bool, device=device)


@register(PATTERNS, "full")
@dataclass(frozen=True, slots=True)
class Full(Pattern):
    """Every block."""

    def terms(self, grid: Grid, device: torch.device | str | None = None) -> list[Term]:
        return [tuple(_all(size, device) for size in grid)]


@register(PATTERNS, "skip")
@dataclass(frozen=True, slots=True)
class Skip(Pattern):
    """No block, not even text: the head's output is zero under `rest="drop"` (Sparse-vDiT)."""

    def terms(self, grid: Grid, device: torch.device | str | None = None) -> list[Term]:
        return []

    def mask(
        self, blocking: Blocking, device: torch.device | str | None = None
    ) -> Bool[Tensor, "q_blocks kv_blocks"]:
        return torch.zeros(blocking.q_blocks, blocking.kv_blocks, dtype=torch.bool, device=device)


@register(PATTERNS, "identity")
@dataclass(frozen=True, slots=True)
class Identity(Skip):
    """No block: the head's output is the value of the same token.

    Attention whose map is the identity (HeadHunter and SoftPAG, arXiv 2506.10978, perturb with it);
    beside `skip` the other pattern that costs nothing.
    """


@register(PATTERNS, "share")
@dataclass(frozen=True, slots=True)
class Share(Skip):
    """No block: the head's output is one that was computed before (DiTFastAttn, arXiv 2406.08552).

    of: `step`, its output in the step before, of the same branch of guidance; `branch`, that of the
    branch which was called first in this step. Where there is none, as in the first step of a run,
    in the first branch, or with branches batched together, the head is dense.
    """

    of: Literal["step", "branch"] = "step"

    def __post_init__(self) -> None:
        if self.of not in ("step", "branch"):
            raise ValueError(f"of is step or branch, got {self.of!r}")


@register(PATTERNS, "band")
@dataclass(frozen=True, slots=True)
class Band(Pattern):
    """Tokens at most `width` of the sequence apart in the order of the choice.

    `|i - j| <= width * n` for the places i and j among the n tokens of a grid: the windows of
    DiTFastAttnV2 (arXiv 2503.22796) in natural order, and the band of Sparse VideoGen (arXiv
    2502.01776), spatial in natural order and temporal in `hwt`.
    """

    width: int | float

    def __post_init__(self) -> None:
        if type(self.width) not in (int, float) or not 0 <= self.width <= 1:
            raise ValueError(f"width is a fraction of the sequence in [0, 1], got {self.width!r}")
        object.__setattr__(self, "width", float(self.width))

    def mask(
        self, blocking: Blocking, device: torch.device | str | None = None
    ) -> Bool[Tensor, "q_blocks kv_blocks"]:
        keep = torch.zeros(blocking.q_blocks, blocking.kv_blocks, dtype=torch.bool, device=device)
        rows, columns = blocking.block
        grids = [s for s in blocking.layout.segments if s.grid is not None]
        for segment in grids:
            first, last = (
                torch.arange(count, device=device) * size
                for count, size in ((blocking.q_blocks, rows), (blocking.kv_blocks, columns))
            )
            q_from, q_to = _inside(first, rows, segment.start, segment.stop)
            k_from, k_to = _inside(last, columns, segment.start, segment.stop)
            apart = torch.maximum(k_from[None] - q_to[:, None], q_from[:, None] - k_to[None])
            near = apart <= int(self.width * segment.length + 0.5)
            keep |= near & (q_from <= q_to)[:, None] & (k_from <= k_to)[None]
            for other in grids:
                if other is not segment:
                    o_from, o_to = _inside(last, columns, other.start, other.stop)
                    keep |= (q_from <= q_to)[:, None] & (o_from <= o_to)[None]
        return blocking.force(keep)


def _inside(first: Tensor, size: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """First and last token that blocks share with `[start, stop)`; first > last where none."""
    return first.clamp(min=start), (first + size).clamp(max=stop) - 1


@register(PATTERNS, "window")
@dataclass(frozen=True, slots=True)
class Window(Pattern):
    """`|dt| <= t`, `|dh| <= h` and `|dw| <= w`: half-widths, nothing wraps around."""

    t: Extent = None
    h: Extent = None
    w: Extent = None

    def __post_init__(self) -> None:
        for axis in ("t", "h", "w"):
            object.__setattr__(self, axis, _check_extent(axis, getattr(self, axis)))

    def terms(self, grid: Grid, device: torch.device | str | None = None) -> list[Term]:
        extents = (self.t, self.h, self.w)
        return [tuple(_near(e, size, device) for e, size in zip(extents, grid, strict=True))]


@register(PATTERNS, "multi_diagonal")
@dataclass(frozen=True, slots=True, kw_only=True)
class MultiDiagonal(Window):
    """The same place in all frames: `|dh| <= h`, `|dw| <= w`, and `|dt| <= t` if t is given.

    In natural order its map is one diagonal per frame distance (Sparse-vDiT, arXiv 2506.03065);
    under the order `hwt` it is one band, which is where it pays.
    """

    t: Extent = None
    h: Extent = 0
    w: Extent = 0


@register(PATTERNS, "stripe")
@dataclass(frozen=True, slots=True, kw_only=True)
class Stripe(Pattern):
    """The same keys for all queries: places `start, …, start + length - 1` of one axis.

    With `every` the stripe repeats along the axis with that period. On axis `t` these are whole
    frames (key frames), on `h` rows, on `w` columns. Ints are grid units, floats fractions of the
    axis; `length=None` runs to the end. On any grid at least one place is kept: a start beyond
    the axis moves to its last place, and lengths and periods are at least 1. (Vertical stripe of
    Sparse-vDiT, arXiv 2506.03065.)
    """

    axis: Literal["t", "h", "w"] = "t"
    start: int | float = 0
    length: Extent = 1
    every: Extent = None

    def __post_init__(self) -> None:
        if self.axis not in ("t", "h", "w"):
            raise ValueError(f"axis is one of t, h, w, got {self.axis!r}")
        start = self.start
        whole = type(start) is int and start >= 0
        if not whole and not (type(start) is float and 0 <= start < 1):
            raise ValueError(f"start is a place >= 0 or a fraction in [0, 1), got {start!r}")
        for name in ("length", "every"):
            object.__setattr__(self, name, _check_extent(name, getattr(self, name), least=1))

    def terms(self, grid: Grid, device: torch.device | str | None = None) -> list[Term]:
        axis = "thw".index(self.axis)
        size = grid[axis]
        start = int(self.start * size) if isinstance(self.start, float) else self.start
        offset = torch.arange(size, device=device) - min(start, size - 1)
        phase = offset if self.every is None else offset % max(1, _units(self.every, size))
        kept = (offset >= 0) & (phase < max(1, _units(self.length, size)))
        term = [_all(n, device) for n in grid]
        term[axis] = kept.expand(size, size)
        return [tuple(term)]


@register(PATTERNS, "first_frames", "sink")
@dataclass(frozen=True, slots=True)
class FirstFrames(Pattern):
    """The keys of the first `n` frames, for all queries; also read under the kind `sink`.

    It matters for Wan and for image-to-video, not for HunyuanVideo (Radial Attention, Sparse
    VideoGen and Jenga agree).
    """

    n: int = 1

    def __post_init__(self) -> None:
        if type(self.n) is not int or self.n < 1:
            raise ValueError(f"n is a number of frames, at least 1, got {self.n!r}")

    def terms(self, grid: Grid, device: torch.device | str | None = None) -> list[Term]:
        first = torch.arange(grid[0], device=device) < self.n
        return [(first.expand(grid[0], grid[0]), _all(grid[1], device), _all(grid[2], device))]


@register(PATTERNS, "radial")
@dataclass(frozen=True, slots=True)
class Radial(Pattern):
    """A band that halves with every doubling of the frame distance r (arXiv 2506.19852).

    Frames at r <= 1 see each other in full. Beyond, the paper keeps `|k - l| + 1 <= width`, with k
    and l the places in their frames in raster order: on either side of the diagonal a width of
    `decay * h * w / 2**floor(log2 r)` tokens. In grid units, so that it carries over: the whole
    rows nearest to that, `|dh| <= width / w`; below one row, columns of the same row,
    `|dw| + 1 <= width`; below one token, the same place alone, and only at every
    `ceil(1 / width)`-th r. `first_frame_sink` keeps the keys of frame 0 for all queries.
    """

    decay: int | float = 1.0
    first_frame_sink: bool = False

    def __post_init__(self) -> None:
        if type(self.decay) not in (int, float) or not 1e-6 <= self.decay <= 1e6:
            raise ValueError(f"decay is a positive number, from 1e-6 to 1e6, got {self.decay!r}")
        if type(self.first_frame_sink) is not bool:
            raise ValueError(f"first_frame_sink is true or false, got {self.first_frame_sink!r}")
        object.__setattr__(self, "decay", float(self.decay))

    def terms(self, grid: Grid, device: torch.device | str | None = None) -> list[Term]:
        frames, rows, columns = grid
        r = _distance(frames, device)
        out = [(r <= 1, _all(rows, device), _all(columns, device))]
        for level in range(1, (frames - 1).bit_length()):
            at = (r >= 2**level) & (r < 2 ** (level + 1))
            width = self.decay * rows * columns / 2**level
            if width < 1:
                at = at & (r % -int(-1 // width) == 0)
            whole = width >= columns
            h, w = (int(width // columns), None) if whole else (0, max(0, int(width) - 1))
            out.append((at, _near(h, rows, device), _near(w, columns, device)))
        return out + (FirstFrames(1).terms(grid, device) if self.first_frame_sink else [])
