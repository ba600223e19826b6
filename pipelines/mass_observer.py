"""How the softmax mass of every head is spread over blocks, measured while a model generates."""

from collections.abc import Callable

import torch
from torch import Tensor

from accel.blocking import Blocking
from accel.geometry import Site
from accel.kernels.block_mass import block_mass
from accel.pipelines.calibrator import observed_steps
from accel.profile import Profile
from accel.recipes import Demand
from accel.router import Run

__all__ = ["MassObserver"]


class MassObserver:
    """Observes a run under a dense plan and adds the block mass of every head to a `Profile`.

    At the steps at which candidates are measured (`observed_steps`). The mass is a share of its row
    of blocks, in the head's order of `profile.mass_orders`; it is streamed, so memory holds it once
    for each site and band, and of the first element of the batch.
    """

    def __init__(
        self,
        profile: Profile,
        demand: Demand,
        *,
        progress: Callable[[], object] = lambda: None,
    ) -> None:
        self.profile = profile
        self.demand = demand
        self.progress = progress
        self.begin()

    def begin(self) -> None:
        """Forget the generation before."""
        self._step: int | None = None

    def __call__(
        self, site: Site, run: Run, q: Tensor, k: Tensor, v: Tensor, out: Tensor
    ) -> Tensor:
        where, layout, band = run.where, run.layout, run.phase.band
        if where is None or layout is None:
            return out
        if where.step != self._step:
            self._step = where.step
            self.progress()
        if band is None or where.step not in observed_steps(self.demand.schedule, where.total):
            return out
        natural = torch.arange(layout.length, device=q.device)
        places = (
            Blocking(layout, order, self.demand.block).indices(q.device)
            for order in self.profile.mass_orders[site.name]
        )
        mass, _ = block_mass(
            q[:1],
            k[:1],
            block=self.demand.block,
            kv_length=layout.valid_length if layout.valid_length < layout.length else None,
            order=torch.stack([natural if p is None else p for p in places]),
        )
        share = mass[0] / mass[0].sum(-1, keepdim=True).clamp_min(1e-30)
        self.profile.add_mass((site.name, band), share)
        return out
