"""Block sets: a mask that was found beforehand, kept as it is (PAROAttention, arXiv 2506.16054)."""

import base64
import binascii
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from accel.blocking import Blocking
from accel.kind import register
from accel.layout import Grid, Layout, Segment, as_grid
from accel.order import inverse, order_indices, parse_order
from accel.pattern import PATTERNS, Pattern
from accel.pattern_union import Union

__all__ = ["Blocks", "block_sets"]

MAX_TOKENS = 1 << 22
MAX_SIDE = 1024  # tokens of a block


@register(PATTERNS, "blocks")
@dataclass(frozen=True, slots=True)
class Blocks(Pattern):
    """The blocks of a map that was made for one grid, order and block.

    grid, block, order: what it was made for; start: tokens of the sequence before the grid, by
    which its first block is shared with text. bits: one for every block that has tokens of the
    grid, row by row, eight to a byte, the first one highest; or that in base64, as files have it.

    There the mask is the map itself. Elsewhere every block takes what the map has for the block of
    its middle token: the token's frame, row and column are scaled to the map's grid, each by
    itself, and looked up in its order. A row that finds nothing keeps the block it lies in.
    """

    grid: Grid
    block: tuple[int, int]
    bits: bytes = field(repr=False)
    order: str = "thw"
    start: int = 0
    readers: ClassVar = {
        "grid": as_grid,
        "block": lambda value: _check_pair(value),
        "bits": lambda value: value if isinstance(value, bytes) else _decoded(value),
        "order": lambda value: parse_order(_text("order", value)).name,
        "start": lambda value: _check_start(value),
    }

    def __post_init__(self) -> None:
        object.__setattr__(self, "order", parse_order(self.order).name)
        if prod(as_grid(self.grid)) > MAX_TOKENS:
            raise ValueError(f"a map has at most {MAX_TOKENS} tokens, got grid {self.grid}")
        _check_pair(self.block)
        _check_start(self.start)
        rows, columns = self.shape
        if len(self.bits) != -(-rows * columns // 8):
            raise ValueError(
                f"a map of {rows} x {columns} blocks has {-(-rows * columns // 8)} bytes, got"
                f" {len(self.bits)}"
            )

    @classmethod
    def of(cls, keep: Bool[Tensor, "q_blocks kv_blocks"], blocking: Blocking) -> "Blocks":
        """The map of a mask of `blocking`: what it has for the blocks of the first grid."""
        if keep.shape != (blocking.q_blocks, blocking.kv_blocks):
            raise ValueError(
                f"this blocking has {blocking.q_blocks} x {blocking.kv_blocks} blocks, got a mask"
                f" of shape {tuple(keep.shape)}"
            )
        segment = next((s for s in blocking.layout.segments if s.grid is not None), None)
        if segment is None or segment.grid is None:
            raise ValueError("a map is of a grid, and this layout has none")
        rows, columns = (slice(*_range(segment, size)) for size in blocking.block)
        return cls(
            grid=segment.grid,
            block=blocking.block,
            bits=np.packbits(keep[rows, columns].cpu().numpy()).tobytes(),
            order=blocking.order,
            start=segment.start,
        )

    @property
    def shape(self) -> tuple[int, int]:
        """Query and key blocks that have tokens of the grid."""
        own = Segment("grid", self.start, prod(self.grid), self.grid)
        (top, bottom), (left, right) = (_range(own, size) for size in self.block)
        return bottom - top, right - left

    @property
    def name(self) -> str:
        rows, columns = self.shape
        keep = int.from_bytes(self.bits, "big").bit_count() / (rows * columns)
        return f"{self.kind}({'x'.join(map(str, self.grid))},keep={keep:.3f})"

    def to_dict(self) -> dict:
        return {
            "kind": self.kind,
            "grid": list(self.grid),
            "block": list(self.block),
            "order": self.order,
            "start": self.start,
            "bits": base64.b64encode(self.bits).decode(),
        }

    def mask(
        self, blocking: Blocking, device: torch.device | str | None = None
    ) -> Bool[Tensor, "q_blocks kv_blocks"]:
        if blocking.order != self.order:
            raise ValueError(
                f"blocks found in order {self.order!r} are none of order {blocking.order!r}"
            )
        rows, columns = self.shape
        flat = np.unpackbits(np.frombuffer(self.bits, np.uint8), count=rows * columns)
        found = torch.from_numpy(flat.reshape(rows, columns)).to(device, torch.bool)
        keep = torch.zeros(blocking.q_blocks, blocking.kv_blocks, dtype=torch.bool, device=device)
        grids = [s for s in blocking.layout.segments if s.grid is not None]
        for segment in grids:
            (top, bottom), (left, right) = (_range(segment, size) for size in blocking.block)
            row, column = (self._sources(side, segment, blocking, device) for side in (0, 1))
            own = found[row][:, column]
            middle = _middles(segment, blocking.block[0], device) // blocking.block[1] - left
            nothing = ~own.any(1)
            own[nothing, middle[nothing]] = True
            keep[top:bottom, left:right] |= own
            for other in grids:
                if other is not segment:
                    keep[top:bottom, slice(*_range(other, blocking.block[1]))] = True
        return blocking.force(keep)

    def _sources(
        self, side: int, segment: Segment, blocking: Blocking, device
    ) -> Int[Tensor, " blocks"]:
        """For every block of a segment, the map's block of its middle token; 0 queries, 1 keys."""
        assert segment.grid is not None
        place = _middles(segment, blocking.block[side], device)
        order = blocking.indices(device)
        token = (place if order is None else order[place]) - segment.start
        # the middle of a cell, in cells of the map: whole numbers only, so that it is exact
        there = torch.zeros_like(token)
        stride = segment.length
        for size, wanted in zip(segment.grid, self.grid, strict=True):
            stride //= size
            axis = token // stride % size
            there = there * wanted + (2 * axis + 1) * wanted // (2 * size)
        places = inverse(order_indices(self.order, Layout.of(self.grid), device))
        return (places[there] + self.start) // self.block[side] - self.start // self.block[side]


def block_sets(select: Any) -> Iterator[Blocks]:
    """The block sets of a selection: itself, those among the parts of a union, or one joined to an
    estimator.
    """
    if isinstance(select, Blocks):
        yield select
    elif isinstance(select, Union):
        for part in select.parts:
            yield from block_sets(part)
    elif isinstance(joined := getattr(select, "pattern", None), Pattern):
        yield from block_sets(joined)


def _range(segment: Segment, size: int) -> tuple[int, int]:
    """First block that has tokens of a segment, and the one after the last."""
    return segment.start // size, -(-segment.stop // size)


def _middles(segment: Segment, size: int, device) -> Int[Tensor, " blocks"]:
    """The place of the middle token that every block shares with a segment."""
    first = torch.arange(*_range(segment, size), device=device) * size
    last = (first + size).clamp(max=segment.stop)
    return (first.clamp(min=segment.start) + last - 1) // 2


def _check_pair(value) -> tuple[int, int]:
    """`value` as a block's two sizes."""
    block = tuple(value) if isinstance(value, list | tuple) else ()
    if len(block) != 2 or any(type(n) is not int or not 0 < n <= MAX_SIDE for n in block):
        raise ValueError(f"block is two sizes from 1 to {MAX_SIDE}, got {value!r:.80}")
    return block


def _check_start(value) -> int:
    if type(value) is not int or not 0 <= value <= MAX_TOKENS:
        raise ValueError(f"start is a number of tokens up to {MAX_TOKENS}, got {value!r:.80}")
    return value


def _decoded(value) -> bytes:
    try:
        return base64.b64decode(_text("bits", value), validate=True)
    except binascii.Error as error:
        raise ValueError(f"bits are no base64: {error}") from error


def _text(name: str, value) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is a text, got {value!r:.40}")
    return value
