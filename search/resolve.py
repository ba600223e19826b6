"""From a genome to a plan: every head's choice by one price of time, and what the plan will cost.

The harm of a plan is the predicted mean squared error of its video: relative squared errors of the
sites, summed over heads and steps, each band with its measured weight (`accel.search.sensitivity`).
Harm and time both add up over heads, so for a price `lam` of time every head is decided alone,

    argmin over candidates of  weight * error + lam * time,

and one `lam` for the whole model spends one global budget (a Lagrangian; exact on the lower convex
hull of the trade-off). The levels of a genome are such prices, up to where the predicted quality
falls to a floor, spaced so that plans with one level everywhere have evenly spaced times: they are
the front that evolution begins with.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from accel.choice import DENSE, Choice
from accel.profile import Key, Profile
from accel.search.genome import Genes, Genome

BISECTIONS = 40


@dataclass(frozen=True, slots=True)
class Times:
    """What a head takes, as a part of a dense generation.

    head: seconds-share of one head of one site in one step; steps: of each band; price: of each
    candidate, as a ratio to a dense head; looks: price of a candidate's selections in each band;
    dense: price of a dense head by what computes it fastest; total_steps: of the run.
    """

    head: Mapping[str, float]
    steps: Sequence[int]
    price: Sequence[float]
    looks: Sequence[Sequence[float]]
    total_steps: int
    dense: float = 1.0

    def of(self, key: Key) -> Tensor:
        """[candidates + 1] times of one head over the band; the last entry is dense."""
        site, band = key
        price = torch.tensor([*self.price, self.dense], dtype=torch.float64)
        looks = torch.tensor([*self.looks[band], 0.0], dtype=torch.float64)
        return self.head[site] * (price * self.steps[band] + looks)


@dataclass(frozen=True, slots=True)
class Resolved:
    """A plan before it is one.

    time: predicted generation time as a fraction of the host's dense; harm: predicted mean squared
    error of the video; assignment: the candidate's number per site, band and head, -1 for dense.
    """

    time: float
    harm: float
    assignment: Mapping[Key, tuple[int, ...]]
    dense_start: float
    precision: Mapping[str, str]

    def choices(self, candidates: Sequence[Choice]) -> dict[str, tuple[tuple[Choice, ...], ...]]:
        """Site -> band -> head -> choice, as a plan holds it."""
        sites: dict[str, list[tuple[Choice, ...]]] = {}
        for (site, _), heads in sorted(self.assignment.items()):
            chosen = tuple(DENSE if i < 0 else candidates[i] for i in heads)
            sites.setdefault(site, []).append(chosen)
        return {site: tuple(bands) for site, bands in sites.items()}


class Resolver:
    """Resolves genomes by a profile.

    times: by dense start and precision. sensitivity: of each band, what a unit of error in one of
    its steps adds to the harm. floor: predicted quality in dB below which no level leads.
    """

    def __init__(
        self,
        genes: Genes,
        profile: Profile,
        times: Mapping[tuple[float, str], Times],
        sensitivity: Sequence[float],
        floor: int | float = 0,
    ) -> None:
        self.genes = genes
        self._profile = profile
        self._times = times
        self._sensitivity = sensitivity
        self._tables: dict[tuple[float, str, Key], tuple[Tensor, Tensor]] = {}
        self._group = {site: g for g, sites in enumerate(genes.groups) for site in sites}
        self._levels = self._spaced(10 ** (-floor / 10))

    @property
    def fastest_dense(self) -> float:
        """Time of the fastest dense generation, as a fraction of the host's dense."""
        return min(self.uniform(None, start, word).time for start, word in self._times)

    def resolve(self, genome: Genome) -> Resolved:
        """The plan that a genome stands for."""
        start = self.genes.dense_start(genome)
        words = [self.genes.precision(genome, g) for g in range(len(self.genes.groups))]
        lams = {
            (site, band): self._levels[self.genes.level(genome, band, group)]
            for site, group in self._group.items()
            for band in range(self.genes.bands)
        }
        return self._priced(start, {s: words[g] for s, g in self._group.items()}, lams)

    def uniform(self, lam: float | None, start: float, word: str) -> Resolved:
        """The plan with one price of time for all bands and layers; None leaves all dense."""
        keys = self._profile.errors
        return self._priced(start, dict.fromkeys(self._group, word), dict.fromkeys(keys, lam))

    def _priced(
        self, start: float, words: Mapping[str, str], lams: Mapping[Key, float | None]
    ) -> Resolved:
        """lams: price of time by site and band, None for dense."""
        assignment: dict[Key, tuple[int, ...]] = {}
        time = harm = 0.0
        for key in self._profile.errors:
            error, took = self._table(start, words[key[0]], key)
            dense, lam = len(error) - 1, lams[key]
            best = torch.full((error.shape[1],), dense)
            if lam is not None:
                best = (error + lam * took[:, None]).argmin(0)
            time += float((took[best] - took[-1]).sum())
            harm += float(error.gather(0, best[None]).sum())
            assignment[key] = tuple(-1 if i == dense else i for i in best.tolist())
        for site, word in words.items():
            times = self._times[start, word]
            in_site = times.head[site] * times.total_steps * len(assignment[site, 0])
            time -= in_site * (1 - times.dense)
        return Resolved(1 + time, harm, assignment, start, dict(words))

    def _table(self, start: float, word: str, key: Key) -> tuple[Tensor, Tensor]:
        """Harm [candidates + 1, heads] and time [candidates + 1] of a head; the last is dense."""
        if (start, word, key) not in self._tables:
            times = self._times[start, word]
            errors = self._profile.errors[key].double()
            error = torch.cat([errors, torch.zeros(1, errors.shape[1])])
            weight = times.steps[key[1]] * self._sensitivity[key[1]]
            self._tables[start, word, key] = weight * error, times.of(key)
        return self._tables[start, word, key]

    def _spaced(self, most_harm: float) -> list[float | None]:
        """A price of time for each level: None, then rising to where nothing is faster, or where
        the harm would be more.
        """
        start, word = self.genes.dense_starts[0], self.genes.precisions[0]

        def first(below: float, above: float, *, time: float = 0.0, harm: float = inf) -> float:
            """The lowest price whose plan takes at most `time`, or harms more than `harm`."""
            for _ in range(BISECTIONS):
                middle = (below * above) ** 0.5
                plan = self.uniform(middle, start, word)
                if plan.time <= time or plan.harm > harm:
                    above = middle
                else:
                    below = middle
            return above

        low, high = 1e-9 * max(self._sensitivity), 1e6 * max(self._sensitivity)
        if self.uniform(high, start, word).harm > most_harm:
            high = first(low, high, harm=most_harm) * 0.999
        slowest, fastest = (self.uniform(lam, start, word).time for lam in (low, high))
        steps = self.genes.levels - 1
        times = [slowest + (fastest - slowest) * level / steps for level in range(1, steps)]
        spaced = [first(low, high, time=t) for t in times]
        return [None, *spaced, high]
