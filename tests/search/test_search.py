"""A whole search on a tiny random pipeline: its files, its plans, its resumption."""

import json
import logging
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
from tiny_wan import CALL

from accel.cost_table import KEEPS, CostTable, Price
from accel.errors import AccelError
from accel.pipelines import pricing
from accel.pipelines.host import Host, ModelConfig
from accel.plan import Plan
from accel.schedule import Schedule
from accel.search import prepare as search_prepare
from accel.search.finish import describe
from accel.search.run import Search
from accel.search.settings import Budget, Evolution, SearchSettings, candidates_of

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
        {"select": [{"kind": "identity"}], "orders": ["thw"], "rests": ["drop"]},
    ]
}
EVOLUTION = Evolution(trials=8, population=4, levels=8, steps=4, time_limit=0.95)


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


def priced_at(sparse: float, own: float):
    def measure(shape, *, estimators, **_):
        by_keep = tuple(Price.known(0.05 + sparse * keep) for keep in KEEPS)
        rests, orders = ("drop", "mean", "taylor"), ("natural", "ordered")
        return CostTable(
            shape,
            Price.known(1.0),
            {f"{rest}/{order}": by_keep for rest in rests for order in orders},
            {e.work: Price.known(0.1) for e in estimators},
            dict.fromkeys(("full", "half"), Price.known(own)),
        )

    return measure


@pytest.fixture(scope="module", autouse=True)
def prices():
    """Prices that do not depend on how busy the machine is: by what a head keeps."""
    measured = pricing.measure_baseline

    def baseline(*args, **kwargs):
        found = measured(*args, **kwargs)
        return replace(found, seconds=2.0, share=dict.fromkeys(found.share, 0.3), denoiser=1.8)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pricing, "measure", priced_at(0.8, 0.9))
        patch.setattr(pricing, "measure_baseline", baseline)
        yield


def settings(evolution=EVOLUTION, **changes) -> SearchSettings:
    values = {
        "space": SPACE,
        "schedule": Schedule(dense_start=0.25, bands=(0.5,)),
        "budget": Budget(time=0.8),
        "evolution": evolution,
        "block": (32, 32),
        "rows": 16,
        "cost_rounds": 1,
        "points": 3,
    }
    return SearchSettings(**{**values, **changes})


@pytest.fixture(scope="module")
def done(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    outcome = Search(model, settings(recipes=("window",)), folder).run()
    return SimpleNamespace(folder=folder, outcome=outcome, plan=outcome.plan)


def test_the_plan_fits_the_model_and_says_how_it_was_made(done, model):
    plan = done.plan
    assert set(plan.sites) == {"blocks.0.attn1", "blocks.1.attn1"}
    assert plan.grid == (5, 8, 12)
    assert plan.provenance["calibration"] == list(model.calibration)
    assert plan.expected["speedup"] > 0
    assert 0 < plan.expected["psnr"] <= 100
    assert Plan.from_dict(plan.to_dict()) == plan
    assert len(plan.provenance["weights"]) == 8
    lines = list(describe(done.outcome, settings()))
    assert "times as fast as the host's dense attention" in lines[1]
    assert 0 < done.outcome.hypervolume < 50


def test_the_front_names_plans_that_load_and_nothing_beats(done):
    front = json.loads((done.folder / "front.json").read_text())
    points = front["points"]
    assert 1 <= len(points) <= 4
    for point in points:
        plan = Plan.load(done.folder / point["plan"])
        assert plan.expected["measured_psnr"] == point["psnr"]
        assert plan.expected["seconds"] == point["predicted_seconds"]
        assert 0 <= point["trial"] < 8
    speedups = [p["measured_speedup"] for p in points]
    assert speedups == sorted(speedups)
    qualities = [p["psnr"] for p in points]
    assert qualities == sorted(qualities, reverse=True)
    assert [r["plan"] for r in front["recipes"]] == ["window"]
    assert front["trials"] == 8


def test_the_pictures_are_there(done):
    for name in ("front", "heads"):
        assert (done.folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_every_trial_is_worth_trying(done):
    limit = EVOLUTION.time_limit * done.outcome.fastest_dense
    assert all(d.values[0] <= limit + 0.01 for d in done.outcome.trials)


def test_another_budget_makes_no_trial_and_no_calibration_again(done, model, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("this was done before")

    monkeypatch.setattr(search_prepare, "calibrate_once", refuse, raising=False)
    monkeypatch.setattr(Host, "latents", refuse)
    found = Search(model, settings(budget=Budget(time=0.3), recipes=("window",)), done.folder).run()
    assert [d.genome for d in found.trials] == [d.genome for d in done.outcome.trials]
    assert found.plan.expected["speedup"] >= done.plan.expected["speedup"]


def test_a_budget_of_quality_takes_the_fastest_that_is_good_enough(done, model):
    qualities = [p.measured.psnr for p in done.outcome.points]
    asked = settings(budget=Budget(psnr=min(qualities)), recipes=("window",))
    found = Search(model, asked, done.folder).run()
    assert found.chosen.measured.psnr >= min(qualities)
    assert found.chosen.measured.speedup == max(p.measured.speedup for p in found.points)


def test_a_budget_that_no_plan_meets_is_told(done):
    told = list(describe(done.outcome, settings(budget=Budget(time=0.01))))
    assert any("the budget of 0.01 is not reached" in line for line in told)
    told = list(describe(done.outcome, settings(budget=Budget(psnr=101))))
    assert any("the budget of 101 dB is not reached" in line for line in told)


def test_more_trials_go_on_with_the_same_study(done, model):
    more = settings(replace(EVOLUTION, trials=10), recipes=("window",))
    found = Search(model, more, done.folder).run()
    before = done.outcome.trials
    assert len(found.trials) == 10
    assert found.trials[: len(before)] == before


def test_other_settings_do_not_go_on_with_the_study(done, model):
    other = settings(replace(EVOLUTION, levels=9))
    with pytest.raises(AccelError, match="made with levels 8, this search has 9"):
        Search(model, other, done.folder).run()


def test_a_fresh_study_leaves_the_other_one_alone_and_goes_on_by_the_same_command(
    done, model, monkeypatch
):
    other = settings(replace(EVOLUTION, levels=9, trials=5, fresh=True))
    first = Search(model, other, done.folder).run()
    assert len(first.trials) == 5
    monkeypatch.setattr(Host, "latents", None)
    assert Search(model, other, done.folder).run().trials == first.trials
    again = Search(model, settings(recipes=("window",)), done.folder).run()
    assert again.trials[: len(done.outcome.trials)] == done.outcome.trials


def test_prices_of_selections_and_masks_are_part_of_what_trials_depend_on(done, model, monkeypatch):
    found = search_prepare.prepare(Host(model), settings(), done.folder)
    (word,) = found.tables
    dearer = replace(found.tables[word], mask=Price.known(0.5))
    assert replace(found, tables={word: dearer}).fingerprint() != found.fingerprint()


@pytest.mark.parametrize("content", ['{"0": {', '{"0": {"a": "b"}}'])
def test_broken_files_of_measurements_are_measured_anew(
    done, model, tmp_path, monkeypatch, caplog, content
):
    folder = tmp_path / "copy"
    shutil.copytree(done.folder, folder)
    names = ("baseline", "costs", "probes", "measured")
    for name in names:
        (path,) = folder.glob(f"{name}-*.json")
        path.write_text(content)
    with caplog.at_level(logging.WARNING, logger="accel"):
        found = Search(model, settings(recipes=("window",)), folder).run()
    assert found.trials[:8] == done.outcome.trials[:8]
    told = [r.getMessage() for r in caplog.records if "measures anew" in r.getMessage()]
    assert [sum(f"/{name}-" in line for line in told) for name in names] == [1, 1, 1, 1]


def test_interrupted_anywhere_it_ends_where_it_would_have(done, model, tmp_path, monkeypatch):
    """Stopped in the calibration, in a trial and while the front is measured."""

    class Stop(Exception):
        pass

    generate, latents = Host.generate, Host.latents

    def stopping(function, at):
        calls = iter(range(10**6))

        def call(self, *args, **kwargs):
            if next(calls) == at:
                raise Stop
            return function(self, *args, **kwargs)

        return call

    for name, function, at in (
        ("generate", generate, 3),
        ("latents", latents, 2),
        ("latents", latents, 5),
        ("generate", generate, 6),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(Host, name, stopping(function, at))
            with pytest.raises(Stop):
                Search(model, settings(), tmp_path).run()
    found = Search(model, settings(), tmp_path).run()
    assert found.trials == done.outcome.trials
    # which of the measured ones are beaten, times of this machine decide
    assert found.points[0].trial in {trial.number for trial in found.trials}


def test_a_space_in_which_nothing_is_faster_still_gives_a_plan(model, tmp_path, monkeypatch):
    monkeypatch.setattr(pricing, "measure", priced_at(3.0, 1.5))
    one = replace(model, calibration=model.calibration[:1])
    outcome = Search(one, settings(replace(EVOLUTION, trials=4)), tmp_path).run()
    assert Plan.load(outcome.plan.save(tmp_path / "plan.json")) == outcome.plan


def test_a_band_without_steps_is_refused_before_anything_is_measured(model, tmp_path):
    wanted = settings(schedule=Schedule(dense_start=0.75, bands=(0.6,)))
    with pytest.raises(AccelError, match="band 0 of the schedule holds none of the 4 steps"):
        Search(model, wanted, tmp_path)


def test_settings_are_checked():
    for changes, why in (
        ({"budget": lambda: Budget(time=0)}, r"budget\.time is 0"),
        ({"budget": lambda: Budget(psnr=-3)}, r"budget\.psnr is -3"),
        ({"evolution": lambda: Evolution(trials=-1)}, r"search\.trials is -1"),
        ({"evolution": lambda: Evolution(fidelity="step")}, r"'step' is unknown; .*steps"),
        ({"evolution": lambda: Evolution(time_limit=2)}, r"search\.time_limit is 2"),
        ({"dense_starts": lambda: (0.1,)}, r"dense_starts has 0\.1"),
        ({"precisions": lambda: ("hlaf",)}, r"'hlaf' is unknown; .*half"),
        ({"recipes": lambda: ("sprased",)}, r"no recipe 'sprased'"),
        ({"points": lambda: 0}, r"points is 0"),
        ({"rows": lambda: True}, r"rows is True"),
        ({"tolerance": lambda: -1.0}, r"tolerance is -1"),
    ):
        with pytest.raises(AccelError, match=why):
            settings(**{name: make() for name, make in changes.items()})


def test_candidates_are_every_combination_of_a_group_once():
    found = candidates_of(SPACE)
    assert len(found) == 2 * 2 * 2 + 1 + 1
    assert len(set(found)) == len(found)
    with pytest.raises(AccelError, match=r"space\.groups\[0\] lacks rests"):
        candidates_of({"groups": [{"select": [], "orders": ["thw"]}]})
    with pytest.raises(AccelError, match="no candidate"):
        candidates_of({"groups": []})


def test_what_was_measured_is_kept_plan_by_plan(done):
    kept = json.loads(next(done.folder.glob("measured-*.json")).read_text())
    assert all(
        set(prompts) == set(done.plan.provenance["calibration"]) for prompts in kept.values()
    )
