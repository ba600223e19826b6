"""The trade-off: exact against enumeration where that is possible."""

import itertools
from dataclasses import replace

import pytest
import torch

from accel.choice import DENSE, Choice
from accel.estimators import BlockMassTopK
from accel.profile import Profile
from accel.search.front import Times, front, within

CANDIDATES = tuple(Choice(BlockMassTopK(keep=k)) for k in (0.1, 0.3))
PRICES = (0.2, 0.45)


def profile_of(seed: int, sites: int = 2, heads: int = 2) -> Profile:
    """Random errors in which the cheaper candidate is the more harmful one."""
    generator = torch.Generator().manual_seed(seed)
    profile = Profile(CANDIDATES)
    for site in range(sites):
        low = torch.rand(1, heads, generator=generator)
        profile.add((f"blocks.{site}", 0), torch.cat([low * 3, low]))
    return profile


def times_of(sites: int = 2) -> Times:
    return Times(
        head={f"blocks.{i}": 0.1 / 10 for i in range(sites)},
        steps=[10],
        price=PRICES,
        looks=[0.5, 0.5],
    )


@pytest.mark.parametrize("seed", range(4))
def test_every_point_is_optimal_for_its_time(seed):
    profile, times = profile_of(seed), times_of()
    points = front(profile, times, [1.0])
    errors = torch.cat([profile.errors[f"blocks.{i}", 0] for i in range(2)], dim=1).T
    errors = torch.cat([errors, torch.zeros(4, 1)], dim=1)
    time = times.of(("blocks.0", 0))
    enumerated = []
    for pick in itertools.product(range(3), repeat=4):
        saved = sum(float(time[-1] - time[i]) for i in pick)
        harm = sum(10 * float(errors[head, i]) for head, i in enumerate(pick))
        enumerated.append((1 - saved, harm))
    for point in points:
        rivals = [harm for t, harm in enumerated if t <= point.time + 1e-9]
        assert point.harm == pytest.approx(min(rivals), rel=1e-5)


def test_the_front_falls_from_dense_to_the_fastest():
    points = front(profile_of(5), times_of(), [1.0])
    assert points[0].time == pytest.approx(1.0)
    assert points[0].harm == 0
    assert points[0].choices(CANDIDATES)["blocks.1"] == ((DENSE, DENSE),)
    for slow, fast in itertools.pairwise(points):
        assert fast.time < slow.time
        assert fast.harm > slow.harm
    fastest = points[-1].choices(CANDIDATES)
    assert fastest == {f"blocks.{i}": ((CANDIDATES[0],) * 2,) for i in range(2)}


def test_a_cheaper_dense_head_shortens_every_plan():
    times = replace(times_of(), dense=0.6, share=0.5)
    points = front(profile_of(5), times, [1.0])
    assert points[0].time == pytest.approx(1 - 0.5 * 0.4)
    assert points[0].harm == 0
    # all heads at 0.2 in all steps, two sites of two heads: 0.01 of time each a step
    looks = 4 * 0.01 * 0.5
    assert points[-1].time == pytest.approx(1 - 0.5 * 0.4 - 4 * 0.1 * (0.6 - 0.2) + looks)


def test_within_takes_the_least_harmful_plan_in_the_budget():
    points = front(profile_of(6), times_of(), [1.0])
    budget = points[len(points) // 2].time
    chosen = within(points, budget)
    assert chosen.time <= budget
    assert chosen.harm == min(p.harm for p in points if p.time <= budget)
    assert within(points, 0.01) == points[-1]


def test_a_selection_that_costs_more_than_it_saves_stays_dense():
    times = Times(head={"blocks.0": 0.1}, steps=[1], price=PRICES, looks=[0.9, 0.9])
    points = front(profile_of(7, sites=1), times, [1.0])
    assert len(points) == 1
    assert points[0].choices(CANDIDATES) == {"blocks.0": ((DENSE, DENSE),)}


def test_time_is_spent_in_the_bands_that_are_sensitive():
    """Two bands with the same errors and prices: the one that matters more is the less sparse."""
    generator = torch.Generator().manual_seed(8)
    profile = Profile(CANDIDATES)
    errors = torch.rand(2, 3, generator=generator) * torch.tensor([[3.0], [1.0]])
    for band in range(2):
        profile.add(("blocks.0", band), errors)
    times = Times(head={"blocks.0": 0.01}, steps=[10, 10], price=PRICES, looks=[0.5, 0.5])
    points = front(profile, times, [100.0, 1.0])
    price = (*PRICES, 1.0)
    for point in points:
        early, late = (sum(price[i] for i in point.assignment["blocks.0", b]) for b in range(2))
        assert early >= late
    dense = (-1, -1, -1)
    assert any(p.assignment["blocks.0", 0] == dense != p.assignment["blocks.0", 1] for p in points)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_the_front_does_not_depend_on_the_unit_of_harm(scale):
    one = front(profile_of(9), times_of(), [1.0])
    other = front(profile_of(9), times_of(), [scale])
    assert [p.assignment for p in one] == [p.assignment for p in other]
    assert [p.harm * scale for p in one] == pytest.approx([p.harm for p in other])
