"""Genes: names, counts, groups of layers, children."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accel.errors import AccelError
from accel.search.genome import MAX_GENES, Genes


def genes(sites=5, bands=3, levels=7, starts=(0.1, 0.2), precisions=("half", "full")) -> Genes:
    names = [f"blocks.{i}" for i in range(sites)]
    return Genes.of(names, bands, levels=levels, dense_starts=starts, precisions=precisions)


def test_names_and_values():
    found = genes(sites=2)
    assert list(found.sizes) == [
        *(f"level.band{b}.group{g}" for b in range(3) for g in range(2)),
        *("precision.group0", "precision.group1", "dense_start"),
    ]
    genome = (1, 2, 3, 4, 5, 6, 0, 1, 1)
    assert found.level(genome, band=1, group=1) == 4
    assert (found.precision(genome, 0), found.precision(genome, 1)) == ("half", "full")
    assert found.dense_start(genome) == 0.2
    assert found.from_params(found.to_params(genome)) == genome
    assert found.count == 7**6 * 2 * 2 * 2


def test_a_gene_with_one_value_is_none():
    found = genes(starts=(0.1,), precisions=("int8",))
    assert all(name.startswith("level.") for name in found.sizes)
    assert found.dense_start((0,) * 15) == 0.1
    assert found.precision((0,) * 15, 3) == "int8"


@given(st.integers(1, 400), st.integers(1, 20), st.booleans())
def test_layers_are_grouped_to_few_genes_and_none_is_lost(sites, bands, two):
    found = genes(sites, bands, precisions=("half", "full")[: 1 + two])
    assert len(found.sizes) <= MAX_GENES
    assert [site for group in found.groups for site in group] == [
        f"blocks.{i}" for i in range(sites)
    ]
    assert all(found.groups)
    sizes = [len(group) for group in found.groups]
    assert max(sizes) - min(sizes) <= 1


def test_more_bands_than_genes_are_refused():
    with pytest.raises(AccelError, match=r"120 step bands .* schedule\.bands"):
        genes(bands=120)


@given(st.integers(0, 10**6))
def test_children_are_genomes_and_differ_from_a_pair_of_equal_parents_by_few_genes(seed):
    found, rng = genes(), Random(seed)
    one, other = found.random(rng), found.random(rng)
    child = found.child(one, other, rng)
    assert all(0 <= x < size for x, size in zip(child, found.sizes.values(), strict=True))
    same = found.child(one, one, rng)
    assert sum(a != b for a, b in zip(one, same, strict=True)) <= len(one)
    for a, b, name in zip(one, same, found.sizes, strict=True):
        if name.startswith("level."):
            assert abs(a - b) <= 6


def test_levels_move_together_and_stop_at_the_ends():
    found = genes(sites=1, bands=3)
    assert found.with_levels((0, 5, 6, 1, 1), 1) == (1, 6, 6, 1, 1)
    assert found.with_levels((0, 5, 6, 1, 1), -6) == (0, 0, 0, 1, 1)
    assert found.uniform(4, dense_start=1) == (4, 4, 4, 0, 1)
