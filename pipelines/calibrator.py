"""How much every candidate harms every head, measured while a model generates.

In each band of the schedule, and after each refresh point in it, every candidate selects its blocks
at the first step, as it would in a run. What it harms is measured there and at the last step, where
a selection that looked at q and k is stale. It is measured on sampled query rows, so memory stays
at `rows x tokens` per head; what a profile has of it is told in `accel.profile`.

The calibration may be progressive (DiTFastAttnV2, arXiv 2503.22796): every layer goes on with the
output of a provisional choice, so later layers and steps see the error that has built up.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from accel.candidate_rows import RowBlocks
from accel.choice import DENSE, Choice
from accel.geometry import Site
from accel.heads import of_heads
from accel.kernels.attention import sparse_attention
from accel.layout import Layout
from accel.masks import SiteMask, site_mask
from accel.pattern import Identity, Share
from accel.pipelines.candidate_measures import Measures
from accel.profile import Profile
from accel.recipes import Demand
from accel.router import Run
from accel.schedule import Schedule

__all__ = ["Branches", "Calibrator", "cheapest_harmless", "observed_steps"]

Branches = Literal["all", "first"]


def cheapest_harmless(
    errors: Tensor, prices: Sequence[float] | Tensor, tolerance: float
) -> list[int]:
    """For every head the cheapest candidate that is harmless, else the least harmful one.

    errors: [candidates, heads]; harmless is an error of at most `tolerance / heads`, so that the
    errors of a site's heads add up to at most `tolerance`. prices: of each candidate, the same for
    all heads or [candidates, heads].
    """
    price = torch.as_tensor(prices)
    price = (price if price.dim() == 2 else price[:, None]).expand_as(errors)
    harmless = errors <= tolerance / errors.shape[1]
    best = torch.where(harmless, price, torch.inf).argmin(0)
    return torch.where(harmless.any(0), best, errors.argmin(0)).tolist()


def observed_steps(schedule: Schedule, total: int) -> set[int]:
    """The first and the last step between points of selection; dense steps are none of them."""
    phases = [None, *(schedule.phase(step, total) for step in range(total)), None]
    return {
        step - 1
        for step in range(1, total + 1)
        if (phase := phases[step]) is not None
        and not phase.dense
        and not phases[step - 1] == phase == phases[step + 1]
    }


@dataclass(slots=True)
class _Held:
    """What a site keeps of one branch from one selection (band, generation) to the next."""

    since: tuple[int, int]
    rows: list[RowBlocks]
    chosen: tuple[Choice, ...]
    mask: SiteMask | None = None


class Calibrator:
    """Observes a run under a dense plan and fills a `Profile`.

    projections, rows: see `Measures`. prices: of a head under each candidate, for provisional
    choices; what it keeps, by default. branches: of guidance whose errors count; with `first` the
    others go on with what was chosen there. progress: called once for each step of the run.
    """

    def __init__(
        self,
        profile: Profile,
        demand: Demand,
        projections: Mapping[str, Tensor],
        *,
        rows: int = 128,
        prices: Sequence[float] | None = None,
        branches: Branches = "all",
        progress: Callable[[], object] = lambda: None,
    ) -> None:
        self.profile = profile
        self.demand = demand
        self.prices = prices
        self.branches = branches
        self.progress = progress
        self._measures = Measures(demand, projections, rows)
        self._shares = {c.select.of for c in demand.candidates if isinstance(c.select, Share)}
        self.begin()

    def begin(self) -> None:
        """Forget the generation before."""
        self._step: int | None = None
        self._first: str | None = None
        self._held: dict[tuple[str, str], _Held] = {}
        self._before: dict[tuple[str, str], Tensor] = {}  # output of the step before the band
        self._beside: dict[str, tuple[int, Tensor]] = {}  # step and output of its first branch

    def __call__(
        self, site: Site, run: Run, q: Tensor, k: Tensor, v: Tensor, out: Tensor
    ) -> Tensor:
        where, layout, band = run.where, run.layout, run.phase.band
        if where is None or layout is None:
            return out
        if where.step != self._step:
            self._step = where.step
            self.progress()
        self._first = where.branch if self._first is None else self._first
        # where sites see different tokens, the plan is made for those with the most
        known = self.profile.layout
        self.profile.layout = layout if known is None else max(known, layout, key=_tokens)
        key = (site.name, run.branch)
        result = out
        if band is not None:
            result = self._in_band((band, run.phase.generation), site, run, q, k, v, out)
        if "step" in self._shares:
            following = self._band(where.step + 1, where.total)
            if following not in (None, band) or (band is not None and key not in self._before):
                self._before[key] = result
        if "branch" in self._shares and where.branch == self._first:
            self._beside[site.name] = where.step, result
        return result

    def _band(self, step: int, total: int) -> int | None:
        return self.demand.schedule.phase(step, total).band if step < total else None

    def _in_band(
        self,
        since: tuple[int, int],
        site: Site,
        run: Run,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
    ) -> Tensor:
        """Measure where it is time; the output with which the run goes on."""
        where, layout = run.where, run.layout
        assert where is not None
        assert layout is not None
        key, leads = (site.name, run.branch), where.branch == self._first
        counts = leads or self.branches == "all"
        held = self._held.get(key)
        begins = held is None or held.since != since
        if held is None or begins:
            rows = self._measures.select(layout, q, k, v) if counts else []
            leader = self._held.get((site.name, self._first or ""))
            chosen = (DENSE,) * site.heads if leader is None else leader.chosen
            held = self._held[key] = _Held(since, rows, chosen)
        step, beside = self._beside.get(site.name, (None, None))
        shared = {
            "step": self._before.get(key),
            "branch": beside if step == where.step and not leads else None,
        }
        if counts and (begins or where.step in observed_steps(self.demand.schedule, where.total)):
            tables = self._measures.of_maps(site, layout, q, k, v)
            if self.demand.candidates:
                tables |= self._measures.of_candidates(site, layout, held.rows, shared, q, k, v)
            self.profile.add((site.name, since[0]), **tables)
            if begins:
                held.chosen = self._choose(site, tables)
        if all(c.dense for c in held.chosen):
            return out
        if held.mask is None:
            held.mask = site_mask(
                held.chosen,
                q,
                k,
                v,
                layout=layout,
                block=self.demand.block,
                lse={},
                patterns=self._measures.patterns,
                precision=self.demand.precision,
            )
        result = sparse_attention(
            q,
            k,
            v,
            held.mask.mask,
            rest=held.mask.rest,
            order=held.mask.order,
            kv_length=held.mask.kv_length,
            precision=self.demand.precision,
        )
        for h, choice in enumerate(held.chosen):
            if isinstance(choice.select, Identity):
                result[:, h] = of_heads(v, [h], q.shape[1])[:, 0]
            elif isinstance(choice.select, Share):
                source = shared[choice.select.of]
                result[:, h] = (out if source is None else source)[:, h]
        return result

    def _choose(self, site: Site, tables: Mapping[str, Tensor]) -> tuple[Choice, ...]:
        """The provisional choice of every head; dense where no candidate is harmless."""
        tolerance = self.demand.tolerance
        if not tolerance or "errors" not in tables:
            return (DENSE,) * site.heads
        errors = tables["errors"].cpu()
        prices = tables["keeps"].cpu() if self.prices is None else self.prices
        best = cheapest_harmless(errors, prices, tolerance)
        return tuple(
            self.demand.candidates[i] if errors[i, h] <= tolerance / site.heads else DENSE
            for h, i in enumerate(best)
        )


def _tokens(layout: Layout) -> int:
    return layout.length
