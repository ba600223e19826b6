"""HASTE (arXiv 2605.14513)."""

import torch

from accel.choice import Choice
from accel.estimators import Antidiagonal
from accel.geometry import Geometry
from accel.knapsack import multiple_choice
from accel.plan import Plan
from accel.profile import Profile
from accel.recipes.choosing import even_bands
from accel.recipes.registry import Demand, published
from accel.schedule import Schedule

INTERVALS = 4  # of the run, in which errors are measured


def _demand(
    _: Geometry, taus: tuple[float, ...], stride: int, dense_start: float, block: tuple[int, int]
) -> Demand:
    return Demand(
        candidates=tuple(Choice(Antidiagonal(tau=tau, stride=stride)) for tau in taus),
        schedule=Schedule(dense_start=dense_start, bands=even_bands(INTERVALS, dense_start)),
        block=block,
    )


@published(demand=_demand)
def haste(
    geometry: Geometry,
    profile: Profile,
    *,
    keep: float | None = None,
    taus: tuple[float, ...] = (0.85, 0.9, 0.95),
    stride: int = 8,
    drift: float = 0.2,
    dense_start: float = 0.1,
    block: tuple[int, int] = (128, 64),
) -> Plan:
    """HASTE: XAttention with a threshold per head under one global budget, masks reused by drift.

    Each head of the model gets the tau, of 0.85, 0.90 and 0.95, with which the errors of all heads
    add up to the least while the mean share of blocks computed is at most `keep`: a multiple-choice
    knapsack. A mask is predicted anew only when the head's queries and keys have moved by more than
    `drift` since the last time. 5 of 50 steps dense (arXiv 2605.14513).

    keep: by default what the tau in the middle of the list would keep for all heads, so that only
    who keeps how much is decided. The paper does not tell its own.

    What departs: the error of a head is that of its site's output, measured in four intervals of
    one generation, where the paper runs the model once for every head and candidate and weighs the
    frequency bands of the velocity's error; and drift is relative (`accel.drift`), where the
    paper's has a scale.
    """
    keys = [(site.name, band) for site in geometry.sites for band in profile.bands(site.name)]
    by_site = {site.name: [key for key in keys if key[0] == site.name] for site in geometry.sites}
    errors, keeps = (
        torch.cat([torch.stack([of[key] for key in own]).mean(0).T for own in by_site.values()])
        for of in (profile.errors, profile.keeps)
    )
    budget = float(keeps[:, len(taus) // 2].mean()) if keep is None else keep
    taken = iter(multiple_choice(-errors, keeps, budget * len(keeps)))
    sites = {
        site.name: (tuple(profile.candidates[next(taken)] for _ in range(site.heads)),)
        for site in geometry.sites
    }
    return Plan.of(
        "haste",
        geometry,
        sites,
        schedule=Schedule(dense_start=dense_start, drift=drift),
        block=block,
        provenance={"recipe": "haste", "keep": budget, "taus": list(taus), "stride": stride},
    )
