"""Genes of a search for a text model: every genome is a plan, and published methods are genomes."""

from pathlib import Path
from random import Random

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from accel.errors import AccelError
from accel.geometry import Geometry, Site
from accel.plan import Plan
from accel.recipes import recipe
from accel.search.text_genes import TextGenes
from accel.token_cache import TokenCache

SPACE = yaml.safe_load(
    (Path(__file__).parents[2] / "configs" / "space" / "text.yaml").read_text(encoding="utf-8")
)
GEOMETRY = Geometry("Text", tuple(Site(f"layers.{i}", 6, 16) for i in range(3)))
GENES = TextGenes.of(SPACE["genes"], (64, 32))


@given(st.integers(0, 10**9))
def test_every_genome_is_a_plan(seed):
    genome = GENES.repaired(GENES.random(Random(seed)))
    plan = GENES.plan(genome, GEOMETRY, "p")
    assert Plan.from_dict(plan.to_dict()) == plan
    assert GENES.repaired(genome) == genome
    assert GENES.from_params(GENES.to_params(genome)) == genome


@given(st.integers(0, 10**9))
def test_children_are_within_the_space_and_other_than_twin_parents(seed):
    rng = Random(seed)
    one, other = GENES.random(rng), GENES.random(rng)
    child = GENES.child(one, other, rng)
    assert all(0 <= gene < size for gene, size in zip(child, GENES.sizes.values(), strict=True))
    twins = [GENES.child(one, one, Random(n)) for n in range(30)]
    assert all(twin != one for twin in twins)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("fast_dllm", {}), ("sparse_dllm", {}), ("flashblock", {}), ("streaming_dllm", {})],
)
def test_published_methods_are_genomes(name, parameters):
    wanted = recipe(name, GEOMETRY, **parameters)
    settings = wanted.cache.to_dict()
    decoding = wanted.decoding.to_dict()
    commit = {"rule": decoding["rule"]}
    if decoding["bound"] is not None:
        commit["bound"] = decoding["bound"]
    genome = GENES.nearest(
        {
            **settings,
            "block_length": decoding["block_length"],
            "stop_at_eos": decoding["stop_at_eos"],
            "commit": commit,
        }
    )
    plan = GENES.plan(GENES.repaired(genome), GEOMETRY, name)
    assert (plan.cache, plan.decoding) == (wanted.cache, wanted.decoding)


def test_the_first_generation_is_of_the_space():
    genomes = [GENES.repaired(GENES.nearest(wanted)) for wanted in SPACE["first"]]
    assert len(set(genomes)) == len(genomes)
    for genome, wanted in zip(genomes, SPACE["first"], strict=True):
        found = GENES.of_genome(genome)
        assert {name: found[name] for name in wanted} == wanted


def test_genes_that_do_nothing_have_one_value():
    still = {"keep": 1.0, "pool": 7, "by_head": True, "dense_start": 0.0}
    genome = GENES.repaired(GENES.nearest(still))
    assert GENES.of_genome(genome)["pool"] == 1
    assert GENES.of_genome(genome)["dense_start"] == 0.2
    frozen = GENES.repaired(GENES.nearest({"external": "frozen", "feed": "suffix", "blocks": 4}))
    assert GENES.plan(frozen, GEOMETRY, "p").cache == TokenCache(external="frozen")


@pytest.mark.parametrize(
    ("space", "why"),
    [
        ({"keeps": [1.0]}, "did you mean 'keep'"),
        ({"keep": 0.5}, "a list of values"),
        ({"keep": []}, "a list of values"),
        ({"keep": [0.5, 2.0]}, r"space.genes.keep has 2.0: cache.keep"),
        ({"commit": [{"rule": "threshold"}]}, "decoding.bound"),
        ({"masks": [{"select": {"kind": "nothing"}}]}, "is unknown"),
        ({"precision": ["quarter"]}, "did you mean|Known"),
    ],
)
def test_what_is_no_space(space, why):
    with pytest.raises(AccelError, match=why):
        TextGenes.of(space, (64, 32))
