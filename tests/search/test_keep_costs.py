"""What keeping less saves: measured alone, added up."""

from contextlib import contextmanager
from pathlib import Path

import pytest

from accel.search.keep_costs import LEAST, KeepCosts
from accel.search.keep_genes import KeepGenes

WINDOWS = KeepGenes.of(
    {"keep": [1.0, 0.9, 0.7, 0.5, 0.3, 0.1], "group": 1}, "windows", [["a"], ["b", "c"]]
)
TOKENS = KeepGenes.of({"keep": [1.0, 0.8, 0.5, 0.25], "group": 2}, "tokens", [["a", "b", "c"]])
# seconds of a group's own work; of tokens a later one gets what an earlier one left
WORK = {"a": 0.04, "b": 0.02, "c": 0.01}


class Model:
    """Has a clock that goes on for as long as its groups have to work."""

    def __init__(self, genes):
        self.genes, self.runs, self.now = genes, 0, 0.0
        self.keeps = [1.0] * len(genes.groups)

    @contextmanager
    def keeping(self, genome):
        """Takes time itself, which is not the model's."""
        # models refuse keeps that grow within a stage
        assert self.genes.repaired(genome) == genome
        before, self.keeps = self.keeps, self.genes.keeps_of(genome)
        self.now += 0.5
        yield
        self.keeps = before

    def __call__(self):
        self.runs += 1
        left, seconds = 1.0, 0.03
        for group, keep in zip(self.genes.groups, self.keeps, strict=True):
            left = min(left, keep)
            share = left if self.genes.part == "tokens" else keep
            seconds += share * sum(WORK[site] for site in group)
        self.now += seconds


@pytest.mark.parametrize("genes", [WINDOWS, TOKENS], ids=["windows", "tokens"])
def test_a_sum_of_savings_is_near_what_a_model_takes(genes, tmp_path):
    costs, model = KeepCosts(genes, tmp_path / "costs.json", 3), Model(genes)
    costs.measure(model, model.keeping, clock=lambda: model.now)
    groups = len(genes.groups)
    assert model.runs == groups * len(costs.knots) * 3 * 2 * 2
    assert costs.time([1.0] * groups) == 1.0
    genome = genes.repaired((3, 2, 3)[:groups])
    whole = 0.03 + sum(WORK.values())
    keeps = genes.keeps_of(genome)
    exact = 0.03 + sum(
        keep * sum(WORK[site] for site in group)
        for group, keep in zip(genes.groups, keeps, strict=True)
    )
    assert costs.time(keeps) == pytest.approx(exact / whole)
    again = KeepCosts(genes, tmp_path / "costs.json", 3)
    again.measure(lambda: pytest.fail("measured twice"), model.keeping)
    assert again.time(keeps) == costs.time(keeps)


def test_knots_are_keeps_that_a_group_may_have_alone():
    assert KeepCosts(WINDOWS, Path("none"), 1).knots == (0.9, 0.5, 0.1)
    assert KeepCosts(TOKENS, Path("none"), 1).knots == (0.8, 0.5)


def test_a_table_that_promises_too_much_is_bounded(tmp_path):
    (tmp_path / "costs.json").write_text('{"a": {"0.1": 0.9}, "b": {"0.1": 0.9}, "c": {"0.1": 0}}')
    costs = KeepCosts(WINDOWS, tmp_path / "costs.json", 1)
    assert costs.time([0.1, 0.1, 0.1]) == LEAST


def test_a_broken_table_is_measured_anew(tmp_path, caplog):
    (tmp_path / "costs.json").write_text('{"a": {"0.1": "much"}}')
    costs = KeepCosts(WINDOWS, tmp_path / "costs.json", 1)
    assert "not a number" in caplog.text
    with pytest.raises(KeyError):
        costs.time([0.1, 0.1, 0.1])
