"""Windows of a map of tokens: which tokens they hold, which score highest, and both ways between
the map and the tokens of the kept ones.

Rolling, padding and cutting are one table of tokens, so that a gather and a scatter of whole tokens
stand for them. Ranking as SparseViT has it (Chen et al., CVPR 2023, arXiv 2303.17605).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["Cut", "Places", "gather", "places_of", "ranked", "scatter", "token_energy"]


class Cut(NamedTuple):
    """How a map of tokens is cut into windows: rolled back by `shift`, then padded at its end.

    rows, columns: of the map; window, shift: (height, width) in tokens. by_unit: the map is already
    in the order of Hiera's mask units, in which place p of window w is token ``p windows + w``;
    rows and columns are then those of the windows.
    """

    rows: int
    columns: int
    window: tuple[int, int]
    shift: tuple[int, int] = (0, 0)
    by_unit: bool = False

    @property
    def counts(self) -> tuple[int, int]:
        """Rows and columns of windows."""
        if self.by_unit:
            return self.rows, self.columns
        (height, width), rows, columns = self.window, self.rows, self.columns
        return (rows + height - 1) // height, (columns + width - 1) // width

    @property
    def windows(self) -> int:
        rows, columns = self.counts
        return rows * columns

    @property
    def size(self) -> int:
        """Places of a window."""
        return self.window[0] * self.window[1]

    @property
    def tokens(self) -> int:
        return self.rows * self.columns * (self.size if self.by_unit else 1)

    @property
    def ragged(self) -> bool:
        """Whether some windows have places without a token."""
        return self.windows * self.size != self.tokens

    def table(self, device: torch.device | str | None = None) -> Int[Tensor, "windows size"]:
        """The token at every place of every window; ``tokens`` stands for padding."""
        if self.by_unit:
            return torch.arange(self.tokens, device=device).view(self.size, self.windows).mT
        (height, width), (down, across) = self.window, self.counts
        rows, in_rows = _axis(self.rows, down * height, self.shift[0], device)
        columns, in_columns = _axis(self.columns, across * width, self.shift[1], device)
        tokens = rows[:, None] * self.columns + columns
        tokens = torch.where(in_rows[:, None] & in_columns, tokens, self.tokens)
        parts = tokens.view(down, height, across, width).transpose(1, 2)
        return parts.reshape(self.windows, self.size)


def _axis(length: int, padded: int, shift: int, device) -> tuple[Tensor, Tensor]:
    """Where each place of a rolled axis comes from, and whether it is one of the map."""
    place = torch.arange(padded, device=device)
    return (place + shift) % length, place < length


def token_energy(
    x: Float[Tensor, "batch tokens channels"], score: str
) -> Float[Tensor, "batch tokens"]:
    """What every token adds to the square of its window's score; fp32.

    norm_of_means: ``(mean over channels of |x|)²``; norm: ``sum over channels of x²``; contrast:
    ``sum over channels of (x - mean over tokens of x)²``.
    """
    if score == "contrast":
        x = x - x.mean(1, keepdim=True, dtype=torch.float32)
        return torch.linalg.vector_norm(x, dim=-1).square()
    if score == "norm":
        return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).square()
    return x.abs().mean(-1, dtype=torch.float32).square()


def ranked(
    energy: Float[Tensor, "batch tokens"], table: Int[Tensor, "windows size"], kept: int
) -> Int[Tensor, "batch kept"]:
    """The windows of every image with the most energy, best first; of equals the first.

    Padding has none, so that windows at the border score low.
    """
    windows, size = table.shape
    energy = F.pad(energy, (0, 1))
    scores = energy.index_select(1, table.flatten()).view(-1, windows, size).sum(-1)
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :kept]


class Places(NamedTuple):
    """Where the tokens of kept windows lie in a map of all images, one token after another.

    tokens: number in the map, ``batch * tokens`` for padding; valid: None where all are tokens.
    """

    tokens: Int[Tensor, "batch kept size"]
    valid: Bool[Tensor, "batch kept size"] | None

    def first(self, kept: int) -> "Places":
        """Of the best `kept` windows of every image."""
        valid = None if self.valid is None else self.valid[:, :kept]
        return Places(self.tokens[:, :kept], valid)


def places_of(
    windows: Int[Tensor, "batch kept"],
    table: Int[Tensor, "windows size"],
    tokens: int,
    ragged: bool,
) -> Places:
    """The places of these windows; tokens: of one image."""
    batch, kept = windows.shape
    found = table.index_select(0, windows.flatten()).view(batch, kept, -1)
    start = torch.arange(batch, device=found.device)[:, None, None] * tokens
    if not ragged:
        return Places(found + start, None)
    valid = found < tokens
    return Places(torch.where(valid, found + start, batch * tokens), valid)


def gather(
    x: Float[Tensor, "batch tokens channels"], places: Places
) -> Float[Tensor, "batch kept size channels"]:
    """The tokens at these places; at padding whatever finite or not is at hand."""
    flat, tokens = x.flatten(0, 1), places.tokens
    at = tokens.flatten()
    if places.valid is not None:
        at = at.clamp(max=flat.shape[0] - 1)
    return flat.index_select(0, at).view(*tokens.shape, x.shape[-1])


def scatter(
    x: Float[Tensor, "batch tokens channels"],
    places: Places,
    rows: Float[Tensor, "batch kept size channels"],
) -> Float[Tensor, "batch tokens channels"]:
    """A copy of x with `rows` at these places; what is at padding goes nowhere.

    In the wider of both dtypes. Gradients pass to both.
    """
    dtype = torch.promote_types(x.dtype, rows.dtype)
    flat, at = x.flatten(0, 1).to(dtype), places.tokens.flatten()
    # a row behind the map takes what is at padding
    out = flat.clone() if places.valid is None else F.pad(flat, (0, 0, 0, 1))
    out = out.index_put_((at,), rows.flatten(0, 2).to(dtype))
    return out[: flat.shape[0]].view_as(x)
