"""A layout cut into blocks: which blocks hold text, which are padding, in which order.

Blocks are cut from the ordered sequence: block i holds places `[i * size, (i + 1) * size)`, and
the last one is whatever is left. Text and padding never move under an order, so their blocks
follow from the layout alone.

The rules that every mask obeys, here in one place (AdaSpa, arXiv 2502.21079, and Jenga, arXiv
2505.16864, agree on the first): a block that holds any token of text, or of a reference image, is
kept as a row and as a column; a block of padding alone is never kept.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from accel.layout import CONDITIONS, Layout
from accel.order import order_indices, parse_order

__all__ = ["Blocking"]


@dataclass(frozen=True, slots=True)
class Blocking:
    """`layout` in `order`, cut into blocks of `block = (q_block, kv_block)` tokens."""

    layout: Layout
    order: str = "thw"
    block: tuple[int, int] = (128, 128)

    def __post_init__(self) -> None:
        object.__setattr__(self, "order", parse_order(self.order).name)
        object.__setattr__(self, "block", tuple(self.block))
        if len(self.block) != 2 or any(type(n) is not int or n < 1 for n in self.block):
            raise ValueError(
                f"a block is (q_block, kv_block), both at least 1 token, got {self.block}"
            )
        if self.layout.padded_inside:
            raise ValueError("this layout has padding inside; cut it out: layout.without_padding()")

    @property
    def q_blocks(self) -> int:
        """Query blocks, the ragged last one included."""
        return -(-self.layout.length // self.block[0])

    @property
    def kv_blocks(self) -> int:
        """Key blocks, the ragged last one included."""
        return -(-self.layout.length // self.block[1])

    def indices(self, device: torch.device | str | None = None) -> Int[Tensor, " length"] | None:
        """The order as a permutation of the whole sequence, None where it is the natural one."""
        if parse_order(self.order).is_natural:
            return None
        return order_indices(self.order, self.layout, device)

    def text_blocks(
        self, device: torch.device | str | None = None
    ) -> tuple[Bool[Tensor, " q_blocks"], Bool[Tensor, " kv_blocks"]]:
        """Query and key blocks that hold any token of text or of a reference image, mixed blocks
        included.
        """
        spans = [(s.start, s.stop) for s in self.layout.segments if s.kind in CONDITIONS]
        return self._touched(spans, 0, device), self._touched(spans, 1, device)

    def pad_blocks(
        self, device: torch.device | str | None = None
    ) -> tuple[Bool[Tensor, " q_blocks"], Bool[Tensor, " kv_blocks"]]:
        """Query and key blocks whose tokens are all padding."""
        spans = [(0, self.layout.valid_length)]
        return ~self._touched(spans, 0, device), ~self._touched(spans, 1, device)

    def grid_blocks(self, device: torch.device | str | None = None) -> Int[Tensor, " kv_blocks"]:
        """Which grid every key block belongs to; -1 for blocks that hold text or padding alone.

        A block that straddles two grids counts to the first.
        """
        text, pad = self.text_blocks(device)[1], self.pad_blocks(device)[1]
        first = self.layout.grid_index(device)[:: self.block[1]].long()
        return first.masked_fill(text | pad, -1)

    def force(
        self, keep: Bool[Tensor, "*lead q_blocks kv_blocks"]
    ) -> Bool[Tensor, "*lead q_blocks kv_blocks"]:
        """`keep` with text rows and columns added, and padding rows and columns taken away."""
        if keep.shape[-2:] != (self.q_blocks, self.kv_blocks):
            raise ValueError(
                f"this blocking has {self.q_blocks} x {self.kv_blocks} blocks, "
                f"got a mask of shape {tuple(keep.shape)}"
            )
        q_text, kv_text = self.text_blocks(keep.device)
        q_pad, kv_pad = self.pad_blocks(keep.device)
        keep = keep | q_text[:, None] | kv_text[None, :]
        return keep & ~q_pad[:, None] & ~kv_pad[None, :]

    def _touched(self, spans: list[tuple[int, int]], side: int, device) -> Tensor:
        """Blocks of one side (0 queries, 1 keys) that hold a token of any span `[start, stop)`."""
        size = self.block[side]
        out = torch.zeros((self.q_blocks, self.kv_blocks)[side], dtype=torch.bool, device=device)
        for start, stop in spans:
            out[start // size : (stop - 1) // size + 1] = True
        return out
