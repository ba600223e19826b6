"""What a plan says of tokens: read, refused, and made by recipes."""

import json
from itertools import pairwise

import pytest

from accel.errors import PlanError
from accel.geometry import Geometry, Site
from accel.plan import Plan
from accel.recipes import recipe
from accel.token_groups import left
from accel.token_reduction import TokenReduction


def geometry(blocks=12):
    return Geometry("M", tuple(Site(f"blocks.{i}.attn", 3, 8) for i in range(blocks)))


NAMES = [s.name for s in geometry(4).sites]


class TestKeeps:
    def test_they_must_not_grow_with_depth(self):
        with pytest.raises(PlanError, match=r"blocks\.2\.attn.*is 0\.7.*'blocks\.0\.attn' leave"):
            TokenReduction({NAMES[0]: 0.6, NAMES[2]: 0.7}).check(NAMES)

    def test_one_block_merges_half_at_most(self):
        with pytest.raises(PlanError, match=r"blocks\.1\.attn.*give at least 0\.4"):
            TokenReduction({NAMES[0]: 0.8, NAMES[1]: 0.39}).check(NAMES)
        TokenReduction({NAMES[0]: 0.8, NAMES[1]: 0.4}).check(NAMES)

    def test_fusion_may_leave_any_share(self):
        TokenReduction({NAMES[0]: 0.8, NAMES[1]: 0.1}, method="fuse").check(NAMES)

    def test_the_order_is_that_of_the_blocks_not_of_the_table(self):
        TokenReduction({NAMES[3]: 0.5, NAMES[1]: 0.6}).check(NAMES)

    def test_a_plan_that_does_not_fit_is_refused_when_it_is_checked(self):
        plan = recipe("tome", geometry(4), r=20)
        data = plan.to_dict()
        data["tokens"]["keeps"]["blocks.3.attn"] = 0.99
        with pytest.raises(PlanError, match="tokens do not come back"):
            Plan.from_dict(data).check(geometry(4))


class TestLeft:
    @pytest.mark.parametrize(
        ("keep", "tokens", "halves", "expected"),
        [
            (0.5, 35, False, 18),  # 17.5, half up
            (0.5, 35, True, 18),
            (0.4, 35, True, 18),  # 35 tokens have 17 pairs
            (0.001, 35, False, 1),
            (1.0, 20, True, 20),  # never more than there are
            (0.3, 12, True, 11),
        ],
    )
    def test_rounding_and_bounds(self, keep, tokens, halves, expected):
        assert left(keep, 35, tokens, halves=halves) == expected


class TestRecipes:
    @pytest.mark.parametrize("name", ["tome", "evit"])
    def test_a_file_gives_the_same_plan(self, name):
        plan = recipe(name, geometry())
        assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
        assert not plan.wants_sparse
        plan.check(geometry())

    def test_tome_merges_13_of_196_in_each_of_12_blocks(self):
        keeps = list(recipe("tome", geometry()).tokens.keeps.values())
        counts, tokens = [], 196
        for keep in keeps:
            tokens = left(keep, 196, tokens, halves=True)
            counts.append(tokens)
        assert counts == [196 - 13 * (i + 1) for i in range(12)]

    @pytest.mark.parametrize("inflection", [-1.0, 0.5, 1.0])
    def test_tome_with_an_inflection_is_a_line_of_the_same_sum(self, inflection):
        keeps = list(recipe("tome", geometry(), r=10, inflection=inflection).tokens.keeps.values())
        merged = [a - b for a, b in zip([1.0, *keeps], keeps, strict=False)]
        assert merged[0] == pytest.approx(10 / 196 * (1 - inflection))
        assert merged[-1] == pytest.approx(10 / 196 * (1 + inflection))
        assert sum(merged) == pytest.approx(120 / 196)
        steps = [b - a for a, b in pairwise(merged)]
        assert max(steps) == pytest.approx(min(steps))

    def test_tome_halves_where_more_is_asked(self):
        keeps = list(recipe("tome", geometry(3), r=150).tokens.keeps.values())
        assert keeps == [0.5, 0.25, 0.125]

    def test_evit_keeps_powers_at_quarters_of_the_depth(self):
        keeps = recipe("evit", geometry()).tokens.keeps
        expected = {f"blocks.{3 * i}.attn": 0.7**i for i in (1, 2, 3)}
        assert keeps == pytest.approx(expected)
        named = recipe("evit", geometry(), keep=0.5, blocks=(0, 5)).tokens
        assert named.keeps == {"blocks.0.attn": 0.5, "blocks.5.attn": 0.25}
        assert (named.method, named.score, named.proportional) == ("fuse", "class", False)

    @pytest.mark.parametrize(
        ("name", "wrong", "said"),
        [
            ("tome", {"r": 0}, "above 0"),
            ("tome", {"inflection": 1.5}, "within"),
            ("tome", {"patches": 0}, "patches"),
            ("evit", {"blocks": (3, 12)}, "from 0 to 11"),
            ("evit", {"blocks": ()}, "from 0 to 11"),
            ("evit", {"keep": 1.5}, "fraction"),
        ],
    )
    def test_bad_parameters_are_named(self, name, wrong, said):
        with pytest.raises(PlanError, match=said):
            recipe(name, geometry(), **wrong)
