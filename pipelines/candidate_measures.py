"""What is measured of every candidate in one attention call: the tables of a `Profile`."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from accel.blocking import Blocking
from accel.candidate_rows import RowBlocks, candidate_outputs
from accel.choice import Alternatives
from accel.errors import PlanError
from accel.estimators import Estimator
from accel.geometry import Site
from accel.kernels.attention import sparse_attention
from accel.kernels.block_mask import BlockMask
from accel.layout import Layout
from accel.map_statistics import map_statistics
from accel.masks import selectable
from accel.order import inverse
from accel.pattern import Identity, Share, known_mask
from accel.recipes import Demand
from accel.sampled import SampledRows, evenly_spaced

__all__ = ["Measures"]


class Measures:
    """Measures what a demand asks for, of the first element of a call's batch.

    projections: the output projection of each site, [features, heads * dim]. rows: query rows that
    are looked at, evenly spaced.
    """

    def __init__(self, demand: Demand, projections: Mapping[str, Tensor], rows: int) -> None:
        self.demand = demand
        self.rows = rows
        self.patterns: dict[Any, Tensor] = {}  # see `known_mask`
        self._projections = projections
        self._grams: dict[str, Tensor] = {}
        for choice in demand.candidates:
            if isinstance(choice.select, Alternatives):
                raise PlanError(
                    f"{choice.name} chooses among candidates itself; give its options instead"
                )

    def select(self, layout: Layout, q: Tensor, k: Tensor, v: Tensor) -> list[RowBlocks]:
        """The blocks of every candidate, as far as the sampled rows need them.

        Candidates that differ in the rest alone select once, those that differ in the share weigh
        once, and all of them share one log-sum-exp.
        """
        q, k, v = selectable(self.demand.precision, q[:1], k[:1], v[:1])
        rows = evenly_spaced(self.rows, layout.valid_length, q.device)
        found: dict[object, RowBlocks] = {}
        scores: dict[str, dict[str, Any]] = {}
        lse = None
        for choice in self.demand.candidates:
            if (choice.select, choice.order) in found:
                continue
            blocking = Blocking(layout, choice.order, self.demand.block)
            if isinstance(choice.select, Estimator):
                selection = choice.select.select(
                    q,
                    k,
                    v,
                    blocking=blocking,
                    lse=lse,
                    patterns=self.patterns,
                    scores=scores.setdefault(choice.order, {}),
                )
                lse = selection.lse if lse is None else lse
                keep = selection.keep[0]
            else:
                keep = known_mask(choice.select, blocking, q.device, self.patterns)
                keep = keep.expand(q.shape[1], -1, -1)
            order = blocking.indices(q.device)
            place = rows if order is None else inverse(order)[rows]
            found[choice.select, choice.order] = RowBlocks.of(keep, place // self.demand.block[0])
        return [found[c.select, c.order] for c in self.demand.candidates]

    def of_candidates(
        self,
        site: Site,
        layout: Layout,
        masks: list[RowBlocks],
        shared: Mapping[str, Tensor | None],
        q: Tensor,
        k: Tensor,
        v: Tensor,
    ) -> dict[str, Tensor]:
        """errors, head_errors, recalls and keeps: [candidates, heads].

        masks: of every candidate. shared: what `Share` takes over, by what it is of; where there is
        nothing the head is dense.
        """
        some = SampledRows.of(q[:1], k[:1], v[:1], layout=layout, rows=self.rows)
        exact, candidates = some.exact[0], self.demand.candidates
        outputs = exact.new_empty(len(candidates), *exact.shape)
        recalls = exact.new_zeros(outputs.shape[:2])
        keeps = torch.stack([m.keep for m in masks])
        by_order: dict[str, list[int]] = {}
        for i, choice in enumerate(candidates):
            if isinstance(choice.select, Identity):
                outputs[i] = some.values[0]
            elif isinstance(choice.select, Share):
                source = shared[choice.select.of]
                keeps[i] = recalls[i] = 0.0 if source is not None else 1.0
                outputs[i] = exact if source is None else source[0][:, some.rows].float()
            else:
                by_order.setdefault(choice.order, []).append(i)
        for order, group in by_order.items():
            outputs[group], recalls[group] = candidate_outputs(
                some,
                Blocking(layout, order, self.demand.block),
                [masks[i] for i in group],
                [candidates[i].rest for i in group],
            )
        wrong = outputs.sub_(exact)
        spread = (exact - exact.mean(1, keepdim=True)).square().sum((1, 2)).clamp_min(1e-30)
        return {
            "errors": self._through_projection(site, wrong, exact),
            "head_errors": wrong.square().sum((2, 3)) / spread,
            "recalls": recalls,
            "keeps": keeps,
        }

    def of_maps(
        self, site: Site, layout: Layout, q: Tensor, k: Tensor, v: Tensor
    ) -> dict[str, Tensor]:
        """sparsities and incoherences: [orders, heads]; roundings: [precisions, heads]."""
        demand, tables = self.demand, {}
        q, k, v = q[:1], k[:1], v[:1]
        if demand.orders:
            found = [
                map_statistics(q, k, Blocking(layout, order, demand.block), self.rows)
                for order in demand.orders
            ]
            tables["sparsities"] = torch.stack([sparsity for sparsity, _ in found])
            tables["incoherences"] = torch.stack([spread for _, spread in found])
        if demand.precisions:
            some = SampledRows.of(q, k, v, layout=layout, rows=self.rows)
            mask = BlockMask.full(
                q.shape[1],
                block=demand.block,
                q_length=len(some.rows),
                kv_length=layout.length,
                device=q.device,
            )
            length = layout.valid_length if layout.valid_length < layout.length else None
            rounded = [
                sparse_attention(q[:, :, some.rows], k, v, mask, kv_length=length, precision=word)
                for word in demand.precisions
            ]
            wrong = torch.cat(rounded).float() - some.exact[0]
            tables["roundings"] = self._through_projection(site, wrong, some.exact[0])
        return tables

    def _through_projection(self, site: Site, wrong: Tensor, exact: Tensor) -> Tensor:
        """`|wrong W|^2 / |Y W|^2`: wrong [n, heads, rows, dim], exact [heads, rows, dim]."""
        w = self._projections[site.name].float().to(exact.device)
        if site.name not in self._grams:
            by_head = w.unflatten(1, (site.heads, -1)).transpose(0, 1)
            self._grams[site.name] = by_head.mT @ by_head  # [heads, dim, dim]
        whole = (exact.transpose(0, 1).flatten(1) @ w.T).square().sum().clamp_min(1e-30)
        return ((wrong @ self._grams[site.name]) * wrong).sum((2, 3)) / whole
