"""Tokens for heads, and back: what ranks exchange around the attention of one site.

Heads go to the ranks they were dealt to (`accel.head_deal`), as many or few as those are. The
tokens of a rank are pieces of the sequence: of text and of video each its own part, where a model
splits the two apart, and attention has to see the sequence in its natural order again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor

from accel.head_deal import Heads
from accel.layout import Layout
from accel.ranks import Ranks

__all__ = ["Exchange", "Pieces", "cut", "pieces_of", "streams_of"]

# by rank: the ranges [start, stop) of the whole sequence that it holds, in the order it has them
Pieces = tuple[tuple[tuple[int, int], ...], ...]


def streams_of(layout: Layout) -> tuple[int, ...]:
    """Lengths of what enters a model as tensors of their own: text with its padding, and images."""
    lengths: list[int] = []
    last: bool | None = None
    for segment in layout.segments:
        visual = segment.kind in ("grid", "reference")
        if visual is last:
            lengths[-1] += segment.length
        else:
            lengths.append(segment.length)
        last = visual
    return tuple(lengths)


def pieces_of(streams: Sequence[int], ranks: int) -> Pieces:
    """What every rank holds when each stream is split by itself; the first ranks hold one token
    more where it does not divide, as `torch.tensor_split` has it.
    """
    held: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]
    for start, length in zip(accumulate(streams, initial=0), streams, strict=False):
        least, more = divmod(length, ranks)
        for rank in range(ranks):
            first = start + rank * least + min(rank, more)
            held[rank].append((first, first + least + (rank < more)))
    return tuple(tuple(ranges) for ranges in held)


def cut(x: Tensor, ranges: Sequence[tuple[int, int]], dim: int) -> Tensor:
    """The tokens of a rank, out of the whole sequence along `dim`."""
    return torch.cat([x.narrow(dim, start, stop - start) for start, stop in ranges], dim)


@dataclass(frozen=True, slots=True, eq=False)
class Exchange:
    """heads: of a site, by rank; those that no rank has stay where they are."""

    ranks: Ranks
    heads: Heads
    pieces: Pieces
    device: torch.device
    order: Tensor = field(init=False)

    def __post_init__(self) -> None:
        order = torch.tensor([h for heads in self.heads for h in heads], device=self.device)
        object.__setattr__(self, "order", order.long())

    @property
    def own(self) -> tuple[int, ...]:
        """The heads of this rank."""
        return self.heads[self.ranks.rank]

    @property
    def tokens(self) -> tuple[int, ...]:
        """How many every rank holds."""
        return tuple(sum(stop - start for start, stop in ranges) for ranges in self.pieces)

    def to_heads(
        self, *tensors: Float[Tensor, "batch heads held dim"]
    ) -> tuple[Float[Tensor, "batch own_heads tokens dim"], ...]:
        """The whole sequence of this rank's heads, of tensors of one shape; one message for all."""
        batch, _, held, dim = tensors[0].shape
        sent = tensors[0].new_empty((len(self.order), len(tensors), batch, held, dim))
        for place, x in enumerate(tensors):
            sent[:, place] = x.transpose(0, 1)[self.order]
        row = len(tensors) * batch * dim
        counts = [len(self.own) * row * tokens for tokens in self.tokens]
        got = self.ranks.to_each(
            sent.flatten(), [len(heads) * row * held for heads in self.heads], counts
        )
        out = got.new_empty((len(tensors), batch, len(self.own), sum(self.tokens), dim))
        shape = (len(self.own), len(tensors), batch)
        for ranges, tokens, part in zip(self.pieces, self.tokens, got.split(counts), strict=True):
            part = part.view(*shape, tokens, dim).permute(1, 2, 0, 3, 4)
            first = 0
            for start, stop in ranges:
                out[..., start:stop, :] = part[..., first : first + stop - start, :]
                first += stop - start
        return tuple(out)

    def to_tokens(
        self,
        x: Float[Tensor, "batch own_heads tokens dim"],
        out: Float[Tensor, "batch heads held dim"],
    ) -> None:
        """Write the outputs of all heads that were dealt, for the tokens of this rank, into out."""
        batch, own, _, dim = x.shape
        held = self.tokens[self.ranks.rank]
        by_head = x.transpose(0, 1)
        sent = torch.cat([cut(by_head, ranges, 2).flatten() for ranges in self.pieces])
        got = self.ranks.to_each(
            sent,
            [own * batch * dim * tokens for tokens in self.tokens],
            [len(heads) * batch * dim * held for heads in self.heads],
        )
        got = got.view(len(self.order), batch, held, dim)
        out.index_copy_(1, self.order, got.transpose(0, 1))
