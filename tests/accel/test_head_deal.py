"""Heads dealt to ranks by cost."""

import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from accel.head_deal import LEAST, contiguous, deal, imbalance

COSTS = st.lists(st.floats(0, 1), min_size=1, max_size=24)


@given(COSTS, st.integers(1, 6))
@example([0.0] * 5, 3)
@example([1.0] * 12, 4)
def test_every_head_has_one_rank(costs, ranks):
    dealt = deal(costs, ranks)
    assert len(dealt) == ranks
    assert sorted(h for heads in dealt for h in heads) == list(range(len(costs)))
    assert dealt == deal(list(costs), ranks), "every rank comes to the same deal"


@given(st.lists(st.floats(LEAST, 1), min_size=1, max_size=24), st.integers(2, 6))
def test_the_slowest_rank_has_no_head_that_another_could_take(costs, ranks):
    dealt = deal(costs, ranks)
    loads = [sum(costs[h] for h in heads) for heads in dealt]
    slowest = max(range(ranks), key=loads.__getitem__)
    for head in dealt[slowest]:
        assert min(loads) + costs[head] >= loads[slowest] - 1e-6


def uneven_keeps(heads, generator):
    """As profiles find them: a few heads dense, most at a fraction."""
    return [generator.choice([1.0, *(generator.uniform(0.05, 0.8),) * 7]) for _ in range(heads)]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("heads", [12, 16, 24, 40])
def test_the_slowest_rank_is_near_the_mean(heads, ranks):
    generator = random.Random(heads * ranks)
    dealt, neighbours = [], []
    for _ in range(200):
        keeps = uneven_keeps(heads, generator)
        found = imbalance(keeps, deal(keeps, ranks))
        # no deal does better than its dearest head, or than one of its heads more than the mean
        mean = sum(keeps) / ranks
        bound = max(1.1, max(keeps) / mean)
        if heads // ranks >= 4:
            assert found <= bound
        dealt.append(found <= bound)
        neighbours.append(imbalance(keeps, contiguous(heads, ranks)))
    assert sum(dealt) >= 190
    assert sum(neighbours) / len(neighbours) > 1.1 or ranks == 2


def test_what_ranks_do_besides_counts():
    assert deal([1.0, 1.0, 1.0], 2, loads=[2.0, 0.0]) == ((2,), (0, 1))
    assert deal([0.5], 2, loads=[1.0, 0.0]) == ((), (0,))


def test_imbalance_is_the_slowest_over_the_mean():
    assert imbalance([1.0, 0.2, 0.4], ((0,), (1, 2))) == pytest.approx(1.25)
    assert imbalance([1.0, 0.5, 0.5], ((0,), (1, 2))) == 1.0
    assert imbalance([0.0], ((0,), ())) == 1.0


def test_heads_that_cost_alike_are_dealt_in_like_numbers():
    assert [len(heads) for heads in deal([0.3] * 12, 4)] == [3] * 4
    assert sorted(len(heads) for heads in deal([0.3] * 7, 4)) == [1, 2, 2, 2]


def test_neighbours():
    assert contiguous(7, 3) == ((0, 1, 2), (3, 4), (5, 6))


def test_costs_are_numbers():
    with pytest.raises(ValueError, match="costs are numbers"):
        deal([float("nan")], 2)
    with pytest.raises(ValueError, match="costs are numbers"):
        deal([1.0], 2, loads=[1.0])
