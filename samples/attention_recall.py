"""How much softmax mass the best quarter of the key blocks holds, per self-attention head.

For a head, an order of the tokens and 64x64 blocks: sum the exact softmax probabilities inside
every block, keep in each query-block row the largest quarter of the blocks, and average the kept
share over the rows. The recall of the head is the best over the six axis orders and one tile order.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from accel.blocking import Blocking
from accel.geometry import Site
from accel.kernels.block_mass import block_mass
from accel.layout import Layout
from accel.order import AXIS_ORDERS
from accel.pipelines.adapters import denoisers_of, geometry_of
from accel.pipelines.enable import enabled, session_of
from accel.pipelines.pricing import dense_plan
from accel.router import Run

__all__ = ["ORDERS", "Recalls", "best_block_recall", "measured_recall"]

ORDERS = (*AXIS_ORDERS, "tile(4,4,4)")


def best_block_recall(
    query: Tensor, key: Tensor, layout: Layout, *, keep: float = 0.25, block: int = 64
) -> Tensor:
    """Recall `[orders, heads]` from rotated queries and keys `[1, heads, tokens, dim]`."""
    found = []
    for order in ORDERS:
        indices = Blocking(layout, order, (block, block)).indices()
        mass = block_mass(query, key, block=(block, block), order=indices)[0][0]
        best = mass.topk(max(1, round(keep * mass.shape[-1])), -1).values.sum(-1)
        found.append((best / mass.sum(-1)).mean(-1))
    return torch.stack(found)


@dataclass(slots=True)
class Recalls:
    """What was measured while `record` was true: by site, one `[orders, heads]` for every call."""

    record: bool = True
    calls: dict[str, list[Tensor]] = field(default_factory=dict)

    def best(self) -> list[list[tuple[float, str]]]:
        """Per site and head: the mean over the calls, and the order that gives it."""
        means = [torch.stack(calls).mean(0) for calls in self.calls.values()]
        return [
            [(float(value), ORDERS[order]) for value, order in zip(*mean.max(0), strict=True)]
            for mean in means
        ]


@contextmanager
def measured_recall(target: Any) -> Iterator[Recalls]:
    """Within the context the dense attention calls of a pipeline or model are measured."""
    recalls = Recalls()

    def observe(site: Site, run: Run, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
        if recalls.record and run.layout is not None:
            found = best_block_recall(q[:1], k[:1], run.layout)
            recalls.calls.setdefault(site.name, []).append(found)
        return out

    denoiser = denoisers_of(target)[0]
    with enabled(target, dense_plan(geometry_of(denoiser)), check=False):
        session_of(denoiser).observer = observe
        yield recalls
