"""From genomes to plans: heads resolved by one price of time, times that add up, levels."""

from itertools import pairwise
from math import log10

import pytest
import torch

from accel.choice import DENSE, Choice
from accel.estimators import BlockMassTopK
from accel.pattern import Window
from accel.profile import Profile
from accel.search.genome import Genes
from accel.search.resolve import Resolver, Times

CANDIDATES = (
    Choice(Window(t=1)),
    Choice(BlockMassTopK(0.2), order="hwt"),
    Choice(BlockMassTopK(0.5), rest="mean"),
)
SITES = {"a": 2, "b": 3}
BANDS = 2


def times(start: float = 0.2, dense: float = 1.0) -> Times:
    """Ten steps; a quarter of a dense generation is in site a, half of it in b."""
    return Times(
        head={"a": 0.25 / 10 / 2, "b": 0.5 / 10 / 3},
        steps=[round((0.5 - start) * 10), 5],
        price=(0.1, 0.3, 0.6),
        looks=((0.0, 0.2, 0.2), (0.0, 0.1, 0.1)),
        total_steps=10,
        dense=dense,
    )


def profile() -> Profile:
    found = Profile(CANDIDATES)
    generator = torch.Generator().manual_seed(3)
    for site, heads in SITES.items():
        for band in range(BANDS):
            worst = torch.rand(1, heads, generator=generator) * 0.1
            errors = worst * torch.tensor([1.0, 0.3, 0.1])[:, None]
            found.add((site, band), errors)
    return found


def resolver(
    levels=9, starts=(0.2, 0.4), dense=(1.0,), sensitivity=(2.0, 0.5), floor=-20
) -> Resolver:
    words = ("half", "full")[: len(dense)]
    genes = Genes.of(list(SITES), BANDS, levels=levels, dense_starts=starts, precisions=words)
    tables = {(s, w): times(s, d) for s in starts for w, d in zip(words, dense, strict=True)}
    return Resolver(genes, profile(), tables, sensitivity, floor)


def test_level_zero_is_dense_and_harms_nothing():
    found = resolver()
    point = found.resolve(found.genes.uniform(0))
    assert point.time == pytest.approx(1.0)
    assert point.harm == 0
    assert point.choices(CANDIDATES) == {
        "a": ((DENSE,) * 2,) * 2,
        "b": ((DENSE,) * 3,) * 2,
    }


def test_the_highest_level_takes_the_fastest_candidate_everywhere():
    found = resolver()
    point = found.resolve(found.genes.uniform(8))
    assert set(point.choices(CANDIDATES)["b"][1]) == {CANDIDATES[0]}
    # 3 + 5 sparse steps at a tenth of the price of a dense head, 2 dense ones
    assert point.time == pytest.approx(0.25 + 0.75 * (2 + 8 * 0.1) / 10)
    errors = found._profile.errors
    wanted = sum(
        float(errors[site, band][0].sum()) * (2.0 * 3, 0.5 * 5)[band]
        for site in SITES
        for band in range(BANDS)
    )
    assert point.harm == pytest.approx(wanted)


def test_levels_are_spaced_evenly_in_time_and_pay_for_it():
    found = resolver()
    points = [found.resolve(found.genes.uniform(level)) for level in range(9)]
    assert all(a.time >= b.time for a, b in pairwise(points))
    assert all(a.harm <= b.harm for a, b in pairwise(points))
    for level, point in enumerate(points[1:8], start=1):
        wanted = points[0].time + (points[8].time - points[0].time) * level / 8
        assert point.time <= wanted + 1e-9


def test_every_head_is_best_at_its_price():
    """No single head can be moved without a loss at the price of its level."""
    found = resolver()
    lam = found._levels[4]
    assert lam is not None
    best = found.uniform(lam, 0.2, "half")
    for key, heads in best.assignment.items():
        error, took = found._table(0.2, "half", key)
        for head, choice in enumerate(heads):
            value = error[:, head] + lam * took
            assert value[choice] == pytest.approx(float(value.min()))


def test_a_gene_moves_its_own_band_and_layers_alone():
    found = resolver()
    genes = found.genes
    before = found.resolve(genes.uniform(0))
    genome = list(genes.uniform(0))
    genome[1 * len(genes.groups) + 0] = 8  # band 1, site a
    after = found.resolve(tuple(genome))
    changed = {k for k in after.assignment if after.assignment[k] != before.assignment[k]}
    assert changed == {("a", 1)}
    assert after.time == pytest.approx(1 - 0.25 * 5 / 10 * 0.9)


def test_a_longer_dense_start_harms_less_and_takes_longer():
    found = resolver()
    early = found.resolve(found.genes.uniform(8, dense_start=0))
    late = found.resolve(found.genes.uniform(8, dense_start=1))
    assert late.time == pytest.approx(early.time + 0.75 * 2 * 0.9 / 10)
    assert late.harm < early.harm
    assert (early.dense_start, late.dense_start) == (0.2, 0.4)


def test_dense_steps_cost_what_the_faster_dense_does_in_each_precision():
    found = resolver(dense=(0.6, 0.8))
    genes = found.genes
    assert found.fastest_dense == pytest.approx(1 - 0.75 * 0.4)
    genome = list(genes.uniform(0))
    first = len(genome) - 3
    genome[first] = 1  # group of site a in full
    point = found.resolve(tuple(genome))
    assert point.precision == {"a": "full", "b": "half"}
    assert point.time == pytest.approx(1 - 0.25 * 0.2 - 0.5 * 0.4)


def test_no_level_leads_below_the_floor_of_quality():
    """The highest level is as fast as the floor allows, to a part in a thousand of its price."""
    free = resolver(floor=-20)
    fastest = free.resolve(free.genes.uniform(8))
    floor = 5.0
    assert -10 * log10(fastest.harm) < floor
    bounded = resolver(floor=floor)
    points = [bounded.resolve(bounded.genes.uniform(level)) for level in range(9)]
    assert all(p.harm <= 10 ** (-floor / 10) for p in points)
    assert fastest.time < points[8].time < points[1].time
