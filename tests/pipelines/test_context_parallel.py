"""Ranks that share every call give what one process gives."""

from functools import cache

import pytest
import torch
from context_parallel_runs import (
    CHOICES,
    COMPILED,
    GRID,
    STEPS,
    TWICE,
    compiled,
    edges,
    model_of,
    plain,
    plan_of,
    wan_alone,
    wan_on_ranks,
)
from diffusers import ParallelConfig
from diffusers.models._modeling_parallel import TensorParallelConfig
from ranks import on_ranks
from tiny_denoiser import SITES, call, inputs, tiny_geometry

import accel
from accel.layout import Layout
from accel.ranks import Ranks
from accel.router import Session

EXACT = [name for name in CHOICES if name != "adaptive"]
FEW = ["selections", "stand-ins", "adaptive"]
# ranks, heads, diffusers' settings, plans; seven heads are not divided by four
SHAPES = {
    "two": (2, 8, {}, list(CHOICES)),
    "four": (4, 8, {}, list(CHOICES)),
    "uneven": (4, 7, {"ulysses_anything": True}, FEW),
}


def plans(names):
    """Every shape with those of its plans."""
    return pytest.mark.parametrize(
        ("key", "name"), [(key, n) for key, shape in SHAPES.items() for n in names if n in shape[3]]
    )


@cache
def alone(heads, names):
    return wan_alone(heads, names)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Of every shape, by rank, what `wan_on_ranks` gives."""

    @cache
    def run(key):
        ranks, heads, settings, names = SHAPES[key]
        folder = tmp_path_factory.mktemp("ranks")
        return on_ranks(ranks, wan_on_ranks, folder, ranks, heads, names, settings)

    return run


def same(a, b):
    return torch.allclose(a, b, rtol=1e-5, atol=2e-6)


class TestWan:
    @plans(EXACT)
    def test_it_is_what_one_process_gives(self, runs, key, name):
        _, heads, _, names = SHAPES[key]
        by_plan = alone(heads, tuple(names))
        expected = by_plan[name]
        assert not same(expected, by_plan["adaptive"]), "or the test could not tell"
        for one in runs(key):
            assert same(one[name]["outs"], expected)
            if name in TWICE:
                assert same(one[name]["again"], expected), "dealt by what was seen before"

    @plans(CHOICES)
    def test_all_ranks_give_the_same(self, runs, key, name):
        found = runs(key)
        assert all(torch.equal(one[name]["outs"], found[0][name]["outs"]) for one in found)

    @pytest.mark.parametrize("key", SHAPES)
    def test_dense_calls_are_the_hosts(self, runs, key):
        for alone, under_a_plan in (one["dense"] for one in runs(key)):
            assert torch.equal(alone, under_a_plan)
            assert same(alone, plain(SHAPES[key][1]))

    @plans(CHOICES)
    def test_every_head_is_dealt_once(self, runs, key, name):
        found, (ranks, heads, _, _) = runs(key), SHAPES[key]
        for place in found[0][name]["dealt"]:
            dealt = [one[name]["dealt"][place] for one in found]
            assert [(d.rank, d.ranks) for d in dealt] == [(r, ranks) for r in range(ranks)]
            together = sorted(h for d in dealt for h in d.heads)
            assert together == sorted(set(together))
            assert len(together) == heads or name == "stand-ins"
            assert len({(d.imbalance, d.neighbours) for d in dealt}) == 1
            if name == "patterns":
                assert dealt[0].imbalance <= dealt[0].neighbours + 1e-6

    @plans(["patterns"])
    def test_the_summary_is_of_this_rank_and_tells_of_the_others(self, runs, key, name):
        found, (ranks, heads, _, _) = runs(key), SHAPES[key]
        for rank, one in enumerate(found):
            said = one[name]
            assert f"dealt to {ranks} ranks, these are those of rank {rank}: the" in said["text"]
            assert {entry["site"] for entry in said["data"]["dealt"]} == set(SITES)
        # what ranks keep of their heads is what one process keeps of all
        place = (SITES[0], "band 0")
        keeps = [(one[name]["rows"][place][1], one[name]["dealt"][place]) for one in found]
        assert all(keep > 0 for keep, _ in keeps)
        model = accel.enable(model_of(heads), plan_of(model_of(heads), name), guard=False)
        call(model, 2, STEPS, **inputs(grid=GRID))
        (row,) = [r for r in accel.summary(model).rows if r.site == SITES[0]]
        mean = sum(keep * len(dealt.heads) for keep, dealt in keeps) / heads
        assert mean == pytest.approx(row.keep)

    @plans(["kernel"])
    def test_dense_steps_by_accels_kernel(self, runs, key, name):
        rows = [one[name]["rows"][SITES[0], "dense"] for one in runs(key)]
        assert all("dense" not in kernels for _, _, kernels in rows)

    @plans(["adaptive"])
    def test_budgets_are_shared_within_a_rank(self, runs, key, name):
        # AdaSpa's heads give to each other: those of one rank do, so all ranks keep as much
        keeps = {one[name]["rows"][SITES[0], "band 0"][1] for one in runs(key)}
        assert max(keeps) - min(keeps) < 0.1

    @plans(["recall"])
    def test_what_only_calls_tell_decides_the_next_deal(self, runs, key, name):
        place = (SITES[0], "band 0")
        before, after = (runs(key)[0][name][x] for x in ("first", "dealt"))
        assert after[place].imbalance <= before["dealt"][place].imbalance + 1e-6


@pytest.fixture(scope="module")
def edge(tmp_path_factory):
    return on_ranks(2, edges, tmp_path_factory.mktemp("edges"), 2)


class TestEdges:
    def test_ranks_may_share_the_model_before_and_after(self, edge):
        model = accel.enable(model_of(4), plan_of(model_of(4), "selections"), guard=False)
        expected = call(model, 3, STEPS, **inputs(grid=GRID))
        assert all(same(out, expected) for one in edge for out in one["order"])

    def test_the_self_check_waits_for_nobody(self, edge):
        assert all(one["alone"] for one in edge)
        model = accel.enable(model_of(4), plan_of(model_of(4), "patterns"))
        expected = call(model, 3, STEPS, **inputs(grid=GRID))
        assert all(same(one["together"], expected) for one in edge)

    @pytest.mark.parametrize(
        ("name", "why"),
        [("long", "has 96 tokens, but the layout"), ("text", "in equal parts of its text")],
    )
    def test_a_layout_that_does_not_fit_runs_dense_on_all_ranks(self, edge, name, why):
        for one in edge:
            out, notices = one[name]
            assert torch.equal(out, one["dense"])
            assert all(why in notice for notice in notices)
            assert sum(notices.values()) == len(SITES)

    def test_a_ring_is_refused(self, edge):
        for one in edge:
            for when in ("ring", "ring at the call"):
                assert one[when].startswith("AccelError: context parallelism with ring_degree=2")
            assert not one["ring leaves"]

    def test_shared_weights_are_refused(self):
        model = model_of(4)
        model._parallel_config = ParallelConfig(tensor_parallel_config=TensorParallelConfig())
        with pytest.raises(accel.AccelError, match="tensor parallelism gives every rank some"):
            accel.enable(model, plan_of(model, "patterns"))
        assert "_accel" not in model.__dict__

    def test_a_profile_is_refused(self, edge):
        assert all(one["observer"].startswith("AccelError: a profile") for one in edge)

    def test_heads_that_share_keys_are_refused(self):
        model = model_of(4)
        session = Session(plan_of(model, "patterns"), tiny_geometry(model))
        session.begin(Layout.of(GRID), accel.context.Where(3, STEPS))
        q, k = torch.zeros(1, 4, 48, 24), torch.zeros(1, 2, 48, 24)
        site = session.geometry.sites[0]
        with pytest.raises(accel.AccelError, match="4 query heads and 2 key heads"):
            session.attend(site, q, k, k, lambda: q, None, None, Ranks(None, 0, 2, True))


def test_compiled_blocks(tmp_path):
    model = accel.enable(model_of(4), plan_of(model_of(4), "selections"), guard=False)
    expected = [call(model, step, STEPS, **inputs(grid=GRID)) for step in COMPILED]
    for outs, graphs in on_ranks(2, compiled, tmp_path, 2):
        assert all(same(a, b) for a, b in zip(outs, expected, strict=True))
        assert graphs == 2, "the first block splits tokens, and the others are one"
