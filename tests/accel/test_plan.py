import copy
import json
import math
import os
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_denoiser import BLOCK, GRID, HEADS, SITES, tiny_denoiser, tiny_geometry, tiny_plan

from accel.choice import DENSE, Choice
from accel.errors import PlanError
from accel.estimators import AdaptiveBlockMass, Antidiagonal, BlockMassTopK, Pooled
from accel.geometry import Geometry, Site
from accel.layout import Layout
from accel.pattern import FirstFrames, Full, MultiDiagonal, Radial, Skip, Stripe, Window
from accel.pattern_union import Union
from accel.plan import DENSE_BY, Plan
from accel.plan_file import MAX_FILE_BYTES
from accel.schedule import Schedule

extents = st.none() | st.integers(0, 9) | st.sampled_from([0.1, 0.25, 0.5, 1.0])
fractions = st.floats(0.01, 1.0)
single = st.one_of(
    st.builds(Full),
    st.builds(Window, extents, extents, extents),
    st.builds(MultiDiagonal, h=extents, w=extents),
    st.builds(Stripe, axis=st.sampled_from("thw"), start=st.integers(0, 3)),
    st.builds(FirstFrames, st.integers(1, 4)),
    st.builds(Radial, st.floats(0.01, 8.0), st.booleans()),
)
patterns = st.one_of(
    single,
    st.builds(Skip),
    st.builds(lambda a, b: Union((a, b)), single, single),
)
estimators = st.one_of(
    st.builds(BlockMassTopK, fractions, st.booleans()),
    st.builds(AdaptiveBlockMass, fractions, fractions),
    st.builds(Antidiagonal, fractions, st.sampled_from([4, 8])),
    st.builds(Pooled, fractions, st.booleans()),
)
choices = st.builds(
    Choice,
    patterns | estimators,
    st.sampled_from(["thw", "hwt", "tile(2,4,4)", "hilbert"]),
    st.sampled_from(["drop", "mean"]),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(-9, 9) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def plans(draw):
    schedule = Schedule(bands=draw(st.sampled_from([(), (0.5,), (0.3, 0.8)])), refresh=(0.6,))
    names = draw(st.lists(st.text(min_size=1), min_size=1, max_size=3, unique=True))
    heads = draw(st.integers(1, 3))
    geometry = Geometry(draw(st.text()), tuple(Site(n, heads, 8) for n in names))
    bands = st.lists(choices, min_size=heads, max_size=heads).map(tuple)
    sites = {n: tuple(draw(bands) for _ in range(schedule.n_bands)) for n in names}
    return Plan.of(
        draw(st.text()),
        geometry,
        sites,
        schedule=schedule,
        dense=draw(st.sampled_from(DENSE_BY)),
        recall_floor=draw(st.none() | fractions),
        grid=draw(st.none() | st.tuples(*[st.integers(1, 99)] * 3)),
        provenance=draw(st.dictionaries(st.text(), json_values, max_size=3)),
    )


@settings(max_examples=40)
@given(plans())
def test_a_plan_survives_its_file(tmp_path_factory, plan):
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    assert Plan.load(plan.save(path)) == plan
    assert Plan.load(str(path)).digest == plan.digest


@settings(max_examples=40)
@given(plans(), st.randoms())
def test_the_digest_does_not_depend_on_the_order_of_sites(plan, random):
    names = list(plan.sites)
    random.shuffle(names)
    other = Plan.from_dict({**plan.to_dict(), **_renumbered(plan, names)})
    assert other == plan
    assert other.digest == plan.digest


def _renumbered(plan, names):
    moved = Plan(
        **{f: getattr(plan, f) for f in Plan.__dataclass_fields__ if f != "sites"},
        sites={name: plan.sites[name] for name in names},
    )
    data = moved.to_dict()
    return {"sites": data["sites"], "choices": data["choices"]}


def test_the_digest_names_what_a_plan_does():
    plan = tiny_plan(Choice(Window(t=1)))
    same = Plan.from_dict(
        {**plan.to_dict(), "name": "x", "provenance": {"a": 1}, "expected": {"speedup": 2.0}}
    )
    assert same.digest == plan.digest == "dc2aeb7d"
    for other in (
        tiny_plan(Choice(Window(t=2))),
        tiny_plan(Choice(Window(t=1), order="hwt")),
        tiny_plan(Choice(Window(t=1), rest="mean")),
        tiny_plan(Choice(Window(t=1)), block=(64, 64)),
        tiny_plan(Choice(Window(t=1)), dense="kernel"),
        tiny_plan(Choice(Window(t=1)), precision="half"),
        tiny_plan(Choice(Window(t=1)), precision={SITES[0]: "fp8"}),
        tiny_plan(Choice(Window(t=1)), schedule=Schedule(dense_start=0.5)),
        tiny_plan(Choice(Window(t=1)), schedule=Schedule(dense_start=0.0, drift=0.2)),
        tiny_plan(Choice(Window(t=1)), recall_floor=0.8),
    ):
        assert other.digest != plan.digest


def test_a_plan_says_nothing_of_what_it_does_not_use():
    data = tiny_plan(Choice(Window(t=1))).to_dict()
    assert "recall_floor" not in data
    assert "drift" not in data["schedule"]
    assert Plan.from_dict({**data, "recall_floor": None}).recall_floor is None
    assert tiny_plan(DENSE, recall_floor=0.9).to_dict()["recall_floor"] == 0.9


def test_the_file_holds_every_choice_once():
    data = tiny_plan(Choice(Window(t=1)), Choice(Window(t=2)), Choice(Window(t=1))).to_dict()
    assert len(data["choices"]) == 2
    assert data["sites"] == {site: [[0, 1, 0]] for site in SITES}


def test_choices_by_site_and_band():
    plan = tiny_plan(DENSE, Choice(Skip()), DENSE)
    assert plan.choices(SITES[0], 0) == (DENSE, Choice(Skip()), DENSE)
    assert plan.choices("blocks.9.attn1", 0) is None


def test_another_grid_drops_what_was_measured():
    plan = tiny_plan(DENSE, grid=GRID, expected={"speedup": 2.0})
    other = plan.for_grid([7, 9, 11])
    assert (other.grid, other.expected, other.sites) == ((7, 9, 11), {}, plan.sites)
    assert plan.grid == GRID
    with pytest.raises(PlanError, match=re.escape("at least 1, got (0, 3, 4)")):
        plan.for_grid((0, 3, 4))


def test_the_grid_is_that_of_the_geometry():
    geometry = Geometry("M", (Site("a", 1, 8),), Layout.of((2, 3, 4)))
    assert Plan.uniform("p", geometry, DENSE).grid == (2, 3, 4)
    assert Plan.uniform("p", geometry, DENSE, grid=None).grid is None


def test_a_failing_write_leaves_the_old_plan(tmp_path, monkeypatch):
    path = tiny_plan(DENSE).save(tmp_path / "plan.json")
    before = path.read_text()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        tiny_plan(Choice(Skip())).save(path)
    assert path.read_text() == before


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_not_finite_is_not_written(tmp_path, value):
    path = tmp_path / "plan.json"
    with pytest.raises(PlanError, match="plan 'tiny' holds a number that is not finite"):
        tiny_plan(DENSE, provenance={"psnr": value}).save(path)
    assert not path.exists()


MISFITS = {
    "class": (Geometry("FluxTransformer2DModel", ()), "model is 'WanTransformer3DModel', but"),
    "sites": ({"num_layers": 3}, "n_sites is 2, but the model has 3 sites"),
    "heads": ({"num_attention_heads": 2}, "is for 3 heads, the model has 2"),
    "head dim": ({"attention_head_dim": 16}, "head_dim is 24, the model's is 16"),
}


class TestCheck:
    def test_a_plan_that_fits_comes_back(self, pipe):
        plan = tiny_plan(DENSE)
        model = tiny_denoiser()
        assert plan.check(tiny_geometry(model)) is plan
        assert plan.check(model) is plan
        with pytest.raises(PlanError, match=r"sites\['blocks\.0\.attn1'\] is for 3 heads"):
            plan.check(pipe)

    @pytest.mark.parametrize(("change", "message"), MISFITS.values(), ids=MISFITS)
    def test_a_misfit_is_named(self, change, message):
        target = change if isinstance(change, Geometry) else tiny_denoiser(**change)
        with pytest.raises(PlanError, match=re.escape(message)):
            tiny_plan(DENSE).check(target)

    def test_a_site_that_is_not_there_is_named(self):
        data = tiny_plan(DENSE).to_dict()
        data["sites"]["blocks.1.attn2"] = data["sites"].pop("blocks.1.attn1")
        with pytest.raises(
            PlanError, match=r"'blocks\.1\.attn2', which the model does not have; did"
        ):
            Plan.from_dict(data).check(tiny_geometry())


def _edit(*path):
    """A change of a plan's dictionary: the last item of `path` is put at the place before it."""

    def change(data):
        *way, key, value = path
        for step in way:
            data = data[step]
        data[key] = value

    return change


KEEP = ("choices", 0, "select", "keep")
BAD = {
    "unknown key": (_edit("blcok", 1), "the plan has no key 'blcok'; did you mean 'block'?"),
    "unknown key in a choice": (_edit("choices", 0, "rets", "mean"), "did you mean 'rest'?"),
    "unknown key in select": (_edit("choices", 0, "select", "kep", 1), "did you mean 'keep'?"),
    "unknown key in the schedule": (_edit("schedule", "band", []), "did you mean 'bands'?"),
    "unknown kind": (_edit("choices", 0, "select", {"kind": "windw"}), "did you mean 'window'?"),
    "kind is a list": (_edit("choices", 0, "select", {"kind": []}), "select kind must be of type"),
    "no kind": (_edit("choices", 0, "select", {}), "select lacks the key 'kind'"),
    "unknown rest": (_edit("choices", 0, "rest", "taylr"), "rest 'taylr' is unknown"),
    "rest is a table": (_edit("choices", 0, "rest", {}), "choice.rest must be of type str"),
    "unknown order": (_edit("choices", 0, "order", "hwtt"), "unknown order 'hwtt'"),
    "order is a number": (_edit("choices", 0, "order", 3), "choice.order must be of type str"),
    "tile too large": (_edit("choices", 0, "order", "tile(9999999,1,1)"), "at most 1048576 along"),
    **{
        f"decay {decay}": (
            _edit("choices", 0, "select", {"kind": "radial", "decay": decay}),
            f"decay is a positive number, from 1e-6 to 1e6, got {decay}",
        )
        for decay in (1e300, 1e-300, 0, -1.0)
    },
    "name is a number": (_edit("name", 3), "name must be of type str, got 3"),
    "sites is a list": (_edit("sites", []), "sites must be of type dict, got []"),
    "no sites": (_edit("sites", {}), "plan 'tiny' names no site"),
    "n_sites is a switch": (_edit("n_sites", True), "n_sites must be of type int, got True"),
    "newer schema": (_edit("schema", 2), "the plan has schema 2, this accel reads 1; update accel"),
    "choice too large": (_edit("sites", SITES[0], [[0, 1, 0]]), "names choice 1; the plan has"),
    "choice negative": (_edit("sites", SITES[0], [[0, -1, 0]]), "names choice -1; the plan has"),
    "choice is a switch": (_edit("sites", SITES[0], [[0, False, 0]]), "names choice False"),
    "too many bands": (_edit("sites", SITES[0], [[0] * 3] * 2), "has 2 bands, the schedule has 1"),
    "no heads": (_edit("sites", SITES[0], [[]]), "does not have the same heads in every band"),
    "block of three": (_edit("block", [32, 32, 32]), "block must be two powers of two"),
    "block too small": (_edit("block", [8, 16]), "block must be two powers of two from 16"),
    "block no power": (_edit("block", [48, 64]), "block must be two powers of two"),
    "block of words": (_edit("block", ["32", 32]), "block must be two powers of two"),
    "block of lists": (_edit("block", [[32], [32]]), "block must be two powers of two"),
    "dense unknown": (_edit("dense", "kernl"), "dense 'kernl' is unknown; did you mean 'kernel'"),
    "dense a number": (_edit("dense", 1), "dense must be of type str, got 1"),
    "no floor": (_edit("recall_floor", 0), "recall_floor must be in (0, 1], got 0"),
    "floor a word": (_edit("recall_floor", "0.9"), "recall_floor must be in (0, 1], got '0.9'"),
    "precision unknown": (
        _edit("precision", "halv"),
        "precision 'halv' is unknown; did you mean 'half'",
    ),
    "precision of a site unknown": (
        _edit("precision", {SITES[0]: "int4"}),
        "precision 'int4' is unknown; did you mean 'int8'",
    ),
    "precision a number": (_edit("precision", 8), "precision must be of type dict, got 8"),
    "precision of a site a number": (
        _edit("precision", {SITES[0]: 8}),
        "precision['blocks.0.attn1'] must be of type str, got 8",
    ),
    "dense ratio a word": (
        _edit("expected", {"dense_ratio": {"full": "1"}}),
        "dense_ratio['full'] must be a number",
    ),
    "dense ratio below 0": (
        _edit("expected", {"dense_ratio": {"half": -1}}),
        "dense_ratio['half'] must be a number above 0, got -1",
    ),
    "dense ratio a number": (
        _edit("expected", {"dense_ratio": 0.9}),
        "expected.dense_ratio must be of type dict, got 0.9",
    ),
    **{
        f"{name} {value}": (
            _edit("expected", {name: value}),
            f"expected.{name} must be a number above 0, got {value}",
        )
        for name in ("speedup", "measured_speedup")
        for value in (0, -0.5)
    },
    "a negative ratio": (
        _edit("expected", {"attention_ratio": {SITES[0]: [-0.5]}}),
        "expected.attention_ratio['blocks.0.attn1'] must be numbers from 0, got [-0.5]",
    ),
    "a stride that does not divide the block": (
        _edit("choices", 0, "select", {"kind": "antidiagonal", "tau": 0.9, "stride": 12}),
        "block (32, 16) is not a multiple of the stride 12; take a stride that divides both",
    ),
    "a stride larger than the block": (
        _edit("choices", 0, "select", {"kind": "antidiagonal", "tau": 0.9, "stride": 10**9}),
        "block (32, 16) is not a multiple of the stride 1000000000",
    ),
    "a union of too many parts": (
        _edit("choices", 0, "select", {"kind": "union", "parts": [{"kind": "full"}] * 65}),
        "a union has at most 64 parts, nested ones included, got 65; leave out",
    ),
    "a union of too many unions": (
        _edit(
            *("choices", 0, "select"),
            {"kind": "union", "parts": [{"kind": "union", "parts": [{"kind": "full"}] * 9}] * 8},
        ),
        "a union has at most 64 parts, nested ones included, got 72",
    ),
    "grid of two": (_edit("grid", [4, 4]), "three whole numbers of at least 1, got [4, 4]"),
    "grid of words": (_edit("grid", ["4", 4, 4]), "a grid is (t, h, w), three whole numbers"),
    "ratios a number": (_edit("expected", {"attention_ratio": 3}), "attention_ratio must be of"),
    "ratio of a site a number": (
        _edit("expected", {"attention_ratio": {SITES[0]: 0.5}}),
        "expected.attention_ratio['blocks.0.attn1'] must be numbers from 0, got 0.5",
    ),
    "too few ratios": (
        _edit("expected", {"attention_ratio": {SITES[0]: []}}),
        "has 0 bands, the schedule has 1",
    ),
    **{
        f"keep {keep}": (_edit(*KEEP, keep), f"keep is a fraction in (0, 1], got {keep}")
        for keep in (0, -1, 1.5)
    },
    "share above 1": (
        _edit("expected", {"attention_share": 1.2}),
        "expected.attention_share must be in [0, 1], got 1.2",
    ),
    "dense ratio without a share": (
        _edit("expected", {"dense_ratio": {"full": 0.9}, "speedup": 1.2}),
        "expected.dense_ratio needs expected.attention_share",
    ),
    "keep a word": (_edit(*KEEP, "0.5"), "keep"),
}


@pytest.fixture
def data():
    return copy.deepcopy(tiny_plan(Choice(BlockMassTopK(keep=0.5))).to_dict())


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_an_edited_file_is_refused(tmp_path, data, change, message):
    change(data)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError, match=re.escape(message)) as caught:
        Plan.load(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("key", ["schema", "name", "model", "sites", "choices", "block"])
def test_a_missing_key_is_named(data, key):
    del data[key]
    with pytest.raises(PlanError, match=f"the plan lacks the key '{key}'"):
        Plan.from_dict(data)


NESTED = '{"kind": "union", "parts": [' * 400 + '{"kind": "full"}' + "]}" * 400
TEXTS = {
    "empty": ("", "is not a whole JSON file"),
    "cut short": ('{"schema": 1, "name": "ti', "it may have been cut short"),
    "not JSON": ("plan:\n  keep: 0.3\n", "is not a whole JSON file"),
    "a list": ("[]", "the plan must be a table, got list"),
    "not UTF-8": (b"\xff\xfe{}", "is not a whole JSON file"),
    "deep": ("[" * 100_000, "nested too deeply"),
    "deep table": ('{"a":' * 100_000, "nested too deeply"),
    "NaN": ('{"schema": NaN}', "NaN is not a number that a plan may hold"),
    "infinity": ('{"expected": {"speedup": -Infinity}}', "-Infinity is not a number"),
    "endless integer": ('{"schema": ' + "1" * 5000 + "}", "is too large a number for a plan"),
    "large integer": ('{"schema": 1234567890123456}', "is too large a number for a plan"),
}


@pytest.mark.parametrize(("text", "message"), TEXTS.values(), ids=TEXTS)
def test_what_is_no_plan_file(tmp_path, text, message):
    path = tmp_path / "plan.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(PlanError, match=re.escape(message)) as caught:
        Plan.load(path)
    assert len(str(caught.value)) < 1000


def test_patterns_nested_without_end_are_refused(tmp_path, data):
    data["choices"][0]["select"] = "HERE"
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data).replace('"HERE"', NESTED))
    with pytest.raises(PlanError, match="nested too deeply"):
        Plan.load(path)


def test_an_overflowing_number_is_refused(tmp_path, data):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data).replace('"keep": 0.5', '"keep": 1e999'))
    with pytest.raises(PlanError, match="keep is a fraction in"):
        Plan.load(path)


def test_a_huge_file_is_not_read(tmp_path):
    path = tmp_path / "plan.json"
    with open(path, "wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(PlanError, match=f"has {MAX_FILE_BYTES + 1} bytes; plans have at most"):
        Plan.load(path)


@pytest.mark.parametrize("name", ["", "missing.json"], ids=["directory", "missing"])
def test_what_is_no_file(tmp_path, name):
    with pytest.raises(PlanError, match="there is no plan file at"):
        Plan.load(tmp_path / name)


def test_too_many_heads_are_refused(data):
    data["sites"][SITES[0]] = [[0] * 5000]
    with pytest.raises(PlanError, match="has 5000 heads, over 4096"):
        Plan.from_dict(data)


def test_the_tags_of_choices():
    assert Choice(Full()).name == "full"
    assert Choice(Skip(), order="hwt", rest="mean").name == "skip hwt mean"
    assert Choice(BlockMassTopK(keep=0.5)).online
    assert not Choice(Window(t=1)).online
    assert DENSE.dense
    assert tiny_plan(DENSE).block == BLOCK
    assert len(tiny_plan(DENSE).choices(SITES[0], 0)) == HEADS
