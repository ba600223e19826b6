"""Recipes of a comparison: by name, for a kind of model, and with parameters."""

from dataclasses import replace

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from accel.errors import AccelError, PlanError
from accel.pipelines.compare_arms import recipe_arm
from accel.pipelines.compare_settings import CompareSettings
from accel.pipelines.recipe_specs import RecipeSpec
from accel.recipes import RECIPES


def settings(**changes):
    known = {"plans": {}, "recipes": [], "prompts": 1, "dtypes": (), "baselines": ("dense", "half")}
    return CompareSettings(**{**known, **changes})


@pytest.mark.parametrize("output", ["frames", "text", "vision"])
def test_all_are_those_of_the_kind_of_model(output):
    wanted = {n for n, r in RECIPES.items() if getattr(r, output)} - {"full", "half"}
    found = settings(recipes=["all"], output=output, baselines=("dense",)).recipes
    assert set(found) == wanted


def test_a_recipe_of_another_kind_of_model_is_refused():
    with pytest.raises(AccelError, match=r"'fast_dllm' is not for models of frames; those are"):
        settings(recipes=["fast_dllm"])
    with pytest.raises(AccelError, match=r"'radial' is not for models of text"):
        settings(recipes=["radial"], output="text")


def test_arms_with_parameters_have_names_and_identities_of_their_own():
    recipes = {
        "now": {"recipe": "sparse_dllm", "delay": 0},
        "later": {"recipe": "sparse_dllm", "delay": 2},
        "sparse_dllm": "sparse_dllm",
    }
    asked = settings(recipes=recipes, output="text")
    _, _, *arms = asked.arms
    assert [arm.name for arm in arms] == ["now", "later", "sparse_dllm"]
    assert len({arm.identity for arm in arms}) == 3
    assert {arm.plan for arm in arms} == {"sparse_dllm"}
    assert [arm.parameters for arm in arms] == ['{"delay": 0}', '{"delay": 2}', ""]
    assert {arm.precision for arm in arms} == {"half"}
    # by name alone it is what it was before there were parameters
    alone = recipe_arm("sparse_dllm", RecipeSpec("sparse_dllm"), ("dense",))
    assert (alone.identity, alone.kind) == ("sparse_dllm", "recipe")
    assert replace(asked, rounds=2).recipes == asked.recipes


@pytest.mark.parametrize(
    ("recipes", "error", "message"),
    [
        ({"a": {"recipe": "sparse_dllm", "dely": 1}}, PlanError, "did you mean 'delay'"),
        ({"a": {"recipe": "sparse_dlm"}}, PlanError, "did you mean 'sparse_dllm'"),
        ({"a": {"delay": 1}}, AccelError, "a recipe is a name or {recipe: name, parameter: value}"),
        ({"a": "all"}, PlanError, "there is no recipe 'all'"),
        ({"dense": "sparsed"}, AccelError, "cannot be called 'dense'"),
        (["sparsed", "sparsed"], AccelError, "cannot be called 'sparsed' twice"),
        ([{"recipe": "sparsed"}], AccelError, "it is a list of texts"),
    ],
)
def test_what_cannot_be_is_one_clear_error(recipes, error, message):
    with pytest.raises(error, match=message):
        _ = settings(recipes=recipes, output="text").arms


def test_lists_of_parameters_are_tuples_as_recipes_take_them():
    spec = RecipeSpec.of({"recipe": "sparsed", "block": [32, 16]})
    assert spec.parameters["block"] == (32, 16)
    assert spec.identity == 'sparsed {"block": [32, 16]}'


def test_caches_of_diffusers_are_none_of_a_text_model():
    from accel.pipelines.caches import CacheSpec

    with pytest.raises(AccelError, match=r"caches and combined are for diffusers' caches"):
        settings(caches={"pab": CacheSpec("pab")}, output="text")


@pytest.mark.parametrize("experiment", ["llada-tiny", "llada-tiny-ablations"])
def test_the_experiments_of_text_are_arms(experiment):
    with initialize_config_module("accel.configs", version_base="1.3"):
        config = OmegaConf.to_container(compose("compare", [f"experiment={experiment}"]))
    assert config["model"]["output"] == "text"
    asked = settings(recipes=config["recipes"], output="text")
    arms = {arm.name: arm for arm in asked.arms}
    assert len(arms) >= 8
    assert {arms[name].plan for name in arms} >= {None, "half", "sparsed", "sparse_dllm"}
