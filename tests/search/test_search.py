"""A whole search on a tiny random pipeline: its files, its plan, its resumption."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_wan import CALL

from accel.cost import KEEPS, CostTable
from accel.errors import AccelError
from accel.pipelines import pricing
from accel.pipelines.host import ModelConfig
from accel.plan import Plan
from accel.schedule import Schedule
from accel.search import run as search_run
from accel.search import sensitivity
from accel.search.picture import draw_front
from accel.search.run import Search, SearchSettings, candidates_of, describe

SPACE = {
    "groups": [
        {
            "select": [{"kind": "block_mass", "keep": 0.2}, {"kind": "block_mass", "keep": 0.5}],
            "orders": ["thw", "tile(2,2,2)"],
            "rests": ["drop", "mean"],
        },
        {
            "select": [{"kind": "window", "t": 1, "h": 2, "w": 2}],
            "orders": ["thw"],
            "rests": ["drop"],
        },
    ]
}


@pytest.fixture(scope="module")
def model(tiny_wan_path):
    return ModelConfig(
        name="tiny-wan",
        pipeline="diffusers.WanPipeline",
        path=str(tiny_wan_path),
        call=CALL,
        prompts=("a two moving right",),
        calibration=("a seven moving left", "a one moving right"),
    )


@pytest.fixture(scope="module", autouse=True)
def prices():
    """Prices that do not depend on how busy the machine is: by what a head keeps."""

    def measure(shape, *, estimators, **_):
        by_keep = tuple(0.05 + 0.8 * keep for keep in KEEPS)
        names = ("drop/natural", "drop/ordered", "mean/natural", "mean/ordered")
        select = {e.work: 0.1 for e in estimators}
        own = {"full": 0.9, "half": 0.85}
        return CostTable(shape, 1.0, dict.fromkeys(names, by_keep), select, own)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pricing, "measure", measure)
        yield


def settings(**changes) -> SearchSettings:
    values = {
        "space": SPACE,
        "budget": 0.9,
        "schedule": Schedule(dense_start=0.25, bands=(0.5,)),
        "block": (32, 32),
        "rows": 16,
        "cost_rounds": 1,
    }
    return SearchSettings(**{**values, **changes})


@pytest.fixture(scope="module")
def done(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    plan, points = Search(model, settings(), folder).run()
    return SimpleNamespace(folder=folder, plan=plan, points=points)


def test_the_plan_fits_the_model_and_says_how_it_was_made(done, model):
    assert set(done.plan.sites) == {"blocks.0.attn1", "blocks.1.attn1"}
    assert done.plan.grid == (5, 8, 12)
    assert done.plan.provenance["calibration"] == list(model.calibration)
    assert done.plan.expected["speedup"] > 0
    assert 0 < done.plan.expected["psnr"] <= 100
    assert "measured_psnr" in done.plan.expected
    assert Plan.from_dict(done.plan.to_dict()) == done.plan
    assert len(done.plan.provenance["weights"]) == 8
    assert len(list(describe(done.plan, done.points, 1.0))) == 3


def test_a_budget_that_no_plan_meets_is_told(done):
    told = list(describe(done.plan, done.points, 0.01))
    assert any("the budget of 0.01 is not reached" in line for line in told)


def test_a_plan_that_leaves_everything_dense_is_written_too(model, tmp_path, monkeypatch):
    """Its videos are those of dense, bit for bit: their PSNR is no number that a file can hold."""

    def expensive(shape, *, estimators, **_):
        names = ("drop/natural", "drop/ordered", "mean/natural", "mean/ordered")
        select, own = {e.work: 1.0 for e in estimators}, {"full": 1.5, "half": 1.5}
        return CostTable(shape, 1.0, dict.fromkeys(names, (1.5,) * len(KEEPS)), select, own)

    monkeypatch.setattr(pricing, "measure", expensive)
    plan, _ = Search(replace(model, calibration=model.calibration[:1]), settings(), tmp_path).run()
    assert plan.expected["measured_psnr"] == 100
    assert Plan.load(plan.save(tmp_path / "plan.json")) == plan


def test_weights_are_told_apart_by_their_fingerprint():
    one, other = torch.nn.Linear(3, 4), torch.nn.Linear(3, 4)
    assert search_run.fingerprint(one) == search_run.fingerprint(one)
    assert search_run.fingerprint(one) != search_run.fingerprint(other)


def test_a_band_without_steps_is_refused_before_anything_is_measured(model, tmp_path):
    wanted = settings(schedule=Schedule(dense_start=0.75, bands=(0.6,)))
    with pytest.raises(AccelError, match="band 0 of the schedule holds none of the 4 steps"):
        Search(model, wanted, tmp_path)


def test_the_folder_has_the_front_and_its_picture(done):
    front = json.loads((done.folder / "front.json").read_text())
    assert [p["time"] for p in front] == [p.time for p in done.points]
    assert (done.folder / "front.png").read_bytes().startswith(b"\x89PNG")


def test_a_front_without_a_faster_plan_is_drawn_too(done):
    dense = done.points[:1]
    path = draw_front(dense, done.plan, done.folder / "dense.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_another_budget_reuses_the_calibration(done, model, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the calibration was made again")

    monkeypatch.setattr(search_run.Calibrator, "__call__", refuse)
    monkeypatch.setattr(search_run.Host, "generate", refuse)
    plan, points = Search(model, settings(budget=0.2, validate=False), done.folder).run()
    assert [p.time for p in points] == [p.time for p in done.points]
    assert plan.expected["speedup"] >= done.plan.expected["speedup"]


def test_a_killed_calibration_goes_on_with_the_next_prompt(model, tmp_path, monkeypatch):
    begun = []
    begin = search_run.Calibrator.begin

    def killed_in_the_second(self):
        begun.append(None)
        if len(begun) == 2:
            raise KeyboardInterrupt
        begin(self)

    monkeypatch.setattr(search_run.Calibrator, "begin", killed_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        Search(model, settings(validate=False), tmp_path).run()
    Search(model, settings(validate=False), tmp_path).run()
    assert len(begun) == 3  # prompt one; killed; prompt two


def test_a_killed_probe_goes_on_with_the_next_band(model, tmp_path, monkeypatch):
    quality = iter([12.5, KeyboardInterrupt])

    def killed_in_the_second(video, dense):
        found = next(quality)
        if found is KeyboardInterrupt:
            raise KeyboardInterrupt
        return found

    with monkeypatch.context() as patch:
        patch.setattr(sensitivity, "psnr", killed_in_the_second)
        with pytest.raises(KeyboardInterrupt):
            Search(model, settings(validate=False), tmp_path).run()
    Search(model, settings(validate=False), tmp_path).run()
    (path,) = tmp_path.glob("probes-*.json")
    known = json.loads(path.read_text())
    assert known[model.calibration[0]]["0"] == 12.5  # made before the kill, and not made again
    assert [len(bands) for bands in known.values()] == [2, 2]


def test_sensitivity_is_the_error_of_the_mean_psnr_over_harm():
    assert sensitivity.sensitivity([20.0, 40.0], 0.5) == pytest.approx(2e-3)
    assert sensitivity.sensitivity([100.0], 0.0) == pytest.approx(1.0)
    assert sensitivity.predicted_psnr(1e-3) == pytest.approx(30.0)
    assert sensitivity.predicted_psnr(0.0) == 100.0


def test_other_weights_are_calibrated_anew(done, model, monkeypatch):
    monkeypatch.setattr(search_run, "fingerprint", lambda model: "other")
    other = Search(model, settings(), done.folder)
    monkeypatch.undo()
    assert other.digest != Search(model, settings(), done.folder).digest


@pytest.mark.parametrize("other", ["device_name", "versions", "code_digest"])
def test_what_another_device_or_code_measured_is_not_taken_over(done, model, monkeypatch, other):
    known = Search(model, settings(), done.folder).digest
    monkeypatch.setattr(search_run, other, lambda *_: "another")
    assert Search(model, settings(), done.folder).digest != known


def test_an_estimator_that_cannot_use_the_block_is_refused_at_once(model, tmp_path):
    select = {"kind": "antidiagonal", "keep": 0.5, "stride": 64}
    group = {"select": [select], "orders": ["thw"], "rests": ["drop"]}
    with pytest.raises(AccelError, match="stride"):
        Search(model, settings(space={"groups": [group]}), tmp_path)


@pytest.mark.parametrize("budget", [0.0, -1.0, 1.5])
def test_a_budget_outside_its_range_is_refused(budget):
    with pytest.raises(AccelError, match=r"budget\.time is"):
        settings(budget=budget)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"groups": []}, "no candidate"),
        ({"groups": [{"select": [], "orders": ["thw"]}]}, "lacks rests"),
        (
            {"groups": [{"select": [{"kind": "windw"}], "orders": ["thw"], "rests": ["drop"]}]},
            "did you mean 'window'",
        ),
    ],
    ids=["empty", "incomplete", "misspelt"],
)
def test_a_space_that_cannot_be_searched_is_refused(space, message):
    with pytest.raises(AccelError, match=message):
        candidates_of(space)
