"""Genes of keeps: what a search for a vision model may turn."""

from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accel.errors import AccelError
from accel.geometry import Geometry, Site
from accel.search.keep_genes import KeepGenes

STAGES = [[f"layers.{s}.blocks.{b}.attn" for b in range(n)] for s, n in enumerate((2, 2, 6, 3))]
SPACE = {"keep": [1.0, 0.75, 0.5, 0.25], "how": [{"score": "norm_of_means"}, {"score": "norm"}]}
WINDOWS = KeepGenes.of(SPACE, "windows", STAGES)
TOKENS = KeepGenes.of(
    {"keep": [0.2, 1.0, 0.6, 0.4], "group": 3}, "tokens", [[f"blocks.{b}.attn" for b in range(8)]]
)
GEOMETRY = Geometry("SwinTransformer", tuple(Site(n, 2, 8) for stage in STAGES for n in stage))


def test_one_gene_for_each_pair_of_blocks():
    assert [len(stage) for stage in WINDOWS.stages] == [1, 1, 3, 2]
    assert WINDOWS.groups[6] == ("layers.3.blocks.2.attn",)
    assert list(WINDOWS.sizes.values()) == [4] * 7 + [2]
    assert TOKENS.keeps == (1.0, 0.6, 0.4, 0.2)
    assert "how" not in TOKENS.sizes


@given(st.integers(0, 10_000))
def test_repaired_keeps_do_not_grow_within_a_stage(seed):
    rng = Random(seed)
    for genes, least in ((WINDOWS, 0.0), (TOKENS, 0.5)):
        genome = genes.repaired(genes.random(rng))
        assert genes.repaired(genome) == genome
        keeps, place = genes.keeps_of(genome), 0
        for groups in genes.stages:
            row = [1.0, *keeps[place : place + len(groups)]]
            place += len(groups)
            assert all(before >= after for before, after in pairwise(row))
            assert all(a >= least * b - 1e-9 for b, a in pairwise(row))


def test_the_plan_of_a_genome():
    genome = WINDOWS.nearest({"keep": [0.5, 1.0, [1.0, 0.7, 0.3], 0.2], "how": {"score": "norm"}})
    plan = WINDOWS.plan(genome, GEOMETRY, "mine", seed=7)
    assert plan.windows is not None
    assert plan.windows.score == "norm"
    assert plan.windows.keeps == {
        **dict.fromkeys(STAGES[0], 0.5),
        **dict.fromkeys(STAGES[2][2:4], 0.75),
        **dict.fromkeys(STAGES[2][4:], 0.25),
        **dict.fromkeys(STAGES[3], 0.25),
    }
    assert plan.provenance["seed"] == 7
    assert type(plan).from_dict(plan.to_dict()) == plan
    geometry = Geometry(
        "VisionTransformer", tuple(Site(f"blocks.{b}.attn", 2, 8) for b in range(8))
    )
    tokens = TOKENS.plan(TOKENS.repaired((0, 3, 3)), geometry, "mine").tokens
    assert tokens is not None
    assert tokens.keeps == {"blocks.3.attn": 0.6, "blocks.6.attn": 0.4}


def test_children_differ_from_their_parents():
    rng = Random(3)
    parent = WINDOWS.nearest({"keep": 0.5})
    for _ in range(50):
        child = WINDOWS.child(parent, parent, rng)
        assert child != parent
        assert all(0 <= n < size for n, size in zip(child, WINDOWS.sizes.values(), strict=True))


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({"kep": [1.0, 0.5]}, "keep"),
        ({"keep": 0.5}, "list of keeps"),
        ({"keep": [1.0, 1.5]}, "fraction"),
        ({"keep": [1.0, 0.5], "group": 0}, "number of blocks"),
        ({"keep": [0.8, 0.5]}, r"1\.0 is among keeps"),
        ({"keep": [1.0, 0.5], "how": [{"score": "nrm"}]}, "norm"),
    ],
)
def test_a_wrong_space_is_refused(space, words):
    with pytest.raises(AccelError, match=words):
        KeepGenes.of(space, "windows", STAGES)


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"keeps": 0.5}, "no 'keeps'"),
        ({"keep": [0.5, 0.5]}, "2 stages"),
        ({"keep": [0.5, 0.5, [0.5], 0.5]}, "1 keeps for the 3 groups"),
    ],
)
def test_a_wrong_first_generation_is_refused(wanted, words):
    with pytest.raises(AccelError, match=words):
        WINDOWS.nearest(wanted)


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"keep": 0.5, "how": {"score": "nrm"}}, "the how .*nrm.*, not one of"),
        ({"keep": 7}, "the keep 7; it is above 0"),
        ({"keep": [None, 1.0, 1.0, 1.0]}, "the keep None"),
    ],
)
def test_what_a_space_begins_with_is_checked(wanted, words):
    with pytest.raises(AccelError, match=words):
        WINDOWS.nearest(wanted)
