"""The ranks that make one attention call together, as diffusers' context parallelism has them.

A rank holds a part of the tokens. Under Ulysses (arXiv 2309.14509) the ranks exchange, before
attention, tokens for heads: each then has the whole sequence for some of the heads, and after it
they exchange back. Ring attention instead passes the keys round, a part at a time.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from accel.errors import AccelError

__all__ = ["Ranks"]


@dataclass(frozen=True, slots=True, eq=False)
class Ranks:
    """group: the ranks of one sequence; rank, count: this one of so many; alike: whether all hold
    equally many tokens.

    Everything below but `of` is a collective call: all ranks make it, in one order, or all hang. So
    whatever decides about a call has to be known alike to all of them.
    """

    group: Any
    rank: int
    count: int
    alike: bool

    @classmethod
    def of(cls, config: Any) -> "Ranks | None":
        """From diffusers' `ParallelConfig` of a processor or a model; None where tokens are not
        shared out.

        Raises AccelError for ring attention.
        """
        context = getattr(config, "context_parallel_config", None)
        if context is None:
            return None
        if context.ring_degree > 1:
            raise AccelError(
                f"context parallelism with ring_degree={context.ring_degree} cannot go with a plan:"
                " a ring gives attention a part of the keys at a time, and a sparse pattern picks"
                " its blocks from the whole sequence; use ulysses_degree alone"
            )
        group = context._ulysses_mesh.get_group()
        alike = not getattr(context, "ulysses_anything", False)
        return cls(group, dist.get_rank(group), context.ulysses_degree, alike)

    def sizes(self, tokens: int, device: torch.device) -> tuple[int, ...]:
        """How many tokens every rank holds, when this one holds `tokens`."""
        if self.alike:
            return (tokens,) * self.count
        held = torch.zeros(self.count, dtype=torch.int64, device=device)
        held[self.rank] = tokens
        return tuple(self.total(held).tolist())

    def total(self, x: Tensor) -> Tensor:
        """The sum over the ranks; x itself is left alone."""
        x = x.clone()
        dist.all_reduce(x, group=self.group)
        return x

    def to_each(self, x: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Give every rank its piece of x, one after another; what came from each, likewise.

        sent, received: elements for and from every rank; flat tensors.
        """
        out = x.new_empty(sum(received))
        dist.all_to_all_single(out, x, received, sent, group=self.group)
        return out
