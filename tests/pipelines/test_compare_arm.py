"""One arm with a cache, with a calibrated recipe, and with a plan from elsewhere."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from tiny_wan import CALL, tiny_wan_config

from accel.choice import Choice
from accel.estimators import BlockMassTopK
from accel.pipelines import arm_plan, compare_arm
from accel.pipelines.adapters import geometry_of
from accel.pipelines.caches import CACHES, CacheSpec
from accel.pipelines.compare_arm import Arm
from accel.pipelines.compare_arms import ArmSpec
from accel.pipelines.compare_book import Book
from accel.pipelines.host import Host
from accel.pipelines.model_settings import model_config
from accel.pipelines.pricing import warm_up_steps
from accel.plan import Plan
from accel.recipes import RECIPES, recipe


@pytest.fixture
def model(tiny_wan_path):
    return {**tiny_wan_config(tiny_wan_path), "call": {**CALL, "num_inference_steps": 8}}


def test_a_cache_alone(model):
    arm = Arm(model, None, cache={"cache": "fbcache", "threshold": 0.9})
    started = arm.start()
    assert started["plan"] is started["made_at"] is started["call"] is None
    assert started["note"] == ""
    made = arm.generate("a seven", 0)
    assert made["summary"] is None
    assert made["step_seconds"]["dense"] > 0
    assert arm.host.pipe.transformer.is_cache_enabled


def test_what_a_cache_leaves_out_of_its_paper_is_told(model):
    arm = Arm(model, None, cache={"cache": "faster_cache"})
    assert arm.start()["note"] == CACHES["faster_cache"].note != ""


def test_ratios_are_measured_once_for_all_arms(model, tmp_path):
    cache = CacheSpec("magcache").to_dict()
    Arm(model, None, cache=cache, folder=str(tmp_path)).start()
    path = tmp_path / "magcache.json"
    ratios = json.loads(path.read_text())["ratios"]
    assert len(ratios) == 8
    path.write_text(json.dumps({"ratios": [0.5] * 8}))
    both = Arm(model, "window", cache=cache, folder=str(tmp_path))
    both.start()
    assert both.host.pipe.transformer._cache_config.mag_ratios.tolist() == [0.5] * 8


def test_a_plan_with_a_cache_is_priced_by_what_it_computes(model, monkeypatch):
    """Prices and the dense generation are those without the cache; it is there again afterwards."""

    def baseline(host, prompt, seed, path):
        denoiser = host.pipe.transformer
        assert not denoiser.is_cache_enabled
        assert "_accel" not in denoiser.__dict__
        assert path.name == "baseline.json"
        return SimpleNamespace(total_share=0.5)

    def priced(host, plan, baseline, folder, keeps):
        return replace(plan, expected={"speedup": 2.0, "cost": "measured on a CPU"})

    monkeypatch.setattr(compare_arm, "load_or_measure_baseline", baseline)
    monkeypatch.setattr(compare_arm, "priced", priced)
    arm = Arm(model, "window", cache={"cache": "pab"})
    arm.start()
    assert arm.price("costs") == {
        "attention_share": 0.5,
        "predicted_speedup": None,  # of what a cache leaves out nothing is known
        "predicted_dense": {},
        "predicted_from": None,
    }
    assert arm.host.pipe.transformer.is_cache_enabled
    made = arm.generate("a seven", 0)
    assert made["summary"]["plan"] == "window"
    alone = Arm(model, "window")
    alone.start()
    told = alone.price("costs")
    assert told["predicted_speedup"] == 2.0
    assert told["predicted_from"] == "measured on a CPU"
    rows = (alone.generate("a seven", 0)["summary"]["rows"], made["summary"]["rows"])
    assert sum(row["calls"] for row in rows[0]) > sum(row["calls"] for row in rows[1])


def test_an_arm_is_warm_when_it_was_priced(model, monkeypatch):
    """With the plan that it goes on with, after everything that pricing runs."""
    log = []
    generate = Host.generate

    def logged(self, *args, **kwargs):
        plan = self.pipe.transformer.__dict__.get("_accel")
        log.append((plan and plan.session.plan.name, kwargs["num_inference_steps"]))
        return generate(self, *args, **kwargs)

    def baseline(*_):
        log.append("measured")
        return SimpleNamespace(total_share=0.5)

    def priced(host, plan, baseline, folder, keeps):
        log.append("priced")
        return replace(plan, name="priced")

    monkeypatch.setattr(Host, "generate", logged)
    monkeypatch.setattr(compare_arm, "load_or_measure_baseline", baseline)
    monkeypatch.setattr(compare_arm, "priced", priced)
    arm = Arm(model, "window", cache={"cache": "pab"})
    arm.start()
    arm.price("costs")
    assert log == [("window", 2), "measured", "priced", ("priced", 2)]


@pytest.mark.parametrize("name", ["xattention", "jenga", "mminference_grid", "window"])
def test_what_selections_keep_is_known_to_prices_once_they_have_run(model, monkeypatch, name):
    given = []

    def priced(host, plan, baseline, folder, keeps):
        given.append(keeps)
        return plan

    monkeypatch.setattr(
        compare_arm, "load_or_measure_baseline", lambda *_: SimpleNamespace(total_share=0.5)
    )
    monkeypatch.setattr(compare_arm, "priced", priced)
    arm = Arm({**model, "prompts": ["a seven"]}, name)
    arm.start()
    (plan,) = arm.plans
    arm.price("costs")
    (keeps,) = given
    choices = {c for bands in plan.sites.values() for heads in bands for c in heads}
    assert set(keeps) == {choice for choice in choices if choice.online}
    steps = warm_up_steps(plan.schedule, 8)
    rows = arm.generate("a seven", 0, steps=steps)["summary"]["rows"]
    for choice, keep in keeps.items():
        bands = {b for of in plan.sites.values() for b, heads in enumerate(of) if choice in heads}
        same = [row["keep"] for row in rows if row["phase"] in {f"band {b}" for b in bands}]
        assert same
        assert keep == pytest.approx(sum(same) / len(same))


def test_an_interrupted_generation_leaves_nothing_to_the_next(model, tmp_path, monkeypatch):
    arm = Arm(model, None, cache={"cache": "pab"})
    arm.start()
    arm.generate("a seven", 0, save=str(tmp_path / "a.npz"))
    step, calls = type(arm.host.pipe.scheduler).step, []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(type(arm.host.pipe.scheduler), "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            arm.generate("a two", 1)
    arm.generate("a seven", 0, save=str(tmp_path / "b.npz"))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_an_arm_says_where_its_plan_was_made_and_where_it_runs(model, tmp_path):
    plan = Plan.uniform(
        "p",
        geometry_of(Host(model_config(model)).pipe),
        Choice(BlockMassTopK(keep=0.5)),
        block=(32, 32),
        grid=(3, 8, 12),
        provenance={"call": {"num_inference_steps": 6}},
        expected={"speedup": 3.0},
    )
    started = Arm(model, str(plan.save(tmp_path / "p.json"))).start()
    assert started["made_at"] == {"grid": [3, 8, 12], "steps": 6}
    assert started["call"] == {"grid": [5, 8, 12], "steps": 8}
    assert started["predicted_speedup"] is None  # that of another call
    travelled = plan.for_grid((5, 8, 12)).save(tmp_path / "q.json")
    assert Arm(model, str(travelled)).start()["made_at"] == started["made_at"]
    nowhere = replace(plan, provenance={}).save(tmp_path / "r.json")
    assert Arm(model, str(nowhere)).start()["predicted_speedup"] == 3.0


def test_a_recipe_with_a_demand_is_calibrated_first(model, tmp_path, monkeypatch):
    name = next(name for name, one in RECIPES.items() if one.demand is not None)
    asked = []

    def calibrated(host, name, folder):
        asked.append((name, folder))
        return replace(recipe("window", geometry_of(host.pipe)), name=name)

    monkeypatch.setattr(arm_plan, "calibrated_recipe", calibrated)
    assert Arm(model, name, folder=str(tmp_path)).start()["plan"] == name
    assert Arm(model, "window", folder=str(tmp_path)).start()["plan"] == "window"
    assert asked == [(name, tmp_path)]
    assert ArmSpec.of(name, name, "recipe").calibrated


@pytest.mark.parametrize("cache", [None, {"cache": "pab"}])
def test_a_recipe_computes_in_the_precision_that_it_is_given(model, cache):
    arm = Arm(model, "window", cache=cache, precision="half")
    assert arm.start()["plan"] == "window"
    assert [plan.precision for plan in arm.plans] == ["half"]
    sparse = [r for r in arm.generate("a seven", 0)["summary"]["rows"] if r["phase"] != "dense"]
    assert sparse
    assert all(kernel.endswith(" half") for row in sparse for kernel in row["kernels"])


def test_a_recipe_that_chooses_its_precision_keeps_it(model, monkeypatch):
    chosen = replace(recipe("window", geometry_of(Host(model_config(model)).pipe)), precision="fp8")
    monkeypatch.setattr(arm_plan, "recipe", lambda name, geometry: chosen)
    arm = Arm(model, "window", precision="half")
    arm.start()
    assert [plan.precision for plan in arm.plans] == ["fp8"]


def test_keys_name_caches_and_what_calibrates_them(model, tmp_path):
    def key(arm, **changes):
        config = replace(model_config(model), **changes)
        return Book(tmp_path, config, ("a one",), 0, "now").key(arm, 0)

    mild, bold = (
        ArmSpec("fb", kind="cache", cache=CacheSpec("fbcache", {"threshold": t}).identity)
        for t in (0.02, 0.2)
    )
    ratios = ArmSpec("mag", kind="cache", cache=CacheSpec("magcache").identity)
    plan = ArmSpec.of("window", "window", "recipe")
    arms = (mild, bold, ratios, plan, plan.with_cache("fb", CacheSpec("fbcache")), ArmSpec("dense"))
    arms = (*arms, plan.computed_in("half"))
    assert len({key(arm) for arm in arms}) == len(arms)
    other = {"calibration": ("a two",)}
    assert key(mild) == key(mild, **other)
    assert key(plan) == key(plan, **other)
    assert key(ratios) != key(ratios, **other)
    # a name is only a name
    assert key(mild) == key(replace(mild, name="another"))
