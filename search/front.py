"""The trade-off: least harm for a given time, over all sites, bands and heads at once.

The harm of a plan is the predicted mean squared error of its video: relative squared errors of the
sites, summed over heads and steps, each band with its measured weight (`accel.search.sensitivity`).
Harm and time both add up over heads, so for a price `lam` of time every head is decided alone,

    argmin over candidates of  weight * error + lam * time,

and one `lam` for the whole model spends one global budget (a Lagrangian; exact on the lower convex
hull of the trade-off). Sweeping `lam` gives the front.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from accel.choice import DENSE, Choice
from accel.profile import Key, Profile


@dataclass(frozen=True, slots=True)
class Point:
    """One plan of the front, before it is one.

    time: predicted generation time as a fraction of dense; harm: predicted mean squared error of
    the video; assignment: number of the candidate per site and band and head, -1 for dense.
    """

    time: float
    harm: float
    assignment: Mapping[Key, tuple[int, ...]]

    def choices(self, candidates: Sequence[Choice]) -> dict[str, tuple[tuple[Choice, ...], ...]]:
        """Site -> band -> head -> choice, as a plan holds it."""
        sites: dict[str, list[tuple[Choice, ...]]] = {}
        for (site, _), heads in sorted(self.assignment.items()):
            chosen = tuple(DENSE if i < 0 else candidates[i] for i in heads)
            sites.setdefault(site, []).append(chosen)
        return {site: tuple(bands) for site, bands in sites.items()}


@dataclass(frozen=True, slots=True)
class Times:
    """What a head takes, as a part of a dense generation.

    head: seconds-share of one head of one site in one step; steps: of each band; price: of each
    candidate, as a ratio to a dense head; looks: price of a candidate's selection; dense: price of
    a dense head by what computes it fastest; share: part of a generation in the sites.
    """

    head: Mapping[str, float]
    steps: Sequence[int]
    price: Sequence[float]
    looks: Sequence[float]
    dense: float = 1.0
    share: float = 0.0

    @property
    def fastest_dense(self) -> float:
        """A dense generation by what computes it fastest, as a part of the host's own."""
        return 1 - self.share * (1 - self.dense)

    def of(self, key: Key) -> Tensor:
        """[candidates + 1] times of one head over the band; the last entry is dense."""
        site, band = key
        n = self.steps[band]
        price = torch.tensor([*self.price, self.dense], dtype=torch.float64)
        looks = torch.tensor([*self.looks, 0.0], dtype=torch.float64)
        return self.head[site] * (price * n + looks)


def front(
    profile: Profile, times: Times, sensitivity: Sequence[float], *, points: int = 200
) -> list[Point]:
    """The plans on the lower convex hull, from dense to the fastest, by falling time.

    sensitivity: of each band, what a unit of error in one of its steps adds to the harm.
    """
    found: dict[tuple[tuple[int, ...], ...], Point] = {}
    # prices of time for which anything changes: from far below to far above error per time
    spans = torch.logspace(-6, 4, points, dtype=torch.float64) * max(sensitivity)
    for lam in [0.0, *spans.tolist()]:
        assignment: dict[Key, tuple[int, ...]] = {}
        saved, harm = 1 - times.fastest_dense, 0.0
        for key, errors in profile.errors.items():
            time = times.of(key)
            error = torch.cat([errors.double(), torch.zeros(1, errors.shape[1])])
            weight = times.steps[key[1]] * sensitivity[key[1]]
            best = (weight * error + lam * time[:, None]).argmin(0)
            saved += float((time[-1] - time[best]).sum())
            harm += float(weight * error.gather(0, best[None]).sum())
            dense = len(profile.candidates)
            assignment[key] = tuple(-1 if i == dense else i for i in best.tolist())
        point = Point(1 - saved, harm, assignment)
        found.setdefault(tuple(assignment.values()), point)
    kept: list[Point] = []
    for point in sorted(found.values(), key=lambda p: (-p.time, p.harm)):
        while kept and kept[-1].harm >= point.harm:
            kept.pop()
        kept.append(point)
    return kept


def within(points: Sequence[Point], budget: float) -> Point:
    """The least harmful point whose time is at most `budget`; the fastest when none is."""
    allowed = [p for p in points if p.time <= budget]
    return min(allowed, key=lambda p: p.harm) if allowed else min(points, key=lambda p: p.time)
