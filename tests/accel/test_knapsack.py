"""The multiple-choice knapsack, against all combinations."""

from itertools import product

import pytest
import torch

from accel.errors import PlanError
from accel.knapsack import multiple_choice


def best_of_all(gains, weights, limit, allowed):
    items, options = gains.shape
    return max(
        sum(float(gains[i, o]) for i, o in enumerate(taken))
        for taken in product(range(options), repeat=items)
        if all(allowed[i, o] for i, o in enumerate(taken))
        and sum(float(weights[i, o]) for i, o in enumerate(taken)) <= limit
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_it_is_the_best_of_all_combinations(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    gains = torch.rand(5, 3, generator=generator, dtype=torch.float64)
    weights = torch.rand(5, 3, generator=generator, dtype=torch.float64) * scale
    allowed = torch.rand(5, 3, generator=generator) < 0.8
    allowed[:, 0], weights[:, 0] = True, 0
    limit = 0.9 * scale
    taken = multiple_choice(gains, weights, limit, allowed)
    assert all(allowed[i, o] for i, o in enumerate(taken))
    rows = range(5)
    assert float(weights[rows, taken].sum()) <= limit * (1 + 1e-6)
    gain = float(gains[rows, taken].sum())
    assert gain == pytest.approx(best_of_all(gains, weights, limit, allowed), rel=1e-3)


def test_losses_are_gains_below_zero():
    errors = torch.tensor([[3.0, 1.0], [5.0, 4.0]])
    keeps = torch.tensor([[0.2, 0.9], [0.3, 0.9]])
    # one of the two may have the better option: the one that gains more by it
    assert multiple_choice(-errors, keeps, 1.3) == [1, 0]


def test_a_limit_of_zero_takes_what_weighs_nothing():
    weights = torch.tensor([[0.0, 0.1], [0.0, 0.0]])
    assert multiple_choice(torch.tensor([[0.0, 1.0], [0.0, 1.0]]), weights, 0.0) == [0, 1]


def test_a_limit_that_nothing_meets_is_told():
    with pytest.raises(PlanError, match=r"limit of 0\.5 cannot be met: .* adds up to 0\.7"):
        multiple_choice(torch.ones(2, 2), torch.tensor([[0.3, 1.0], [0.4, 1.0]]), 0.5)
