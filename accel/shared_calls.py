"""Attention calls that several ranks make together, each with a part of the tokens.

Where a call is sparse the ranks exchange their tokens for heads: each gets the whole sequence of
the heads that it is dealt, does with them what a session does with all heads of a call that is its
own, and exchanges the outputs back. Where a call is dense it is left to the host, whose own
exchange it then is, unless the plan wants accel's kernel for it.

Ranks that do not come to the same conclusions hang. So whether a call is sparse follows from the
plan, the step and the shapes alone: what one rank measures, the times of its calls, decides
nothing.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from accel.choice import Choice
from accel.errors import AccelError
from accel.geometry import Site
from accel.head_deal import Heads, contiguous, deal
from accel.head_shares import Dealt, Mine, Spread, expected_keeps
from accel.layouts import parts_of
from accel.masks import SiteMask
from accel.plan import Plan
from accel.ranks import Ranks
from accel.records import Record, Stopwatch, phase_label
from accel.run_state import Run
from accel.stand_in import StandIns

__all__ = ["SharedCalls"]


class SharedCalls:
    """How a session makes its shared calls.

    by_streams: whether the ranks split text and images apart (`streams_of`).
    dealt: how the heads were dealt in this run, by site and phase.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.by_streams: Callable[[], bool] = lambda: True
        self.dealt: dict[tuple[str, str], Dealt] = {}
        # over runs: what selections kept of which only the call can tell
        self._seen: dict[tuple[str, tuple[Choice, ...]], list[float]] = {}

    def spread(self, site: Site, run: Run, ranks: Ranks, q: Tensor, k: Tensor) -> Spread | None:
        """Which rank has which tokens of a call; None where it is left to the host.

        Raises AccelError where heads share keys.
        """
        if q.shape[1] != k.shape[1]:
            raise AccelError(
                f"{site.name} has {q.shape[1]} query heads and {k.shape[1]} key heads; ranks can"
                " share the heads of a call only where each has its own keys"
            )
        choices = None
        if run.phase.band is not None:
            choices = self._plan.choices(site.name, run.phase.band)
        if self._plan.dense == "host" and (choices is None or all(c.dense for c in choices)):
            return None
        return Spread.of(ranks, q, run.here, self.by_streams())

    def dense(
        self, run: Run, attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        """A dense call by `attend`. Its heads cost alike: every rank has as many."""
        assert run.spread is not None
        heads = contiguous(q.shape[1], run.spread.ranks.count)
        exchange = run.shares.exchange(run.spread, heads, q.device)
        mine, out = exchange.to_heads(q, k, v), torch.empty_like(q)
        exchange.to_tokens(attend(*mine) if exchange.own else mine[0], out)
        return out

    def blocks(
        self,
        site: Site,
        run: Run,
        choices: tuple[Choice, ...],
        stand_ins: StandIns,
        record: Record,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        compute: Callable[..., tuple[Tensor, Stopwatch] | None],
    ) -> tuple[Tensor, Stopwatch]:
        """What kernels compute of a sparse call, for the tokens of this rank, and the watch that
        has begun with it.

        compute: does it for the heads that this rank is dealt, on whole sequences. Heads that
        something stands in for have whatever was in memory.
        """
        spread = run.spread
        assert spread is not None
        ranks = spread.ranks
        dealt, keeps = self._deal(site, run, ranks, choices, q.device)
        # heads with nothing to take over are dense in this call, and no mask knows them
        loads = [sum((keeps[h] or 0.0 for h in heads), 0.0) for heads in dealt]
        added = deal([1.0] * len(stand_ins.dense), ranks.count, loads)
        more = [tuple(stand_ins.dense[i] for i in heads) for heads in added]
        heads = tuple(own + extra for own, extra in zip(dealt, more, strict=True))
        exchange = run.shares.exchange(spread, heads, q.device)
        own, online = dealt[ranks.rank], any(c.online for c in choices)
        rows = run.shares.moves(site.name, run.branch, dealt) if online else None
        certain = not online and self._plan.recall_floor is None
        mine = Mine(ranks, own, len(more[ranks.rank]), online, certain, dealt, rows)
        if certain:
            label = phase_label(run.phase.band)
            self.dealt[site.name, label] = Dealt.of(ranks, dealt, [keep or 0.0 for keep in keeps])
        watch = Stopwatch(record, q.device, "exchange_seconds")
        whole = exchange.to_heads(q, k, v)
        watch.stop()
        found = compute(tuple(choices[h] for h in own), (), record, *whole, mine)
        assert found is not None
        result, watch = found
        out = torch.empty_like(q)
        exchange.to_tokens(result, out)
        return out, watch

    def _deal(
        self,
        site: Site,
        run: Run,
        ranks: Ranks,
        choices: tuple[Choice, ...],
        device: torch.device,
    ) -> tuple[Heads, list[float | None]]:
        """The heads of every rank, and what all heads are expected to keep. It holds for as long as
        masks do.
        """
        generation = run.phase.generation if any(c.online for c in choices) else None
        key = (site.name, choices, run.here, generation)
        if key not in run.shares.deals:
            layouts = [part.layout for part in parts_of(run.here, torch.device("cpu"))]
            seen = self._seen.get((site.name, choices))
            block, certain = self._plan.block, self._plan.recall_floor is None
            keeps = expected_keeps(choices, layouts, block, device, run.patterns, seen, certain)
            run.shares.add(key, keeps, ranks.count)
        return run.shares.deals[key]

    def weigh(
        self, site: Site, run: Run, mine: Mine, masks: list[SiteMask], device: torch.device
    ) -> None:
        """Look once at what the new masks of a site keep on all ranks, for the next deal."""
        assert run.phase.band is not None
        label = phase_label(run.phase.band)
        looked = (site.name, run.branch, label, run.phase.generation)
        if looked in run.shares.weighed:
            return
        run.shares.weighed.add(looked)
        choices = self._plan.choices(site.name, run.phase.band)
        assert choices is not None
        keeps = mine.weighed(len(choices), [found.mask for found in masks], device)
        self._seen[site.name, choices] = keeps
        self.dealt[site.name, label] = Dealt.of(mine.ranks, mine.dealt, keeps)
