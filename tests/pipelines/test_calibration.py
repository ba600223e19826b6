"""Calibrations of a tiny pipeline: their files, their resumption, and plans made from them."""

import json
import logging

import pytest
import torch
from tiny_wan import CALL

from accel.choice import Choice
from accel.errors import AccelError
from accel.order import AXIS_ORDERS
from accel.pattern import Window
from accel.pipelines import calibration
from accel.pipelines.calibration import calibrate, calibrated_recipe, fingerprint
from accel.pipelines.enable import enabled
from accel.pipelines.host import Host, ModelConfig
from accel.plan import Plan
from accel.profile import Profile
from accel.recipes import Demand
from accel.schedule import Schedule

GRID = (5, 8, 12)
SITES = ["blocks.0.attn1", "blocks.1.attn1"]
PROMPTS = ("a seven moving left", "a one moving right")
ASKED = Demand(
    candidates=(Choice(Window(1, 2, 2)), Choice(Window(1, 2, 2), order="hwt", rest="mean")),
    schedule=Schedule(dense_start=0.25, bands=(0.5,)),
    block=(32, 32),
    orders=("thw", "wht"),
    mass=0.5,
    tolerance=0.1,
)


@pytest.fixture(scope="module")
def host(tiny_wan_path):
    config = ModelConfig(
        name="tiny-wan",
        pipeline="diffusers.WanPipeline",
        path=str(tiny_wan_path),
        call=CALL,
        prompts=("a two moving right",),
        calibration=PROMPTS,
        device="cpu",
    )
    return Host(config)


@pytest.fixture(scope="module")
def done(host, tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibration")
    return folder, calibrate(host, ASKED, folder, rows=16)


@pytest.fixture
def generations(host, monkeypatch):
    """The prompts that are generated."""
    made, generate = [], Host.generate

    def spy(self, prompt, seed, **overrides):
        made.append(prompt)
        return generate(self, prompt, seed, **overrides)

    monkeypatch.setattr(Host, "generate", spy)
    return made


def same(one: Profile, other: Profile) -> bool:
    tables = ("errors", "head_errors", "recalls", "keeps", "sparsities", "incoherences", "masses")
    return all(
        getattr(one, name).keys() == getattr(other, name).keys()
        and all(torch.equal(x, getattr(other, name)[key]) for key, x in getattr(one, name).items())
        for name in tables
    )


def test_it_sees_every_site_and_band_and_says_of_what(done, host):
    _, profile = done
    keys = {(site, band) for site in SITES for band in range(2)}
    assert set(profile.errors) == set(profile.sparsities) == set(profile.masses) == keys
    # two prompts, two branches; band 0 is one step of 4, band 1 two
    assert {profile.counts[key] for key in keys if key[1] == 0} == {4}
    assert {profile.mass_counts[key] for key in keys if key[1] == 1} == {8}
    assert profile.layout.grid == GRID
    assert profile.masses[SITES[0], 0].shape == (2, 15, 15)
    made = profile.provenance
    assert made["calibration"] == made["calibration_mass"] == list(PROMPTS)
    assert made["weights"] == fingerprint(host.pipe.transformer)
    assert {"device", "versions", "code", "seed", "rows", "call", "dtype"} <= set(made)


def test_one_that_is_finished_is_not_made_again(done, host, generations):
    folder, profile = done
    assert same(calibrate(host, ASKED, folder, rows=16, prices=(0.3, 0.4)), profile)
    assert generations == []


@pytest.mark.parametrize("finished", [1, 2])
def test_one_that_was_killed_goes_on_where_it_was(done, host, tmp_path, monkeypatch, finished):
    """Four generations: two for the candidates, two for the mass; one dies in its last step."""
    made, generate = [], Host.generate

    def killed(self, prompt, seed, **overrides):
        if len(made) == finished:
            raise KeyboardInterrupt
        made.append(prompt)
        return generate(self, prompt, seed, **overrides)

    monkeypatch.setattr(Host, "generate", killed)
    with pytest.raises(KeyboardInterrupt):
        calibrate(host, ASKED, tmp_path, rows=16)
    made.clear()
    monkeypatch.setattr(Host, "generate", lambda *a, **k: made.append(a[1]) or generate(*a, **k))
    assert same(calibrate(host, ASKED, tmp_path, rows=16), done[1])
    assert made == [*PROMPTS, *PROMPTS][finished:]


@pytest.mark.parametrize("other", ["device_name", "versions", "code_digest", "fingerprint"])
def test_what_something_else_measured_is_measured_anew_and_told(
    done, host, tmp_path, monkeypatch, caplog, generations, other
):
    path = next(done[0].glob("*.json"))
    asked = ASKED.__class__(ASKED.candidates[:1], ASKED.schedule, ASKED.block)
    calibrate(host, asked, tmp_path, prompts=PROMPTS[:1], rows=8)
    value = {"torch": "0"} if other == "versions" else "another"
    monkeypatch.setattr(calibration, other, lambda *_: value)
    with caplog.at_level(logging.WARNING, "accel"):
        calibrate(host, asked, tmp_path, prompts=PROMPTS[:1], rows=8)
    word = {"device_name": "device", "code_digest": "code", "fingerprint": "weights"}
    assert f"was made with other {word.get(other, other)}" in caplog.text
    assert len(generations) == 2
    assert len(list(tmp_path.iterdir())) == 1
    assert path.is_file()


def test_a_file_that_is_cut_short_is_made_anew_and_told(host, tmp_path, caplog, generations):
    asked = Demand(ASKED.candidates[:1], ASKED.schedule, ASKED.block)
    calibrate(host, asked, tmp_path, prompts=PROMPTS[:1], rows=8)
    path = next(tmp_path.glob("*.json"))
    path.write_text(path.read_text()[:100])
    calibrate(host, asked, tmp_path, prompts=PROMPTS[:1], rows=8)
    assert "calibrates anew" in caplog.text
    assert len(generations) == 2
    assert json.loads(path.read_text())["provenance"]["calibration"] == [PROMPTS[0]]


def test_other_questions_have_other_files(done, host, tmp_path):
    digest = calibration._digest
    told = {"rows": 16}
    names = {
        digest(ASKED, PROMPTS, told),
        digest(ASKED, PROMPTS[:1], told),
        digest(ASKED, PROMPTS, {"rows": 8}),
        *(
            digest(ASKED.__class__(*values), PROMPTS, told)
            for values in (
                (ASKED.candidates[:1], ASKED.schedule, ASKED.block),
                (ASKED.candidates, Schedule(), ASKED.block),
                (ASKED.candidates, ASKED.schedule, (64, 32)),
                (ASKED.candidates, ASKED.schedule, ASKED.block, "half"),
            )
        ),
    }
    assert len(names) == 7


def test_a_band_without_steps_is_refused_before_anything_is_measured(host, tmp_path, generations):
    asked = Demand(ASKED.candidates, Schedule(dense_start=0.75, bands=(0.6,)), ASKED.block)
    with pytest.raises(AccelError, match="band 0 of the schedule holds none of the 4 steps"):
        calibrate(host, asked, tmp_path)
    assert generations == []


PARAMETERS = {
    "sparse_vdit": {"bands": 2, "block": (32, 16), "unit": 0.5},
    "sta": {"bands": 2, "tile": (2, 4, 4), "windows": ((1, 2, 3), (2, 1, 2))},
    "ditfastattn": {"bands": 3, "block": (32, 16), "parts": (4, 8), "delta": 0.5},
    "haste": {"dense_start": 0.0, "block": (32, 16), "stride": 4},
}


@pytest.fixture(scope="module")
def dense(host):
    return host.generate("a two moving right", 3)


def runs(host, plan, dense):
    with enabled(host.pipe, plan, strict=True, guard=False):
        video = host.generate("a two moving right", 3)
    return video.shape == dense.shape and (video != dense).any()


@pytest.mark.parametrize("name", PARAMETERS)
def test_calibrated_recipes_make_plans_that_run(name, host, dense, tmp_path, generations):
    parameters = PARAMETERS[name]
    plan = calibrated_recipe(host, name, tmp_path, prompts=PROMPTS[:1], rows=16, **parameters)
    assert (plan.name, plan.grid) == (name, GRID)
    assert plan.provenance["recipe"] == name
    assert plan.provenance["calibration"] == [PROMPTS[0]]
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    again = calibrated_recipe(host, name, tmp_path, prompts=PROMPTS[:1], rows=16, **parameters)
    assert again == plan
    assert generations == [PROMPTS[0]]
    assert runs(host, plan, dense)


def test_paro_finds_orders_first_and_then_the_mass_in_them(host, dense, tmp_path, generations):
    asked = {"prompts": PROMPTS[:1], "rows": 16, "block": (32, 16)}
    plan = calibrated_recipe(host, "paro", tmp_path, **asked)
    assert generations == [PROMPTS[0]] * 2
    profile = Profile.load(next(tmp_path.glob("*.json")))
    assert profile.orders == AXIS_ORDERS
    for site in SITES:
        for band in range(2):
            orders = tuple(c.order for c in plan.choices(site, band))
            assert orders == profile.mass_orders[site]
    assert Plan.load(plan.save(tmp_path / "plan.json")) == plan
    assert runs(host, plan, dense)


def test_a_recipe_that_needs_no_calibration_is_made_without(host, tmp_path, generations):
    plan = calibrated_recipe(host, "sparsed", tmp_path, keep=0.4)
    assert plan.provenance["keep"] == 0.4
    assert generations == []
    assert list(tmp_path.iterdir()) == []


def test_weights_are_told_apart_by_their_fingerprint():
    one, other = torch.nn.Linear(3, 4), torch.nn.Linear(3, 4)
    assert fingerprint(one) == fingerprint(one)
    assert fingerprint(one) != fingerprint(other)
