"""Groups of patches that travel through a vision transformer as one token each.

Merging is the bipartite soft matching of ToMe (Bolya et al., ICLR 2023, arXiv 2210.09461), fusion
the one of EViT (Liang et al., ICLR 2022, arXiv 2202.07800). All is gathers and products of tensors
of fixed shapes: it compiles, gradients flow, images of a batch group differently, and equal calls
give equal tokens. Prefix tokens (class, distillation, registers) stand first and are never touched.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["Groups", "Step", "added", "fuse", "left", "match"]

Tokens = Float[Tensor, "batch tokens dim"]
Patches = Float[Tensor, "batch patches"]


class Step(NamedTuple):
    """One reduction of `n` tokens to `m`: token i goes to group `into[i]`.

    into: [batch, n], below m. first: [batch, m], the token whose place in the image a group has.
    others: [batch, n - m], the tokens that are no group's first. alone: so many groups, before all
    others, have no token but their first. weight: [batch, n], the part that a token has in the mean
    of its group; those of one group sum up to 1.
    """

    into: Int[Tensor, "batch n"]
    first: Int[Tensor, "batch m"]
    others: Int[Tensor, "batch gone"]
    alone: int
    weight: Float[Tensor, "batch n"]

    def reduce(self, x: Float[Tensor, "batch n dim"]) -> Float[Tensor, "batch m dim"]:
        """``y[g] = Σ_{i in g} weight_i x_i``."""
        first, more = (self._weighted(x, index) for index in (self.first, self.others))
        into = self.into.gather(1, self.others) - self.alone
        grown = added(first[:, self.alone :], more, into, in_any_order=x.device.type != "cpu")
        return torch.cat([first[:, : self.alone], grown], 1)

    def _weighted(
        self, x: Float[Tensor, "batch n dim"], index: Int[Tensor, "batch some"]
    ) -> Float[Tensor, "batch some dim"]:
        weight = self.weight.gather(1, index)[..., None].to(x.dtype)
        return x.gather(1, index[..., None].expand(-1, -1, x.shape[2])) * weight

    def total(self, size: Float[Tensor, "batch n"]) -> Float[Tensor, "batch m"]:
        """Sums over groups of whole numbers, exact in any order."""
        zeros = size.new_zeros(size.shape[0], self.first.shape[1])
        return zeros.scatter_add(1, self.into, size)


def added(
    groups: Float[Tensor, "batch groups dim"],
    more: Float[Tensor, "batch some dim"],
    into: Int[Tensor, "batch some"],
    *,
    in_any_order: bool,
) -> Float[Tensor, "batch groups dim"]:
    """Each of `more` added to its group.

    in_any_order: the device adds to one address in any order; then a product with ones and zeros
    takes the place of additions, so that equal calls give equal sums.
    """
    if not in_any_order:
        return groups.scatter_add(1, into[..., None].expand_as(more), more)
    numbers = torch.arange(groups.shape[1], device=groups.device)
    return groups + (into[:, None] == numbers[:, None]).to(more.dtype) @ more


@dataclass(frozen=True)
class Groups:
    """Which patches of every image each token stands for.

    size: patches of a token. source: the token of a patch. place: the patch whose place a token
    has. prefix: tokens before those of patches.
    """

    size: Float[Tensor, "batch tokens"]
    source: Int[Tensor, "batch patches"]
    place: Int[Tensor, "batch tokens"]
    prefix: int

    @classmethod
    def each(cls, x: Tokens, prefix: int) -> "Groups":
        """Every patch of `x` by itself."""
        patches = torch.arange(x.shape[1] - prefix, device=x.device).expand(x.shape[0], -1)
        return cls(torch.ones(patches.shape, device=x.device), patches, patches, prefix)

    @property
    def count(self) -> int:
        """Tokens that stand for patches."""
        return self.size.shape[1]

    def split(
        self, x: Tokens
    ) -> tuple[Float[Tensor, "batch prefix dim"], Float[Tensor, "batch rest dim"]]:
        """Prefix and the others."""
        return x[:, : self.prefix], x[:, self.prefix :]

    def after(self, step: Step) -> "Groups":
        """These groups, grouped again."""
        return Groups(
            step.total(self.size),
            step.into.gather(1, self.source),
            self.place.gather(1, step.first),
            self.prefix,
        )

    def taken(self, x: Tokens) -> Float[Tensor, "batch fewer dim"]:
        """Of all patches those whose places the tokens have: undoes `spread`, exactly."""
        return _rows(x, self.place, self.prefix)

    def spread(self, x: Tokens) -> Float[Tensor, "batch more dim"]:
        """Every patch as its token is, in the order of the image: unmerging, exact where the
        members of a group are equal.
        """
        return _rows(x, self.source, self.prefix)

    def rope(self, rope: Tensor) -> Tensor:
        """Rows of a rotary table `[..., patches, dim]` at the tokens' places, for every image:
        `[batch, heads or 1, tokens, dim]`.
        """
        rope = rope.reshape(*(1,) * (4 - rope.ndim), *rope.shape)
        rope = rope.expand(self.place.shape[0], -1, -1, -1)
        index = self.place[:, None, :, None].expand(-1, rope.shape[1], -1, rope.shape[3])
        return rope.gather(2, index)

    def bias(
        self, mask: Tensor | None, *, proportional: bool
    ) -> Float[Tensor, "batch heads queries tokens"] | None:
        """What is added to logits where tokens stand for groups.

        A key of which n equal members are attended with biases b_j counts as
        ``Σ_j exp(s + b_j) = exp(s + ln Σ_j exp(b_j))``: ``ln n`` more without a mask (ToMe's
        proportional attention), ``ln Σ exp(b)`` with one, and ``ln n`` less of these where
        attention is not proportional. Of a mask with a row for every query that of the token's
        place is taken.

        mask: as for `scaled_dot_product_attention`, for prefix and all patches. None is nothing.
        """
        size = torch.nn.functional.pad(self.size, (self.prefix, 0), value=1.0)
        logs = size.log()[:, None, None]
        if mask is None:
            return logs if proportional else None
        # a masked key is no -inf yet: infinities have no difference
        least = torch.finfo(torch.float32).min
        mask = mask.float() if mask.dtype != torch.bool else torch.where(mask, 0.0, least)
        mask = mask.clamp_min(least).reshape(*(1,) * (4 - mask.ndim), *mask.shape)
        mask = mask.expand(size.shape[0], -1, -1, self.prefix + self.source.shape[1])
        if mask.shape[2] > 1:
            mask = _rows(mask, self.place, self.prefix, dim=2)
        index = _indices(self.source, self.prefix)[:, None, None].expand(mask.shape)
        highest = mask.amax(-1, keepdim=True)
        sums = mask.new_zeros(*mask.shape[:3], size.shape[1])
        sums = sums.scatter_add(3, index, (mask - highest).exp())
        found = sums.log() + highest
        found = found if proportional else found - logs
        return found.masked_fill(found <= least / 2, -torch.inf)


def left(keep: float, patches: int, tokens: int, *, halves: bool) -> int:
    """Tokens that a block passes on of the `tokens` of an image of `patches`.

    ``round(keep · patches)``, one at least, not more than there are; at least half of them where
    merging can only halve.
    """
    wanted = max(1, int(keep * patches + 0.5))
    return min(tokens, max(wanted, tokens - tokens // 2) if halves else wanted)


def match(metric: Tokens, size: Patches, count: int) -> Step:
    """Merge the most similar pairs, until `count` tokens (half of them at least) are left.

    The second, fourth, ... tokens each propose the most similar (by the cosine of `metric`) of the
    first, third, ...; the best ``n - count`` proposals are merged, by means weighted by `size`.
    Left are the others of the proposing tokens, then those that were proposed to, each in their
    order. That is ToMe's order in models with a class token. Of equal proposals the first wins.
    """
    n = metric.shape[1]
    merged = n - count
    metric = torch.nn.functional.normalize(metric.detach().float(), dim=-1)
    best, target = (metric[:, 1::2] @ metric[:, 0::2].mT).max(-1)
    order = best.argsort(dim=1, descending=True, stable=True)
    gone, stay = order[:, :merged], order[:, merged:].sort(dim=1).values
    kept = stay.shape[1]
    rank = torch.arange(n, device=metric.device).expand(metric.shape[0], -1)
    proposers = torch.empty_like(target).scatter(1, gone, kept + target.gather(1, gone))
    proposers = proposers.scatter(1, stay, rank[:, :kept])
    into = torch.empty_like(rank, memory_format=torch.contiguous_format)
    into[:, 1::2] = proposers
    into[:, 0::2] = kept + rank[:, : n - n // 2]
    first = torch.cat([2 * stay + 1, 2 * rank[:, : n - n // 2]], 1)
    step = Step(into, first, 2 * gone + 1, kept, size)
    return step._replace(weight=size / step.total(size).gather(1, into))


def fuse(score: Patches, count: int) -> Step:
    """Keep the ``count - 1`` tokens of the highest score, and make one of the others.

    The kept stay in their order; last comes the mean of the others weighted by their score, at the
    place of the highest of them. Of equal scores the first wins. (EViT sums without dividing by the
    weights, and keeps one more.)
    """
    order = score.argsort(dim=1, descending=True, stable=True)
    kept = order[:, : count - 1].sort(dim=1).values
    others = order[:, count - 1 :]
    rank = torch.arange(count - 1, device=score.device).expand_as(kept)
    into = torch.full_like(order, count - 1).scatter(1, kept, rank)
    # scores that are all zero weigh equally
    shares = score.gather(1, others) + torch.finfo(torch.float32).tiny
    weight = torch.ones_like(score).scatter(1, others, shares / shares.sum(1, keepdim=True))
    first = torch.cat([kept, others[:, :1]], 1)
    return Step(into, first, others[:, 1:], count - 1, weight)


def _indices(index: Int[Tensor, "batch tokens"], prefix: int) -> Int[Tensor, "batch all"]:
    """Of patches' numbers those of tokens, the prefix before them."""
    first = torch.arange(prefix, device=index.device).expand(index.shape[0], -1)
    return torch.cat([first, index + prefix], 1)


def _rows(x: Tensor, index: Int[Tensor, "batch tokens"], prefix: int, dim: int = 1) -> Tensor:
    """The prefix and the patches `index` of `x`, along its dimension `dim`."""
    rows = _indices(index, prefix)
    rows = rows.reshape(rows.shape[0], *(1,) * (dim - 1), -1, *(1,) * (x.ndim - dim - 1))
    shape = list(x.shape)
    shape[dim] = rows.shape[dim]
    return x.gather(dim, rows.expand(shape))
