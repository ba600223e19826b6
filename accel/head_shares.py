"""How the ranks of a call share its heads: who has which tokens, who computes which heads.

A rank sees a problem of fewer heads: masks, rows of log-sum-exp, anchors and records are those of
the heads it was dealt. So a deal holds for as long as what was found of its heads does; when the
next one gives a head to another rank, the head's rows of log-sum-exp go along.
What a token's output is taken over from (`accel.stand_in`) needs no other token: it stays with the
rank that holds the token, of all heads, and heads that take over are neither dealt nor sent.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from accel.blocking import Blocking
from accel.choice import Choice
from accel.estimators import Estimator
from accel.head_deal import LEAST, Heads, contiguous, deal, imbalance
from accel.head_exchange import Exchange, Pieces, pieces_of, streams_of
from accel.kernels.block_mask import BlockMask
from accel.layout import Layout
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

    def gathered(self, valid: Bool[Tensor, "batch held"]) -> Bool[Tensor, "batch some"]:
        """The keys that the attention masks of all ranks leave, in their natural order; where the
        layouts do not explain what ranks hold, `valid` itself.
        """
        if self.pieces is None:
            return valid
        every = torch.zeros(len(valid), self.tokens, dtype=torch.int32, device=valid.device)
        first = 0
        for start, stop in self.pieces[self.ranks.rank]:
            every[:, start:stop] = valid[:, first : first + stop - start]
            first += stop - start
        return self.ranks.total(every).bool()

    def obstacle(self, layouts: tuple[Layout, ...]) -> str | None:
        """Why ranks cannot share the call, where the layouts have all of its tokens."""
        fit = all(layout.length == self.tokens for layout in layouts)
        if not fit or self.pieces is not None:
            return None
        return (
            f"the ranks hold the {self.tokens} tokens of the call otherwise than in equal parts of"
            " its text and of its images"
        )


@dataclass(frozen=True, slots=True, eq=False)
class Mine:
    """The heads of a site that this rank computes in a call.

    heads: their numbers; more: dense ones that follow on them, which have nothing to take over;
    online: whether any rank has heads that look at q and k; certain: whether it was known before
    what all heads keep; rows: who had the site's rows of
    log-sum-exp before, where that was another deal; dealt: the deal that holds now.
    """

    ranks: Ranks
    heads: tuple[int, ...]
    more: int
    online: bool
    certain: bool
    dealt: Heads
    rows: Heads | None

    def moved(self, lse: dict[int, Tensor], like: Tensor) -> dict[int, Tensor]:
        """The rows of this rank's heads by now, out of those that all ranks had before.

        like: q of this call, `[batch, heads, tokens, dim]`. A collective call.
        """
        assert self.rows is not None
        count = 1 + max((h for heads in (*self.dealt, *self.rows) for h in heads), default=0)
        have = torch.zeros(count, dtype=torch.int64, device=like.device)
        rows = like.new_zeros((like.shape[0], count, like.shape[2]), dtype=torch.float32)
        for head, own in lse.items():
            have[head], rows[:, head] = 1, own[:, 0]
        had = self.ranks.total(have).tolist()
        if not any(had):
            return {}
        rows = self.ranks.total(rows)
        # those of heads that nobody has for now stay where they are
        stay = set(lse).difference(*self.dealt)
        here = sorted({*stay, *(h for h in self.heads if had[h])})
        return {h: rows[:, h : h + 1].clone() for h in here}

    def weighed(self, count: int, masks: Sequence[BlockMask], device: torch.device) -> list[float]:
        """What the masks of a call keep of all `count` heads of the site, in the mean over its
        parts; 0 for those that were not dealt. A collective call.
        """
        keeps = torch.zeros(count, device=device)
        for mask in masks if self.heads else ():
            own = mask.keep_per_head()[: len(self.heads)] / len(masks)
            keeps[list(self.heads)] += own
        return self.ranks.total(keeps).tolist()


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

    deals: by what they were made for, with what heads were expected to keep; rows: of a site and
    branch, the deal by which rows of log-sum-exp lie; weighed: masks that were looked at;
    exchanges: by the heads and the tokens that ranks have.
    """

    deals: dict[Any, tuple[Heads, list[float | None]]] = field(default_factory=dict)
    rows: dict[tuple[str, str], Heads] = field(default_factory=dict)
    weighed: set[Any] = field(default_factory=set)
    exchanges: dict[Any, Exchange] = field(default_factory=dict)

    def add(self, key: Any, keeps: list[float | None], ranks: int) -> None:
        """Deal the heads; keeps: of all of them, None for those that are not dealt."""
        heads = [h for h, keep in enumerate(keeps) if keep is not None]
        dealt = deal([max(LEAST, keeps[h] or 0.0) for h in heads], ranks)
        self.deals[key] = tuple(tuple(heads[i] for i in own) for own in dealt), keeps

    def moves(self, site: str, branch: str, dealt: Heads) -> Heads | None:
        """The deal by which the rows of a site and branch lie, where it was another one."""
        before = self.rows.get((site, branch))
        self.rows[site, branch] = dealt
        return None if before == dealt else before

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
    certain: bool,
) -> list[float | None]:
    """The share of blocks that every head is expected to keep, None for those that take over.

    Of patterns it is counted; of selections it is what they ask for. Where only the call can tell
    it is what was `seen` of them last, and of every head where heads may be dense for their recall,
    which is not `certain`. What heads select together (AdaSpa) would change with the deal, and is
    expected to be the same always.
    layouts: without padding inside; patterns: block masks of patterns met before, read and kept.
    """
    known: dict[Choice, float | None] = {}
    for choice in dict.fromkeys(choices):
        if isinstance(choice.select, Estimator):
            known[choice] = getattr(choice.select, "keep", None)
            continue
        shares = []
        for layout in layouts:
            blocking = Blocking(layout, choice.order, block)
            mask = known_mask(choice.select, blocking, device, patterns)
            # whole numbers, so that ranks come to the same whatever their device
            shares.append(int(mask.sum()) / mask.numel())
        known[choice] = fmean(shares)
    keeps: list[float | None] = []
    for head, choice in enumerate(choices):
        keep = known[choice]
        apart = choice.select.by_head if isinstance(choice.select, Estimator) else True
        if seen is not None and apart and (keep is None or not certain):
            keep = seen[head]
        keeps.append(None if stands_in(choice) else UNKNOWN if keep is None else keep)
    return keeps
