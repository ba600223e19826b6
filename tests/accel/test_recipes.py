"""The contract of every recipe, and what each of them is known for."""

import pytest
import torch
from profiles import synthetic_profile
from tiny_denoiser import call, inputs, tiny_denoiser, tiny_geometry

import accel
from accel.blocking import Blocking
from accel.choice import Choice
from accel.cost import keep_of as keep_of_choice
from accel.geometry import Geometry, Site
from accel.kernels.attention import resolve_backend
from accel.kernels.reference import block_mass_reference
from accel.layout import Layout
from accel.masks import site_mask
from accel.pattern import Window
from accel.pipelines.enable import session_of
from accel.plan import Plan
from accel.recipes import RECIPES, demand, recipe

GRID = (5, 4, 6)
LAYOUT = Layout.of(GRID)
BLOCK = (32, 16)
STEPS = 10
ASKED = {"sparsed": 0.3, "adaspa": 0.2, "pisa": 0.15, "subblock": 0.25, "svg_ear": 0.25}
# dense steps of 50 where they are not 10
DENSE_STEPS = {"radial": 12, "xattention": 5, "jenga": 0, "sparge": 0}
# those that need no calibration; of the others test_calibrated_recipes.py says more
FRAMES = [name for name, found in RECIPES.items() if found.frames]
SPARSE = [n for n in FRAMES if RECIPES[n].demand is None and n not in ("full", "half")]


def made(name, geometry, **parameters):
    """A plan of any recipe; one that asks for a calibration gets random numbers."""
    asked = demand(name, geometry, **parameters)
    profile = None if asked is None else synthetic_profile(asked, geometry, LAYOUT)
    return recipe(name, geometry, profile, **parameters)


@pytest.fixture(scope="module")
def plans():
    """In small blocks, but where the method ties them to its tiles."""
    blocks = {name: {} if name == "sta" else {"block": BLOCK} for name in FRAMES}
    return {name: made(name, tiny_geometry(), **blocks[name]) for name in FRAMES}


@pytest.fixture(scope="module")
def ran(plans):
    """Every recipe after one run on the tiny model: the model and its last output."""
    done = {}
    for name, plan in plans.items():
        model = accel.enable(tiny_denoiser(), plan, strict=True, guard=False)
        for step in range(STEPS):
            out = call(model, step, STEPS, **inputs(grid=GRID, seed=step))
        done[name] = model, out
    return done


@pytest.mark.parametrize("name", FRAMES)
class TestContract:
    def test_it_makes_a_plan_that_checks_and_round_trips(self, name, plans, tmp_path):
        plan = plans[name]
        assert plan.check(tiny_geometry()) is plan
        assert Plan.load(plan.save(tmp_path / "plan.json")) == plan
        assert plan.name == plan.provenance["recipe"] == name

    def test_defaults_make_a_plan_for_a_geometry_without_a_layout(self, name):
        plan = made(name, Geometry("M", (Site("a", 2, 64), Site("b", 2, 64))))
        assert (plan.grid, plan.n_sites, plan.head_dim) == (None, 2, 64)
        plan = made(name, Geometry("M", (Site("a", 2, 64), Site("b", 2, 64)), LAYOUT))
        assert plan.grid == GRID

    def test_it_runs(self, name, ran):
        model, out = ran[name]
        assert out.isfinite().all()
        assert accel.summary(model).notices == {}


def smooth_call(grid, heads=2, dim=64):
    """q, k and v of slow waves over the grid: blocks are much alike and attention is near."""
    generator = torch.Generator().manual_seed(0)
    layout = Layout.of(grid)
    waves = torch.randn(3, dim // 2, generator=generator) * 2
    turn = layout.coordinates() / torch.tensor(grid) @ waves
    noise = torch.randn(3, 1, heads, layout.length, dim, generator=generator)
    q = torch.cat([turn.sin(), turn.cos()], 1) * 2.5
    return layout, q + noise[0] * 0.3, q + noise[1] * 0.3, noise[2]


@pytest.mark.parametrize("name", SPARSE)
class TestSparseContract:
    @pytest.mark.parametrize("grid", [(17, 16, 16), (21, 30, 52)], ids=["sample", "wan-480p"])
    def test_defaults_leave_blocks_out_at_real_sizes(self, name, grid):
        """A mask that keeps every block is dense attention that takes longer."""
        plan = recipe(name, Geometry("M", (Site("a", 2, 64), Site("b", 2, 64))))
        for bands in plan.sites.values():
            for heads in bands:
                keeps = {keep_of_choice(choice, Layout.of(grid), plan.block) for choice in heads}
                if None not in keeps:
                    assert max(keeps) < 0.7
                elif grid[0] == 17:  # only the call can tell, and large ones take long
                    layout, q, k, v = smooth_call(grid)
                    found = site_mask(heads, q, k, v, layout=layout, block=plan.block, lse={})
                    assert found.keep < 0.65

    def test_it_begins_dense(self, name, plans):
        schedule = plans[name].schedule
        dense = [schedule.phase(step, 50).dense for step in range(50)]
        assert dense == [step < DENSE_STEPS.get(name, 10) for step in range(50)]

    def test_it_says_what_was_asked(self, name, ran):
        model, _ = ran[name]
        rows = [r for r in accel.summary(model).rows if r.kernels != ("dense",)]
        assert {r.site for r in rows} == set(session_of(model).plan.sites)
        for row in rows:
            assert 0 < row.worst_recall <= row.recall <= 1 + 1e-5
            if name in ASKED:
                # whole blocks of the 8 in a row
                assert ASKED[name] <= row.keep <= ASKED[name] + 1 / 8
            else:
                assert 0 < row.keep <= 1

    def test_a_smaller_share_of_dense_steps_is_taken(self, name):
        plan = recipe(name, tiny_geometry(), dense_start=0.0)
        assert not plan.schedule.phase(0, 50).dense


@pytest.mark.parametrize(("name", "error"), [("full", 1e-5), ("half", 3e-3)])
def test_dense_recipes_leave_nothing_out(ran, name, error):
    model, out = ran[name]
    rows = accel.summary(model).rows
    assert {(r.site, r.phase, r.calls, r.keep) for r in rows} == {
        (f"blocks.{i}.attn1", "dense", STEPS, 1.0) for i in range(2)
    }
    kernel = resolve_backend("auto", out.device)
    assert {r.kernels for r in rows} == {(kernel if name == "full" else f"{kernel} half",)}
    dense = call(tiny_denoiser(), STEPS - 1, STEPS, **inputs(grid=GRID, seed=STEPS - 1))
    assert torch.allclose(out, dense, atol=error)


def keep_of(model, site="blocks.1.attn1"):
    """The block mask that the last step used, per head."""
    run = session_of(model).run
    masks = [m for (owner, *_), m in run.masks.items() if owner in (None, (site, ""))]
    assert len(masks) == 1
    return masks[0], masks[0].mask.to_dense()


def test_sparsed_takes_the_heaviest_blocks_the_same_number_in_every_row():
    model, seen = tiny_denoiser(), {}

    def observe(site, run, q, k, v, out):
        seen[site.name] = q, k
        return out

    # masks are found in the first sparse step, from its own queries and keys
    accel.enable(model, recipe("sparsed", tiny_geometry(), dense_start=0.0, block=BLOCK))
    call(model, 0, **inputs(grid=GRID))
    _, keep = keep_of(model, "blocks.0.attn1")
    accel.enable(model, recipe("sparsed", tiny_geometry(), dense_start=1.0, block=BLOCK))
    session_of(model).observer = observe
    call(model, 0, **inputs(grid=GRID))
    mass, _ = block_mass_reference(*seen["blocks.0.attn1"], block=BLOCK)
    assert keep.sum(-1).unique().tolist() == [3]
    lightest_kept = mass.masked_fill(~keep, torch.inf).amin(-1)
    heaviest_left = mass.masked_fill(keep, -torch.inf).amax(-1)
    assert (lightest_kept >= heaviest_left - 1e-6).all()


def test_adaspa_looks_twice_and_keeps_what_was_asked_in_the_mean(ran, plans):
    model, _ = ran["adaspa"]
    records = session_of(model).records
    assert {len(r.recall) for r in records.values() if r.recall} == {2}
    assert plans["adaspa"].schedule.refresh == (0.6,)
    _, keep = keep_of(model)
    # ceil(0.2 * 8) of 8 blocks, in the mean over heads
    assert keep.float().mean().item() == pytest.approx(2 / 8)


def test_radial_keeps_more_of_nearer_frames():
    frames, height, width = 17, 4, 8
    plan = recipe("radial", tiny_geometry(), decay=1.0)
    choice = plan.choices("blocks.1.attn1", 0)[0]
    tokens = choice.select.mask(Blocking(Layout.of((frames, height, width)), "thw", (1, 1)))
    by_frame = tokens.view(frames, height * width, frames, height * width).float().mean((1, 3))
    # the first frame is a sink: leave its column out
    shares = [by_frame[1:, 1:].diagonal(-r).mean().item() for r in range(frames - 1)]
    assert shares[0] == shares[1] == 1.0
    assert shares == sorted(shares, reverse=True)
    assert shares[2] > shares[4] > shares[8] > 0
    assert (by_frame[:, 0] == 1).all()


@pytest.mark.parametrize("name", ["radial", "pisa", "svg", "sol_attn", "svg_ear"])
def test_the_first_site_is_dense(ran, name):
    assert accel.summary(ran[name][0]).left == ("blocks.0.attn1",)


@pytest.mark.parametrize("name", ["radial", "pisa", "svg", "sol_attn", "svg_ear"])
@pytest.mark.parametrize("count", [2, -1])
def test_more_dense_sites_than_there_are_is_an_error(name, count):
    with pytest.raises(accel.PlanError, match=f"dense_sites is {count}; the model has 2 sites"):
        recipe(name, tiny_geometry(), dense_sites=count)
    assert set(recipe(name, tiny_geometry(), dense_sites=0).sites) == {
        "blocks.0.attn1",
        "blocks.1.attn1",
    }


def test_window_is_the_window():
    plan = recipe("window", tiny_geometry(), t=1, h=1, w=2, sink_frames=0, order="thw", block=BLOCK)
    model = accel.enable(tiny_denoiser(), plan, guard=False)
    call(model, 5, **inputs(grid=GRID))
    _, keep = keep_of(model)
    place = LAYOUT.coordinates()
    near = ((place[:, None] - place[None]).abs() <= torch.tensor([1, 1, 2])).all(-1)
    rows, columns = (torch.arange(LAYOUT.length) // size for size in BLOCK)
    expected = torch.zeros(keep.shape[-2:], dtype=torch.bool)
    i, j = near.nonzero().T
    expected[rows[i], columns[j]] = True
    assert (keep == expected).all()


def test_window_has_a_sink_where_one_is_asked_for():
    choices = [
        recipe("window", tiny_geometry(), **asked).choices("blocks.0.attn1", 0)[0]
        for asked in ({}, {"t": 2, "order": "thw", "sink_frames": 1})
    ]
    assert choices[0] == Choice(Window(t=None, h=0.2, w=0.2), order="hwt")
    assert "first_frames(n=1)" in choices[1].name


def test_pisa_stands_in_for_the_rest(ran):
    model, _ = ran["pisa"]
    chosen, keep = keep_of(model)
    assert chosen.rest == "taylor"
    assert chosen.order is not None
    # ceil(0.15 * 8) blocks in every row
    assert keep.sum(-1).unique().tolist() == [2]
    assert {len(r.recall) for r in session_of(model).records.values() if r.recall} == {4}


def test_a_recipe_has_one_name():
    from accel.recipes.registry import published

    with pytest.raises(ValueError, match="there is a recipe 'sparsed' already"):
        published(RECIPES["sparsed"].plan)
