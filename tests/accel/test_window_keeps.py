"""Keeps of windows, the recipe that gives them, and the places of tokens in windows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accel.errors import PlanError
from accel.geometry import Geometry, Site
from accel.recipes import RECIPES, recipe
from accel.window_keeps import SCORES, WindowKeeps, kept_of
from accel.window_ranking import Cut, gather, places_of, ranked, scatter, token_energy


def swin(depths=(2, 2, 6, 2)):
    return Geometry(
        "SwinTransformer",
        tuple(
            Site(f"layers.{i}.blocks.{j}.attn", 3 * 2**i, 32)
            for i, depth in enumerate(depths)
            for j in range(depth)
        ),
    )


@st.composite
def cuts(draw):
    side = st.integers(1, 17)
    window = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    shift = draw(st.integers(0, window[0] - 1)), draw(st.integers(0, window[1] - 1))
    return Cut(draw(side), draw(side), window, shift)


@given(cuts())
def test_every_token_is_in_one_window_as_the_host_has_it(cut):
    """Rolled back by the shift, padded at the end, cut row by row."""
    numbers = torch.arange(cut.tokens).view(cut.rows, cut.columns)
    rolled = torch.roll(numbers, (-cut.shift[0], -cut.shift[1]), (0, 1))
    (down, across), (height, width) = cut.counts, cut.window
    padded = torch.full((down * height, across * width), cut.tokens)
    padded[: cut.rows, : cut.columns] = rolled
    expected = [
        padded[i * height : (i + 1) * height, j * width : (j + 1) * width].flatten()
        for i in range(down)
        for j in range(across)
    ]
    table = cut.table()
    assert torch.equal(table, torch.stack(expected))
    assert sorted(table[table < cut.tokens].tolist()) == list(range(cut.tokens))
    assert cut.ragged == bool((table == cut.tokens).any())


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 7))
def test_mask_units_hold_tokens_a_number_of_windows_apart(rows, columns, size):
    cut = Cut(rows, columns, (1, size), by_unit=True)
    table = cut.table()
    assert table.shape == (rows * columns, size)
    assert table[-1].tolist() == [(p + 1) * rows * columns - 1 for p in range(size)]
    assert sorted(table.flatten().tolist()) == list(range(cut.tokens))


@given(cuts(), st.floats(0.01, 1.0), st.integers(1, 3))
def test_gather_and_scatter_are_each_others_way_back(cut, keep, batch):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(batch, cut.tokens, 3, generator=generator)
    table, kept = cut.table(), kept_of(keep, cut.windows)
    windows = ranked(token_energy(x, "norm"), table, kept)
    places = places_of(windows, table, cut.tokens, cut.ragged)
    rows = gather(x, places)
    assert torch.equal(scatter(x, places, rows), x)
    changed = scatter(x, places, rows + 1)
    for image in range(batch):
        inside = torch.zeros(cut.tokens + 1, dtype=torch.bool)
        inside[table[windows[image]].flatten()] = True
        expected = x[image] + inside[:-1, None]
        assert torch.equal(changed[image], expected)


def test_gradients_pass_to_both_of_a_scatter():
    cut = Cut(5, 4, (3, 3), (1, 1))
    x = torch.randn(2, 20, 3, dtype=torch.float64).requires_grad_()
    table = cut.table()
    places = places_of(torch.tensor([[0, 3], [1, 2]]), table, 20, cut.ragged)

    def changed(x):
        return scatter(x, places, gather(x, places).sin())

    assert torch.autograd.gradcheck(changed, x)


@pytest.mark.parametrize("score", SCORES)
def test_windows_are_ranked_by_their_norm(score):
    generator = torch.Generator().manual_seed(2)
    cut = Cut(7, 10, (3, 4), (1, 2))
    x = torch.randn(3, 70, 5, generator=generator)
    found = ranked(token_energy(x, score), cut.table(), 4)
    for image in range(3):
        scores = []
        for window in cut.table():
            inside = x[image, window[window < 70]].double()
            if score == "contrast":
                inside = inside - x[image].double().mean(0)
            inside = inside.abs().mean(-1) if score == "norm_of_means" else inside
            scores.append(float(inside.square().sum().sqrt()))
        assert found[image].tolist() == sorted(range(9), key=lambda i: -scores[i])[:4]


def test_of_equal_windows_the_first_are_kept():
    cut = Cut(4, 6, (2, 2))
    assert ranked(torch.ones(2, 24), cut.table(), 3).tolist() == [[0, 1, 2]] * 2


@pytest.mark.parametrize(
    ("keep", "windows", "kept"),
    [(0.4, 576, 230), (0.5, 1, 1), (0.01, 9, 1), (0.7, 10, 7), (0.1, 30, 3), (1.0, 13, 13)],
)
def test_kept_of(keep, windows, kept):
    assert kept_of(keep, windows) == kept


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"keeps": {"a": 0.0}}, r"windows\.keeps\['a'\] is a fraction in \(0, 1\], got 0\.0"),
        ({"keeps": {"a": float("nan")}}, "is a fraction"),
        ({"keeps": {"a": 1.5}}, "is a fraction"),
        ({"keeps": {}, "score": "nrm"}, "did you mean 'norm'"),
        ({"keeps": {}, "scores": "norm"}, "scores"),
    ],
)
def test_bad_keeps_are_refused(data, message):
    with pytest.raises(PlanError, match=message):
        WindowKeeps.from_dict(data)


def test_the_recipe_has_what_the_papers_search_found():
    plan = recipe("sparsevit", swin())
    found = [plan.windows.of(site.name) for site in swin().sites]
    assert found == [0.4] * 2 + [1.0] * 2 + [0.8] * 2 + [0.6] * 2 + [0.5] * 2 + [1.0] * 2
    assert plan.windows.score == "norm_of_means"
    assert not plan.wants_sparse
    assert RECIPES["sparsevit"].vision
    assert not RECIPES["sparsevit"].frames


def test_numbers_of_the_recipe_are_spread_over_the_pairs_of_a_deep_stage():
    plan = recipe("sparsevit", swin((2, 2, 18, 2)), score="norm")
    found = [plan.windows.of(f"layers.2.blocks.{j}.attn") for j in range(18)]
    assert found == [0.8] * 6 + [0.6] * 6 + [0.5] * 6
    uniform = recipe("sparsevit", swin((1, 3)), uniform=0.5)
    assert set(uniform.windows.keeps.values()) == {0.5}
    assert len(uniform.windows.keeps) == 4


@pytest.mark.parametrize(
    ("geometry", "parameters", "message"),
    [
        (swin((2, 2)), {}, "keeps are for 4 stages, the model has 2"),
        (swin(), {"keeps": ((1.0, 0.5), 1.0, 1.0, 1.0)}, "2 numbers for the 1 pairs"),
        (Geometry("Hiera", (Site("blocks.0.attn", 1, 8),)), {}, "not for a Hiera"),
    ],
)
def test_the_recipe_refuses(geometry, parameters, message):
    with pytest.raises(PlanError, match=message):
        recipe("sparsevit", geometry, **parameters)
