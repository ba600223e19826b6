"""The arms that a comparison is asked for: caches, fronts, combinations, groups."""

import json
from itertools import groupby

import huggingface_hub
import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from tiny_denoiser import tiny_plan

from accel.choice import DENSE as DENSE_CHOICE
from accel.errors import AccelError, PlanError
from accel.pipelines.caches import CACHES, CacheSpec
from accel.pipelines.compare_arms import (
    DENSE,
    ArmSpec,
    named_caches,
    named_fronts,
    named_plans,
)
from accel.pipelines.compare_settings import CompareSettings
from accel.recipes import RECIPES


@pytest.fixture
def front(tmp_path):
    """A front of three plans, written as accel-search does."""
    (tmp_path / "plans").mkdir()
    points = []
    for number in (3, 1, 2):
        name = f"plans/{number}.json"
        tiny_plan(DENSE_CHOICE, name=f"p{number}").save(tmp_path / name)
        points.append({"plan": name, "predicted_seconds": 1.0, "psnr": 30.0, "trial": number})
    path = tmp_path / "front.json"
    path.write_text(json.dumps({"points": points}))
    return path


def settings(**changes):
    asked = {"plans": {}, "recipes": (), "prompts": 1, "dtypes": ("float32",), **changes}
    return CompareSettings(**asked)


def test_arms_come_in_the_order_of_their_kinds(front, tmp_path):
    plan = str(tmp_path / "plans" / "1.json")
    asked = settings(
        plans={"mine": plan},
        fronts=named_fronts(str(front)),
        recipes=("window", "radial"),
        caches=named_caches(["pab", "fbcache"]),
        combined=[{"plan": "front-2", "cache": "pab"}, {"plan": "window", "cache": "magcache"}],
        baselines=("dense", "half"),
    )
    assert [(arm.name, arm.kind) for arm in asked.arms] == [
        ("dense", "dense"),
        ("half", "dense"),
        ("mine", "plan"),
        ("front-1", "front"),
        ("front-2", "front"),
        ("front-3", "front"),
        ("window", "recipe"),
        ("radial", "recipe"),
        ("pab", "cache"),
        ("fbcache", "cache"),
        ("front-2+pab", "plan + cache"),
        ("window+magcache", "plan + cache"),
    ]
    by_name = {arm.name: arm for arm in asked.arms}
    assert by_name["front-1"].plan.endswith("plans/3.json")  # in the order of the file
    assert by_name["front-2+pab"].plan == by_name["front-2"].plan
    assert by_name["front-2+pab"].cache == by_name["pab"].cache == CacheSpec("pab").identity
    assert by_name["pab"].plan is None
    assert not by_name["front-2+pab"].front


def test_all_combines_every_plan_with_every_cache(front, tmp_path):
    plans = {name: str(tmp_path / "plans" / "1.json") for name in ("a", "b")}
    asked = settings(
        plans=plans,
        fronts=named_fronts({"f": str(front)}),
        recipes=("window",),
        caches=named_caches({"mild": {"cache": "fbcache", "threshold": 0.02}, "pab": "pab"}),
        combined="all",
    )
    names = [arm.name for arm in asked.arms if arm.kind == "plan + cache"]
    assert names == ["a+mild", "a+pab", "b+mild", "b+pab"]


def test_a_plan_of_the_hub_is_named_by_what_it_holds(tmp_path, monkeypatch):
    """Its repository may hold another plan tomorrow."""
    held, asked = {}, []

    def download(repo_id, **settings):
        asked.append(repo_id)
        return str(held[repo_id].save_pretrained(tmp_path / str(len(asked))))

    def identity():
        plans = named_plans({"theirs": "someone/plan"})
        (arm,) = settings(plans=plans).arms[1:]
        assert arm.name == "theirs"
        return arm.identity

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    held["someone/plan"] = held["else/copy"] = tiny_plan(DENSE_CHOICE)
    before = identity()
    assert identity() == before
    (copy,) = settings(plans=named_plans("else/copy")).arms[1:]
    assert (copy.name, copy.identity) == ("copy", before)
    held["someone/plan"] = tiny_plan(DENSE_CHOICE, block=(32, 32))
    assert identity() != before
    assert asked == ["someone/plan", "someone/plan", "else/copy", "someone/plan"]  # once each time


def test_a_plan_of_the_hub_that_cannot_be_had_is_told_at_once(monkeypatch):
    def download(repo_id, **settings):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(PlanError, match=r"no plan file 'someone/plan' here.*no network"):
        named_plans("someone/plan")


def test_recipes_compute_in_the_precision_of_the_baselines(front):
    """16-bit operands are no merit of a selection: what a front may use, recipes get as well."""

    def arms(*baselines, **changes):
        asked = settings(
            fronts=named_fronts(str(front)),
            recipes=("window", "full"),
            combined=[{"plan": name, "cache": "pab"} for name in ("window", "front-1")],
            baselines=baselines,
            **changes,
        )
        return {arm.name: arm for arm in asked.arms}

    fair, own = arms("dense", "half"), arms("dense")
    told = {name: arm.precision for name, arm in fair.items() if arm.precision}
    assert told == {"window": "half", "window+pab": "half"}  # `full` is a precision itself
    assert not any(arm.precision for arm in own.values())
    for name, arm in fair.items():
        assert name == "half" or (arm.identity == own[name].identity) == (name not in told)
    assert fair["window"].calibrated is own["window"].calibrated is False


def test_all_recipes_are_those_that_leave_something_out():
    names = settings(recipes="all").recipes
    assert set(names) == {n for n, r in RECIPES.items() if r.frames} - {"full", "half"}
    assert next(iter(settings(recipes=("window", "all")).recipes)) == "window"
    assert len(settings(recipes=("window", "all")).recipes) == len(names)


def test_the_settings_of_a_cache_name_what_it_does():
    mild, bold = (CacheSpec("fbcache", {"threshold": t}) for t in (0.02, 0.2))
    plan = ArmSpec.of("p", "window", "recipe")
    assert plan.with_cache("c", mild) != plan.with_cache("c", bold)
    assert plan.with_cache("c", mild).identity == plan.identity
    assert ArmSpec("m", cache=CacheSpec("magcache").identity).calibrated
    assert not ArmSpec("m", cache=mild.identity).calibrated
    assert not plan.calibrated


def test_groups_hold_the_baselines_and_as_many_others_as_there_is_room_for():
    asked = settings(
        recipes=("window", "radial", "sparsed", "pisa", "adaspa"),
        baselines=("dense", "half"),
        loaded_at_once=4,
    )
    assert [[arm.name for arm in group] for group in asked.groups] == [
        ["dense", "half", "window", "radial"],
        ["dense", "half", "sparsed", "pisa"],
        ["dense", "half", "adaspa"],
    ]
    assert settings().groups == ((DENSE,),)
    with pytest.raises(AccelError, match="loaded_at_once is 2; it is a whole number, at least 3"):
        settings(baselines=("dense", "half"), loaded_at_once=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"combined": [{"plan": "windo", "cache": "pab"}]}, "did you mean 'window'"),
        ({"combined": [{"plan": "window", "cache": "pap"}]}, "did you mean 'pab'"),
        ({"combined": [{"plan": "window"}]}, "combined has"),
        ({"combined": "every"}, "combined has"),
        ({"caches": {"window": CacheSpec("pab")}}, "cannot be called 'window'"),
        ({"recipes": ("al",)}, "did you mean 'all'"),
    ],
)
def test_what_does_not_name_an_arm_is_refused(changes, message):
    with pytest.raises(AccelError, match=message):
        _ = settings(**{"recipes": ("window",), **changes}).arms


def test_a_front_is_read_as_a_stranger_s_file(front, tmp_path):
    def refused(data, message):
        front.write_text(data if isinstance(data, str) else json.dumps(data))
        with pytest.raises((AccelError, PlanError), match=message):
            named_fronts(str(front))

    outside = tmp_path.parent / "outside.json"
    tiny_plan(DENSE_CHOICE).save(outside)
    for name in ("../outside.json", str(outside), "plans/9.json"):
        refused({"points": [{"plan": name}]}, "there is no plan file")
    refused({"points": []}, "has no points")
    refused({"points": [{"psnr": 1}]}, "lacks the key 'plan'")
    refused({"points": {"plan": "a"}}, "points must be of type list")
    refused({}, "lacks the key 'points'")
    refused("[", "not a whole JSON file")
    refused('{"points": NaN}', "NaN")
    with pytest.raises(AccelError, match=r"there is no file 'nowhere\.json'"):
        named_fronts("nowhere.json")
    with pytest.raises(AccelError, match="cannot be called 'recipes'"):
        named_fronts({"recipes": str(front)})


@pytest.mark.parametrize(
    "override",
    ["caches=pab", "caches=[pab,fbcache]", "caches={bold: {cache: fbcache, threshold: 0.3}}"],
)
def test_what_is_asked_for_can_be_typed(override):
    """A default that is a list would refuse a table, and the other way round."""
    more = ["combined=all", "recipes=all", "front={a: a.json}", "plan=[a.json]"]
    with initialize_config_module("accel.configs", version_base="1.3"):
        config = OmegaConf.to_container(compose("compare", overrides=[override, *more]))
    assert {spec.kind for spec in named_caches(config["caches"]).values()} <= {"pab", "fbcache"}
    assert config["combined"] == "all"


def test_the_experiment_holds_every_cache_on_the_host_s_attention_and_on_accel_s():
    with initialize_config_module("accel.configs", version_base="1.3"):
        config = OmegaConf.to_container(compose("compare", overrides=["experiment=wan-digits"]))
    caches = named_caches(config["caches"])
    asked = settings(
        plans={"wan-digits": "p.json"},
        recipes=config["recipes"],
        fronts={"front": ("p.json",) * 7},
        caches=caches,
        combined=config["combined"],
        baselines=config["baselines"],
    )
    arms = {arm.name: arm for arm in asked.arms}
    assert set(caches) == set(CACHES)
    for name in caches:
        assert arms[f"half+{name}"].cache == arms[name].cache
        assert arms[f"half+{name}"].plan == "half"
        assert arms[f"half+{name}"].kind == "cache"  # nothing but the cache leaves anything out
    kinds = [arm.kind for arm in asked.arms]
    assert len(list(groupby(kinds))) == len(set(kinds))  # one heading each


def test_caches_are_named_by_their_kinds_or_by_the_user():
    assert named_caches(None) == {}
    assert list(named_caches("pab")) == ["pab"]
    named = named_caches({"bold": {"cache": "fbcache", "threshold": 0.3}})
    assert named["bold"].options == {"threshold": 0.3}
    with pytest.raises(AccelError, match="two caches have the same name"):
        named_caches(["fbcache", {"cache": "fbcache", "threshold": 0.3}])
