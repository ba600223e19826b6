"""How much every candidate harms every head, measured in a few calibration generations.

In each band of the schedule every candidate selects its blocks at the band's first step, as it
would in a run, and its error is measured there and at the band's last step, where a selection that
looked at q and k is stale. The error of a candidate at one head is

    |(y' - y) W|^2 / |Y W|^2

with y the head's dense output, y' the candidate's, W the head's columns of the output projection
and Y the output of all heads: the share of the site's output that the candidate puts wrong. It is
taken on sampled query rows, so memory stays at `rows x tokens` per head.

The calibration is progressive (DiTFastAttnV2, arXiv 2503.22796): every layer goes on with the
output of a provisional choice, so later layers and steps see the error that has built up.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from accel.blocking import Blocking
from accel.choice import Choice
from accel.estimators import Estimator
from accel.geometry import Site
from accel.kernels.attention import sparse_attention
from accel.kernels.block_mask import BlockMask
from accel.kernels.pooling import TAYLOR_GROUP, block_slopes, pool_blocks
from accel.layout import Layout
from accel.masks import selectable
from accel.order import inverse
from accel.profile import Profile
from accel.router import Run
from accel.schedule import Schedule


def cheapest_harmless(errors: Tensor, prices: Sequence[float], tolerance: float) -> list[int]:
    """For every head the cheapest candidate that is harmless, else the least harmful one.

    errors: [candidates, heads]; harmless is an error of at most `tolerance / heads`, so that the
    errors of a site's heads add up to at most `tolerance`. prices: of each candidate.
    """
    price = torch.tensor(prices)[:, None].expand_as(errors)
    harmless = errors <= tolerance / errors.shape[1]
    best = torch.where(harmless, price, torch.inf).argmin(0)
    return torch.where(harmless.any(0), best, errors.argmin(0)).tolist()


class Calibrator:
    """Observes a dense run and fills a `Profile`.

    prices: of a head under each candidate; the provisional choice is that of `cheapest_harmless`.
    projections: the output projection of each site, [features, heads * dim].
    """

    def __init__(
        self,
        profile: Profile,
        schedule: Schedule,
        block: tuple[int, int],
        prices: Sequence[float],
        projections: dict[str, Tensor],
        *,
        precision: str = "full",
        rows: int = 128,
        tolerance: float = 0.02,
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        self.profile = profile
        self.schedule = schedule
        self.block = block
        self.prices = prices
        self.projections = projections
        self.precision = precision
        self.rows = rows
        self.tolerance = tolerance
        self.progress = progress
        self._masks: dict[tuple[str, int, str], list[Tensor]] = {}
        self._static: dict[tuple[Choice, Layout], Tensor] = {}
        self._chosen: dict[tuple[str, int, str], tuple[BlockMask, Tensor | None, list[str]]] = {}

    def begin(self) -> None:
        """Forget the masks of the generation before."""
        self._masks.clear()
        self._chosen.clear()

    def __call__(
        self, site: Site, run: Run, q: Tensor, k: Tensor, v: Tensor, out: Tensor
    ) -> Tensor:
        where, band = run.where, run.phase.band
        if band is None or where is None or run.layout is None:
            return out
        key = (site.name, band, where.branch)
        if key not in self._masks:
            self._masks[key] = self._select(run.layout, q, k, v)
            errors = self._errors(site, run.layout, key, q, k, v, out)
            self.profile.add((site.name, band), errors)
            self._choose(key, errors, run.layout, q)
            self.progress()
        elif self._last_step_of(band, where.step, where.total):
            errors = self._errors(site, run.layout, key, q, k, v, out)
            self.profile.add((site.name, band), errors)
            self.progress()
        mask, order, rests = self._chosen[key]
        return sparse_attention(q, k, v, mask, rest=rests, order=order, precision=self.precision)

    def _last_step_of(self, band: int, step: int, total: int) -> bool:
        return step + 1 == total or self.schedule.phase(step + 1, total).band != band

    def _select(self, layout: Layout, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        """Kept blocks of every candidate, bool [heads, q_blocks, kv_blocks]; first batch element.

        Candidates that differ in the rest alone select once, and all of them share one
        log-sum-exp.
        """
        q, k, v = selectable(self.precision, q, k, v)
        found: dict[tuple[Any, str], Tensor] = {}
        lse = None
        for choice in self.profile.candidates:
            if (choice.select, choice.order) in found:
                continue
            blocking = Blocking(layout, choice.order, self.block)
            if isinstance(choice.select, Estimator):
                selection = choice.select.select(q, k, v, blocking=blocking, lse=lse)
                lse = selection.lse if lse is None else lse
                keep = selection.keep[0]
            else:
                if (choice, layout) not in self._static:
                    self._static[choice, layout] = choice.select.mask(blocking, q.device)
                keep = self._static[choice, layout].expand(q.shape[1], -1, -1)
            found[choice.select, choice.order] = keep
        return [found[c.select, c.order] for c in self.profile.candidates]

    def _choose(self, key: tuple[str, int, str], errors: Tensor, layout: Layout, q: Tensor) -> None:
        """The provisional choice of every head, with which the run goes on."""
        best = cheapest_harmless(errors, self.prices, self.tolerance)
        chosen = [self.profile.candidates[i] for i in best]
        keep = torch.stack([self._masks[key][i][h] for h, i in enumerate(best)])
        tokens = layout.length
        natural = torch.arange(tokens, device=q.device)
        orders = [Blocking(layout, c.order, self.block).indices(q.device) for c in chosen]
        self._chosen[key] = (
            BlockMask.from_dense(keep, block=self.block, q_length=tokens, kv_length=tokens),
            torch.stack([natural if o is None else o for o in orders]),
            [c.rest for c in chosen],
        )

    def _errors(
        self,
        site: Site,
        layout: Layout,
        key: tuple[str, int, str],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
    ) -> Tensor:
        """[candidates, heads], on evenly spaced rows of the first batch element."""
        tokens, dim = q.shape[2:]
        q, k, v, out = (x[0].float() for x in (q, k, v, out))
        k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k, v))
        rows = torch.linspace(0, tokens - 1, min(self.rows, tokens), device=q.device).long()
        scores = (q[:, rows] * dim**-0.5) @ k.transpose(-1, -2)
        peak = scores.amax(-1, keepdim=True)
        weights = (scores - peak).exp()
        w = self.projections[site.name].float().to(q.device).unflatten(1, (site.heads, -1))
        whole = torch.einsum("hrd,fhd->rf", out[:, rows], w).square().sum()
        errors = []
        for choice, keep in zip(self.profile.candidates, self._masks[key], strict=True):
            order = Blocking(layout, choice.order, self.block).indices(q.device)
            place = torch.arange(tokens, device=q.device) if order is None else inverse(order)
            by_row = keep[:, place[rows] // self.block[0]]  # [heads, rows, kv_blocks]
            kept = weights * by_row[..., place // self.block[1]]
            total, mixed = kept.sum(-1, keepdim=True), kept @ v
            if choice.rest != "drop":
                turn: dict[str, Any] = {"block": self.block[1]}
                turn["order"] = None if order is None else order[None]
                k_mean, v_mean, log_n = (x[0] for x in pool_blocks(k[None], v[None], **turn))
                rest = (q[:, rows] * dim**-0.5) @ k_mean.transpose(-1, -2) + log_n[:, None]
                rest = (rest - peak).exp() * ~by_row
                total, mixed = total + rest.sum(-1, keepdim=True), mixed + rest @ v_mean
                if choice.rest == "taylor":
                    slopes = block_slopes(k[None], v[None], ~keep.all(1)[None], **turn)[0]
                    one = pad(rest / log_n.exp()[:, None], (0, -rest.shape[2] % TAYLOR_GROUP))
                    one = one.unflatten(2, (-1, TAYLOR_GROUP)).sum(3) * self.block[1]
                    turned = torch.einsum("hrd,hgde->hrge", q[:, rows] * dim**-0.5, slopes)
                    mixed = mixed + torch.einsum("hrg,hrge->hre", one, turned)
            wrong = mixed / total.clamp_min(1e-30) - out[:, rows]
            errors.append(torch.einsum("hrd,fhd->hrf", wrong, w).square().sum((1, 2)) / whole)
        return torch.stack(errors).cpu()
