"""How the ranks of a call share its heads: who has which tokens, who computes which heads.

A rank sees a problem of fewer heads: masks, rows of log-sum-exp, anchors and records are those of
the heads it was dealt. So a deal holds for as long as what was found of its heads does; when the
next one gives a head to another rank, the head's rows of log-sum-exp go along.
What a token's output is taken over from (`accel.stand_in`) needs no other token: it stays with the
rank that holds the token, of all heads, and heads that take over are neither dealt nor sent.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from accel.blocking import Blocking
from accel.choice import Choice
from accel.head_deal import LEAST, Heads, contiguous, deal, imbalance
from accel.head_exchange import Exchange, Pieces, cut, pieces_of, streams_of
from accel.layout import Layout
from accel.layouts import valid_keys
from accel.pattern import known_mask
from accel.ranks import Ranks
from accel.stand_in import stands_in

__all__ = ["Dealt", "HeadShares", "Mine", "Spread", "expected_keeps"]

UNKNOWN = 0.25  # what a selection is taken to keep before any was seen, where only the call tells


@dataclass(frozen=True, slots=True, eq=False)
class Spread:
    """One call of a site whose tokens are spread over ranks.

    tokens: of all of them; pieces: which each holds, None where the layouts do not explain it.
    """

    ranks: Ranks
    tokens: int
    pieces: Pieces | None

    @classmethod
    def of(
        cls,
        ranks: Ranks,
        x: Tensor,
        layouts: tuple[Layout, ...],
        by_streams: bool,
    ) -> "Spread":
        """x: what this rank has, `[batch, heads, held, dim]`; layouts: of the whole sequence, for
        all samples or for each; by_streams: text and video are split apart (`streams_of`).
        """
        sizes = ranks.sizes(x.shape[2], x.device)
        found = {
            pieces_of(streams_of(layout) if by_streams else (layout.length,), ranks.count)
            for layout in layouts
        }
        pieces = found.pop() if len(found) == 1 else None
        held = [sum(stop - start for start, stop in ranges) for ranges in pieces or ()]
        return cls(ranks, sum(sizes), pieces if tuple(held) == sizes else None)

    def whole(self, x: Tensor) -> Tensor:
        """Something of the shape, dtype and device that x has with all tokens; no more memory."""
        return x[:, :, :1].expand(-1, -1, self.tokens, -1)

    def explains(self, valid: Bool[Tensor, "batch held"], layouts: tuple[Layout, ...]) -> bool:
        """Whether the keys that every rank's attention mask leaves are those of the layouts."""
        assert self.pieces is not None
        expected = valid_keys(layouts, valid.device)
        here = cut(expected, self.pieces[self.ranks.rank], 1)
        return self.ranks.all(torch.equal(valid, here.expand_as(valid)), valid.device)

    def evenly(
        self, heads: int, attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        """The output of `attend` on whole sequences, of as many heads on every rank."""
        assert self.pieces is not None
        exchange = Exchange(self.ranks, contiguous(heads, self.ranks.count), self.pieces, q.device)
        mine, out = exchange.to_heads(q, k, v), torch.empty_like(q)
        exchange.to_tokens(attend(*mine) if exchange.own else mine[0], out)
        return out


@dataclass(frozen=True, slots=True, eq=False)
class Mine:
    """The heads of a site that this rank computes in a call.

    heads: their numbers; more: dense ones that follow on them, which have nothing to take over;
    online: whether any rank has heads that look at q and k; rows: who had the site's rows of
    log-sum-exp before, where that was another deal; dealt: the deal that holds now.
    """

    ranks: Ranks
    heads: tuple[int, ...]
    more: int
    online: bool
    dealt: Heads
    rows: Heads | None

    def moved(self, lse: dict[int, Tensor], like: Tensor) -> dict[int, Tensor]:
        """The rows of this rank's heads by now, out of those that all ranks had before.

        like: q of this call, `[batch, heads, tokens, dim]`. A collective call.
        """
        count = 1 + max(h for heads in self.dealt for h in heads)
        have = torch.zeros(count, dtype=torch.int64, device=like.device)
        rows = torch.zeros(
            (like.shape[0], count, like.shape[2]), dtype=torch.float32, device=like.device
        )
        for head, own in lse.items():
            have[head], rows[:, head] = 1, own[:, 0]
        had = self.ranks.total(have).tolist()
        if not any(had):
            return {}
        rows = self.ranks.total(rows)
        return {h: rows[:, h : h + 1].clone() for h in self.heads if had[h]}


@dataclass(frozen=True, slots=True)
class Dealt:
    """How the heads of one site in one phase are dealt, as a summary tells it.

    imbalance: load of the slowest rank over the mean, in blocks, as the masks turned out;
    neighbours: the same for shards of neighbouring heads.
    """

    rank: int
    ranks: int
    heads: tuple[int, ...]
    imbalance: float
    neighbours: float

    @classmethod
    def of(cls, ranks: Ranks, dealt: Heads, keeps: Sequence[float]) -> "Dealt":
        """keeps: of all heads of the site, 0 for those that were not dealt."""
        among = contiguous(len(keeps), ranks.count)
        own = dealt[ranks.rank]
        return cls(ranks.rank, ranks.count, own, imbalance(keeps, dealt), imbalance(keeps, among))


@dataclass(slots=True)
class HeadShares:
    """The deals of one run.

    deals: by what they were made for; rows: of a site and branch, the deal by which rows of
    log-sum-exp lie; weighed: sites and branches whose masks of a phase were looked at.
    """

    deals: dict[Any, Heads] = field(default_factory=dict)
    rows: dict[tuple[str, str], Heads] = field(default_factory=dict)
    weighed: set[Any] = field(default_factory=set)
    exchanges: dict[Any, Exchange] = field(default_factory=dict)

    def deal(self, key: Any, keeps: Callable[[], Sequence[float | None]], ranks: int) -> Heads:
        """The heads of every rank; keeps: of all heads, None for those that are not dealt."""
        if key not in self.deals:
            costs = keeps()
            heads = [h for h, cost in enumerate(costs) if cost is not None]
            dealt = deal([max(LEAST, costs[h]) for h in heads], ranks)
            self.deals[key] = tuple(tuple(heads[i] for i in own) for own in dealt)
        return self.deals[key]

    def exchange(self, spread: Spread, heads: Heads, device: torch.device) -> Exchange:
        """The exchange by which ranks get these heads."""
        assert spread.pieces is not None
        key = (heads, spread.pieces, device)
        if key not in self.exchanges:
            self.exchanges[key] = Exchange(spread.ranks, heads, spread.pieces, device)
        return self.exchanges[key]


def expected_keeps(
    choices: Sequence[Choice],
    layouts: Sequence[Layout],
    block: tuple[int, int],
    device: torch.device,
    patterns: dict[Any, Tensor],
    seen: Sequence[float] | None,
) -> list[float | None]:
    """The share of blocks that every head is expected to keep, None for those that take over.

    Of patterns it is counted; of selections it is what they ask for, or, where only the call can
    tell, what was seen of them last. layouts: without padding inside; patterns: block masks of
    patterns met before, read and kept.
    """
    known: dict[Choice, float | None] = {}
    for choice in dict.fromkeys(choices):
        if choice.online:
            known[choice] = getattr(choice.select, "keep", None)
            continue
        shares = []
        for layout in layouts:
            mask = known_mask(choice.select, Blocking(layout, choice.order, block), device, patterns)
            # whole numbers, so that ranks come to the same whatever their device
            shares.append(int(mask.sum()) / mask.numel())
        known[choice] = fmean(shares)
    keeps: list[float | None] = []
    for head, choice in enumerate(choices):
        keep = known[choice]
        if keep is None:
            keep = UNKNOWN if seen is None else seen[head]
        keeps.append(None if stands_in(choice) else keep)
    return keeps
