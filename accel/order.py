"""Orders: permutations of the visual tokens that bring related tokens into the same block.

An order is named in a plan by a short string:

* `thw`, `twh`, `htw`, `hwt`, `wth`, `wht`: axis orders, first letter slowest. `thw` is natural.
  (PAROAttention, arXiv 2506.16054; the frame-token exchange of Sparse VideoGen is `hwt`.)
* `tile(2,4,4)`: tiles of 2 frames x 4 rows x 4 columns, the tiles in `thw` order and the tokens
  of a tile in `thw` order. Tiles at the far edges are smaller; nothing is padded. (STA, arXiv
  2502.04507; VSA, arXiv 2505.13389.)
* `hilbert`: a Hilbert curve over the enclosing power-of-two box (Jenga, arXiv 2505.16864), by
  Skilling's transform (AIP Conf. Proc. 707, 2004). Axes of size 1 are left out, so an image gets
  the plane curve. On a box that is itself a power-of-two cube neighbours differ by one step.
* `morton`: bits of t, h, w interleaved.

An order permutes each grid inside its own span of the sequence; text and padding stay in place.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from accel.errors import nearest
from accel.layout import Grid, Layout

__all__ = ["ORDERS", "Order", "inverse", "order_indices", "parse_order", "reorder"]

AXIS_ORDERS = ("thw", "twh", "htw", "hwt", "wth", "wht")
ORDERS = (*AXIS_ORDERS, "tile(t,h,w)", "hilbert", "morton")
MAX_TILE = 1 << 20
_TILE = re.compile(r"tile\(\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*\)")


@dataclass(frozen=True, slots=True)
class Order:
    """A parsed order: an axis order, `tile` with its sizes, `hilbert` or `morton`."""

    kind: str
    tile: Grid | None = None

    def __post_init__(self) -> None:
        known = (*AXIS_ORDERS, "tile", "hilbert", "morton")
        if self.kind not in known:
            raise ValueError(f"unknown order {self.kind!r}; {nearest(str(self.kind), known)}")
        if (self.kind == "tile") != (self.tile is not None):
            raise ValueError(f"exactly tile orders have a tile, got {self.kind} with {self.tile}")
        if self.tile is not None and (len(self.tile) != 3 or min(self.tile) < 1):
            raise ValueError(f"a tile is (t, h, w), each at least 1, got {self.tile}")
        if self.tile is not None and max(self.tile) > MAX_TILE:
            raise ValueError(f"a tile has at most {MAX_TILE} along an axis, got {self.tile}")

    @property
    def name(self) -> str:
        """The string that a plan holds."""
        return self.kind if self.tile is None else "tile({},{},{})".format(*self.tile)

    @property
    def is_natural(self) -> bool:
        """True where the order is the identity on every grid."""
        return self.kind == "thw" or self.tile == (1, 1, 1)


def parse_order(text: str) -> Order:
    """The order that `text` names; unknown names are refused with the nearest known one."""
    if match := _TILE.fullmatch(text.strip()):
        t, h, w = map(int, match.groups())
        return Order("tile", (t, h, w))
    if text == "tile" or text not in (*AXIS_ORDERS, "hilbert", "morton"):
        raise ValueError(f"unknown order {text!r}; {nearest(text, ORDERS)}")
    return Order(text)


def _coordinates(grid: Grid, device) -> list[Tensor]:
    """The t, h and w of every token of a grid, int64 `[tokens]` each."""
    axes = [torch.arange(size, device=device) for size in grid]
    return [axis.reshape(-1) for axis in torch.meshgrid(*axes, indexing="ij")]


def _interleave(axes: list[Tensor], bits: int) -> Tensor:
    """Bits of all axes woven together, highest first, the first axis on top at each level."""
    key = torch.zeros_like(axes[0])
    for bit in reversed(range(bits)):
        for axis in axes:
            key = (key << 1) | ((axis >> bit) & 1)
    return key


def _hilbert_key(axes: list[Tensor], bits: int) -> Tensor:
    """Position along the Hilbert curve of the cube of side `2 ** bits`.

    From the top level down, each orthant's content is turned so that the curve inside it runs
    along the canonical path: where an axis' bit is set the first axis is reflected below that
    bit, else the first axis and that axis change places below it. What is left is a Gray code of
    the path, undone by prefix XOR over the axes and then over the levels.
    """
    axes = list(axes)
    for bit in reversed(range(1, bits)):
        below = (1 << bit) - 1
        for i in range(len(axes)):
            upper = ((axes[i] >> bit) & 1).bool()
            swap = torch.where(upper, 0, (axes[0] ^ axes[i]) & below)
            if i:
                axes[i] = axes[i] ^ swap
            axes[0] = axes[0] ^ torch.where(upper, below, swap if i else 0)
    for i in range(1, len(axes)):
        axes[i] = axes[i] ^ axes[i - 1]
    flip = torch.zeros_like(axes[0])
    for bit in range(1, bits):
        flip = flip ^ (((axes[-1] >> bit) & 1) * ((1 << bit) - 1))
    return _interleave([axis ^ flip for axis in axes], bits)


def _keys(order: Order, grid: Grid, device) -> Tensor:
    """A sort key for every token of the grid, all different: int64 `[t * h * w]`."""
    coords = _coordinates(grid, device)
    if order.kind in AXIS_ORDERS:
        key = torch.zeros_like(coords[0])
        for letter in order.kind:
            axis = "thw".index(letter)
            key = key * grid[axis] + coords[axis]
        return key
    if order.tile is not None:
        key = torch.zeros_like(coords[0])
        for coord, size, side in zip(coords, grid, order.tile, strict=True):
            key = key * -(-size // side) + coord // side
        for coord, side in zip(coords, order.tile, strict=True):
            key = key * side + coord % side
        return key
    bits = (max(grid) - 1).bit_length()
    wide = [coord for coord, size in zip(coords, grid, strict=True) if size > 1]
    if not wide:
        return coords[0]
    return _hilbert_key(wide, bits) if order.kind == "hilbert" else _interleave(wide, bits)


def order_indices(
    order: Order | str, layout: Layout, device: torch.device | str | None = None
) -> Int[Tensor, " length"]:
    """Permutation of the whole sequence: place i of the ordered sequence is token `indices[i]`."""
    order = parse_order(order) if isinstance(order, str) else order
    indices = torch.arange(layout.length, device=device)
    if order.is_natural:
        return indices
    for segment in layout.segments:
        if segment.grid is not None:
            place = torch.argsort(_keys(order, segment.grid, device))
            indices[segment.start : segment.stop] = segment.start + place
    return indices


def inverse(indices: Int[Tensor, " length"]) -> Int[Tensor, " length"]:
    """The permutation that undoes `indices`: `indices[inverse] = inverse[indices] = 0, 1, …`."""
    out = torch.empty_like(indices)
    out[indices] = torch.arange(len(indices), dtype=indices.dtype, device=indices.device)
    return out


def reorder(order: Order | str, layout: Layout) -> tuple[Callable, Callable]:
    """`(apply, restore)` on `[..., tokens, dim]`; each undoes the other bit for bit.

    The natural order hands the tensor itself back.
    """
    order = parse_order(order) if isinstance(order, str) else order
    if order.is_natural:
        return (lambda x: x), (lambda x: x)
    forward = order_indices(order, layout)
    tables = {"apply": forward, "restore": inverse(forward)}

    def permute(x: Shaped[Tensor, "*lead length dim"], which: str) -> Tensor:
        if x.shape[-2] != layout.length:
            raise ValueError(f"expected {layout.length} tokens, got shape {tuple(x.shape)}")
        if tables[which].device != x.device:
            tables[which] = tables[which].to(x.device)
        return x.index_select(-2, tables[which])

    return (lambda x: permute(x, "apply")), (lambda x: permute(x, "restore"))
