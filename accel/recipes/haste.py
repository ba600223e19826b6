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
    add up to the least while the mean share of blocks computed in the calibration is at most
    `keep`: a multiple-choice knapsack. The head has it for the whole run, and what it keeps in
    another run follows from it. Masks are predicted anew only when queries and keys have moved by
    more than `drift` since the last time. 5 of 50 steps dense, as in the second version of the
    paper (arXiv 2605.14513); the first has none.

    keep: by default what the tau in the middle of the list would keep for all heads, so that only
    who keeps how much is decided. The paper bounds the mean as well, and does not tell its bound.

    What departs. Errors: of a head's part in its site's output, relative, on sampled rows at the
    first and last step of four intervals, all heads and candidates in one generation of each
    prompt; the paper runs the model for every head and candidate with that head alone sparse, at a
    random step of each interval, and weighs the frequency bands of the velocity's error. Drift: of
    block means and relative (`accel.drift`), where the paper's is of the mean of all tokens, with a
    bound that has a scale. And it is no head's own: the masks of a site, in a branch of guidance,
    are made anew together, once more than half of its heads have moved.
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
