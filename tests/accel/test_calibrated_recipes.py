"""What makes each calibrated recipe the method it is, on profiles without a model."""

import copy
from math import prod

import pytest
import torch
from profiles import synthetic_profile

from accel.blocking import Blocking
from accel.choice import DENSE, Choice
from accel.errors import PlanError
from accel.geometry import Geometry, Site
from accel.layout import Layout
from accel.order import AXIS_ORDERS
from accel.pattern import Band, Share, Skip, Stripe
from accel.plan import Plan
from accel.recipes import RECIPES, demand, recipe
from accel.recipes.choosing import even_bands

GRID = (9, 12, 15)
LAYOUT = Layout.of(GRID)
GEOMETRY = Geometry("M", (Site("a", 3, 64), Site("b", 5, 64)), LAYOUT)
CALIBRATED = sorted(name for name, found in RECIPES.items() if found.demand is not None)


def profile_of(name, seed=0, **parameters):
    return synthetic_profile(demand(name, GEOMETRY, **parameters), GEOMETRY, LAYOUT, seed)


def set_all(profile, name, rows):
    """One value for every row of a table, the same for all heads, sites and bands."""
    for key, values in getattr(profile, name).items():
        getattr(profile, name)[key] = torch.tensor(rows)[:, None].expand_as(values).clone()


class TestAll:
    @pytest.mark.parametrize("name", CALIBRATED)
    def test_a_plan_checks_and_round_trips(self, name, tmp_path):
        plan = recipe(name, GEOMETRY, profile_of(name))
        assert plan.check(GEOMETRY) is plan
        assert Plan.load(plan.save(tmp_path / "plan.json")) == plan
        assert plan.name == plan.provenance["recipe"] == name

    @pytest.mark.parametrize("name", CALIBRATED)
    def test_without_a_profile_it_says_how_to_get_one(self, name):
        with pytest.raises(PlanError, match=f"accel-search recipe={name}"):
            recipe(name, GEOMETRY)

    @pytest.mark.parametrize("name", CALIBRATED)
    def test_parameters_that_it_does_not_have_are_refused(self, name):
        with pytest.raises(PlanError, match="densty"):
            demand(name, GEOMETRY, densty=0.3)

    def test_there_are_five(self):
        assert {"ditfastattn", "haste", "paro", "sparse_vdit", "sta"} <= set(CALIBRATED)

    def test_a_profile_of_something_else_is_refused(self):
        with pytest.raises(PlanError, match="other candidates"):
            recipe("sparse_vdit", GEOMETRY, profile_of("sparse_vdit"), width=0.3)
        with pytest.raises(PlanError, match=r"bands \[0, 1, 2, 3, 4\] of 'a', .* asks for 3"):
            recipe("sta", GEOMETRY, profile_of("sta"), bands=3)

    @pytest.mark.parametrize(
        ("name", "parameters", "message"),
        [
            ("haste", {"block": (64, 64)}, r"block \[128, 64\], the recipe asks for \[64, 64\]"),
            ("haste", {"dense_start": 0.5}, r"schedule \{'dense_start': 0.1, .* asks for \{'den"),
            ("sta", {"dense_start": 0.3}, "schedule"),
            ("paro", {"weight": 0.1}, "mass"),
        ],
    )
    def test_a_profile_of_other_blocks_or_steps_is_refused(self, name, parameters, message):
        with pytest.raises(PlanError, match=message):
            recipe(name, GEOMETRY, profile_of(name), **parameters)

    def test_a_profile_that_does_not_say_what_it_is_of_is_refused(self):
        unsaid = copy.copy(profile_of("haste"))
        unsaid.asked = {}
        with pytest.raises(PlanError, match="does not say for which block it was"):
            recipe("haste", GEOMETRY, unsaid)

    def test_bands_are_equal_parts_behind_the_dense_start(self):
        assert even_bands(4, 0.2) == pytest.approx((0.4, 0.6, 0.8))
        assert even_bands(1) == ()
        with pytest.raises(PlanError, match="bands is a number of step bands"):
            demand("sta", GEOMETRY, bands=0)


class TestSparseVDiT:
    def test_the_modes_are_its_five(self):
        asked = demand("sparse_vdit", GEOMETRY, width=0.1, stripe_every=4)
        assert asked.candidates == (
            Choice(Skip()),
            Choice(Band(0.1)),
            Choice(Band(0.1), order="hwt"),
            Choice(Stripe(axis="t", every=4)),
        )
        assert asked.tolerance == 0  # it looks at a dense run

    @pytest.mark.parametrize(
        ("errors", "keeps", "weight", "chosen"),
        [
            # in units of 0.02 and times the heads of a site, 3 and 5
            ((0.1, 0.001, 0.002, 0.003), (0.0, 0.2, 0.2, 0.2), 0.5, (1, 1)),
            # what is computed costs: skip is taken for less than another's blocks
            ((0.0015, 0.001, 0.002, 0.003), (0.0, 0.9, 0.9, 0.9), 0.5, (0, 0)),
            ((0.0015, 0.001, 0.002, 0.003), (0.0, 0.9, 0.9, 0.9), 0.0, (1, 1)),
            # above epsilon: of 5 heads, each may do less harm
            ((0.1, 0.1, 0.1, 0.005), (0.0, 0.2, 0.2, 0.2), 0.5, (3, None)),
        ],
    )
    def test_the_least_of_error_and_cost_below_epsilon(self, errors, keeps, weight, chosen):
        profile = profile_of("sparse_vdit")
        set_all(profile, "errors", errors)
        set_all(profile, "keeps", keeps)
        plan = recipe("sparse_vdit", GEOMETRY, profile, weight=weight)
        for site, index in zip(("a", "b"), chosen, strict=True):
            wanted = DENSE if index is None else profile.candidates[index]
            assert {c for heads in plan.sites[site] for c in heads} == {wanted}

    def test_heads_sites_and_bands_are_decided_apart(self):
        profile = profile_of("sparse_vdit")
        for key in profile.errors:
            profile.errors[key].fill_(1.0)
            profile.keeps[key].zero_()
        profile.errors["a", 2][1, 0] = profile.errors["b", 4][2, 3] = 0.0
        plan = recipe("sparse_vdit", GEOMETRY, profile)
        sparse = {
            (site, band, head): choice
            for site, bands in plan.sites.items()
            for band, heads in enumerate(bands)
            for head, choice in enumerate(heads)
            if choice != DENSE
        }
        assert sparse == {("a", 2, 0): profile.candidates[1], ("b", 4, 3): profile.candidates[2]}


class TestSta:
    def test_windows_are_whole_tiles_of_similar_volume(self):
        asked = demand("sta", GEOMETRY)
        keeps = []
        for choice in asked.candidates:
            assert choice.order == "tile(4,4,4)"
            assert asked.block == (64, 64)
            grid = Layout.of((12, 24, 40))  # 3 x 6 x 10 tiles, as of the published windows
            mask = choice.select.mask(Blocking(grid, choice.order, asked.block))
            keeps.append(mask.sum(1).unique().tolist())
        assert keeps == [[30], [35], [27], [30], [30], [18]]

    def test_each_head_takes_the_window_of_least_error(self):
        profile = profile_of("sta")
        plan = recipe("sta", GEOMETRY, profile)
        for (site, band), errors in profile.head_errors.items():
            best = [profile.candidates[i] for i in errors.argmin(0)]
            assert list(plan.choices(site, band)) == best
        assert [plan.schedule.phase(step, 50).dense for step in range(50)].index(False) == 12

    def test_other_tiles_make_other_blocks(self):
        asked = demand("sta", GEOMETRY, tile=(3, 4, 5), windows=((1, 2, 3),))
        assert asked.block == (prod((3, 4, 5)),) * 2
        assert asked.candidates[0].select.tile == (3, 4, 5)


class TestDiTFastAttn:
    def test_candidates_are_arrows_in_two_orders_and_shared_outputs(self):
        asked = demand("ditfastattn", GEOMETRY, parts=(8, 16, 32), delta=0.3)
        assert [c.select for c in asked.candidates[:3]] == [
            Band(1 / 16),
            Band(1 / 32),
            Band(1 / 64),
        ]
        assert [c.order for c in asked.candidates[3:6]] == ["hwt"] * 3
        assert [c.select for c in asked.candidates[6:]] == [Share("step"), Share("branch")]
        assert asked.tolerance == pytest.approx(0.1)  # it goes on with what it found

    @pytest.mark.parametrize("delta", [0.1, 0.4, 1.0])
    def test_the_errors_of_a_layer_and_of_a_head_are_limited(self, delta):
        profile = profile_of("ditfastattn")
        for key in profile.head_errors:
            profile.head_errors[key] *= 0.5
        plan = recipe("ditfastattn", GEOMETRY, profile, delta=delta)
        some = 0
        for (site, band), errors in profile.head_errors.items():
            chosen = plan.choices(site, band)
            spent = [
                float(errors[profile.candidates.index(c), h])
                for h, c in enumerate(chosen)
                if c != DENSE
            ]
            assert sum(spent) <= delta * (1 + 1e-6)
            assert all(error < 1.5 * delta / len(chosen) for error in spent)
            some += len(spent)
        assert some

    def test_the_limit_goes_where_it_saves_most(self):
        """One head may share its output, or two may have a window: together these save more."""
        profile = profile_of("ditfastattn")
        for key in profile.head_errors:
            profile.head_errors[key].fill_(1.0)
            profile.keeps[key].fill_(0.0)
        errors, keeps = profile.head_errors["a", 3], profile.keeps["a", 3]
        errors[6, 0] = 0.09
        errors[0, 1] = errors[0, 2] = 0.05
        keeps[0, 1:] = 0.4
        plan = recipe("ditfastattn", GEOMETRY, profile, delta=0.1, cap=3.0)
        arrow = profile.candidates[0]
        assert plan.choices("a", 3) == (DENSE, arrow, arrow)
        assert {c for heads in plan.sites["b"] for c in heads} == {DENSE}

    def test_the_first_step_alone_is_dense(self):
        schedule = recipe("ditfastattn", GEOMETRY, profile_of("ditfastattn")).schedule
        for steps in (20, 30, 50):
            assert [schedule.phase(s, steps).dense for s in range(steps)] == [True] + [False] * (
                steps - 1
            )


class TestHaste:
    def test_one_budget_serves_all_heads(self):
        profile = profile_of("haste")
        set_all(profile, "keeps", (0.2, 0.4, 0.6))
        set_all(profile, "errors", (0.3, 0.2, 0.1))
        # two heads of eight for which the tau matters, in one site
        for band in range(4):
            profile.errors["b", band][:, 1] = torch.tensor([9.0, 2.0, 1.0])
            profile.errors["b", band][:, 4] = torch.tensor([9.0, 8.0, 1.0])
        plan = recipe("haste", GEOMETRY, profile, keep=(6 * 0.2 + 2 * 0.6) / 8)
        taus = [c.select.tau for site in ("a", "b") for c in plan.choices(site, 0)]
        assert taus == [0.85, 0.85, 0.85, 0.85, 0.95, 0.85, 0.85, 0.95]

    def test_the_default_budget_is_what_the_middle_tau_keeps(self):
        profile = profile_of("haste", seed=3)
        plan = recipe("haste", GEOMETRY, profile)
        middle, spent = [], []
        for site in ("a", "b"):
            keeps = torch.stack([profile.keeps[site, band] for band in range(4)]).mean(0)
            middle += keeps[1].tolist()
            chosen = plan.choices(site, 0)
            spent += [float(keeps[profile.candidates.index(c), h]) for h, c in enumerate(chosen)]
        assert plan.provenance["keep"] == pytest.approx(sum(middle) / 8)
        assert sum(spent) <= sum(middle) * (1 + 1e-6)

    def test_masks_live_until_they_drift_and_one_choice_holds_for_the_run(self):
        plan = recipe("haste", GEOMETRY, profile_of("haste"), drift=0.3)
        assert (plan.schedule.drift, plan.schedule.n_bands) == (0.3, 1)
        assert [plan.schedule.phase(step, 50).dense for step in range(50)].index(False) == 5

    def test_a_budget_below_the_sparsest_is_refused(self):
        profile = profile_of("haste")
        set_all(profile, "keeps", (0.2, 0.4, 0.6))
        with pytest.raises(PlanError, match="cannot be met"):
            recipe("haste", GEOMETRY, profile, keep=0.1)


class TestParo:
    def test_it_looks_at_six_orders_and_asks_for_mass(self):
        asked = demand("paro", GEOMETRY, weight=0.3)
        assert (asked.orders, asked.mass, asked.block) == (AXIS_ORDERS, 0.3, (64, 64))
        assert asked.candidates == ()

    @pytest.mark.parametrize("density", [0.2, 0.5])
    def test_masks_are_the_heaviest_blocks_in_the_order_of_the_head(self, density):
        profile = profile_of("paro")
        profile.mass_orders["a"] = ("twh", "thw", "wht")
        plan = recipe("paro", GEOMETRY, profile, density=density)
        for band in range(2):
            chosen = plan.choices("a", band)
            assert [c.order for c in chosen] == ["twh", "thw", "wht"]
            for choice, mass in zip(chosen, profile.masses["a", band], strict=True):
                keep = choice.select.mask(Blocking(LAYOUT, choice.order, (64, 64)))
                best = torch.zeros_like(keep)
                best[range(len(mass)), mass.argmax(1)] = True
                count = -(-mass.numel() * density // 1)
                assert count <= keep.sum() <= count + len(mass)
                assert keep[best].all()
                lightest = mass[keep & ~best].min()
                assert (mass[~keep] <= lightest).all()
        assert plan.sites["a"][0] != plan.sites["a"][1]

    def test_eight_bits_are_an_option(self):
        profile = profile_of("paro")
        assert recipe("paro", GEOMETRY, profile).precision == "full"
        assert recipe("paro", GEOMETRY, profile, precision="int8").precision == "int8"

    @pytest.mark.parametrize(
        ("name", "value"), [("density", 0.0), ("density", 2.0), ("weight", 1.5)]
    )
    def test_shares_outside_their_range_are_refused(self, name, value):
        with pytest.raises(PlanError, match=f"{name} is a"):
            recipe("paro", GEOMETRY, profile_of("paro"), **{name: value})
