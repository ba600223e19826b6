"""The search for a vision model, on tiny random ones."""

import json
from pathlib import Path

import pytest
import yaml
from tiny_vision import tiny_vision_config, tiny_vision_path

from accel.errors import AccelError
from accel.pipelines.compare_arms import read_front
from accel.pipelines.host import Host, ModelConfig
from accel.plan import Plan
from accel.search.image_bench import TIMED
from accel.search.image_search import ImageSearch, genes_for
from accel.search.settings import Evolution
from accel.search.task_search import describe

CONFIGS = Path(__file__).parents[2] / "configs"
SPACE = {
    "name": "windows",
    "genes": {"keep": [1.0, 0.5, 0.2], "how": [{"score": "norm_of_means"}, {"score": "norm"}]},
    "first": [{"keep": 0.5}, {"keep": [0.2, 1.0, 1.0, 1.0]}],
}
TOKENS = {"name": "tokens", "genes": {"keep": [1.0, 0.7, 0.5], "group": 1}}
SETTINGS = {"evolution": Evolution(trials=5, population=3), "points": 2, "loss": 0.5, "seed": 3}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tiny_vision_path(tmp_path_factory.mktemp("model") / "swin")
    return ModelConfig(**tiny_vision_config(path))


@pytest.fixture(scope="module")
def searched(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    search = ImageSearch.of(model, SPACE, folder, 1, **SETTINGS)
    return folder, search, search.run()


def test_what_a_search_leaves(searched):
    folder, search, outcome = searched
    front = json.loads((folder / "front.json").read_text())
    plans = [Plan.load(path) for path in read_front(str(folder / "front.json"))]
    assert [p.digest for p in plans] == [p.plan.digest for p in outcome.points]
    assert front["trials"] == outcome.trials == 5
    assert (folder / "front.png").stat().st_size > 1000
    assert outcome.dense.agreement == outcome.dense.time == 1.0
    assert any(point.worth.agreement < 1 for point in outcome.points)
    assert outcome.chosen.plan.windows is not None
    lines = [*describe(outcome, search.settings), *search.more(outcome)]
    assert "of 5 trials" in lines[0]
    assert sum(" keeps " in line for line in lines) == 4
    assert "off in the mean" in lines[-1]


def test_nothing_is_done_twice(searched, model, monkeypatch):
    folder, _, outcome = searched

    def never(*_, **__):
        raise AssertionError("looked at again")

    search = ImageSearch.of(model, SPACE, folder, 1, **SETTINGS)
    monkeypatch.setattr(Host, "generate", never)
    again = search.run()
    assert again.points == outcome.points
    assert again.chosen.plan.digest == outcome.chosen.plan.digest


def test_a_plan_is_timed_on_a_few_prompts_and_judged_on_all(searched, monkeypatch):
    _, search, outcome = searched
    tasks = [f"test/{number:03d}" for number in range(6)]  # each a prompt of its own
    timed = []

    def ratios(plan, prompt):
        timed.append(prompt)
        return [0.5]

    monkeypatch.setattr(search.bench, "_ratios", ratios)
    worth = search.bench.measure(outcome.chosen.plan, tasks)
    assert timed == tasks[:TIMED]
    assert worth.time == 0.5
    assert worth.agreement == search.bench.trial(outcome.chosen.plan, tasks).agreement


def test_tokens_of_a_plain_transformer(tmp_path):
    path = tiny_vision_path(tmp_path / "vit", "vit")
    model = ModelConfig(**tiny_vision_config(path))
    outcome = ImageSearch.of(model, TOKENS, tmp_path / "out", 1, **SETTINGS).run()
    assert outcome.chosen.plan.tokens is not None
    assert outcome.trials == 5
    for point in outcome.points:  # two blocks, which keep no more than the image has
        keeps = point.plan.provenance["genes"]["keep"]
        assert point.worth.agreement == 1.0 or min(keeps) < 1
        assert len(point.plan.tokens.keeps) == len([k for k in keeps if k < 1])


def test_a_model_without_a_class_token_is_searched_by_what_it_has(tmp_path):
    path = tiny_vision_path(tmp_path / "vit", "vit", class_token=False, global_pool="avg")
    space = yaml.safe_load((CONFIGS / "space" / "tokens.yaml").read_text())
    space["genes"]["group"] = 1
    model = ModelConfig(**tiny_vision_config(path))
    search = ImageSearch.of(model, space, tmp_path / "out", 1, **SETTINGS)
    assert [how.get("score") for how in search.settings.genes.hows] == [None, "mass"]
    assert len(search.settings.first) == len(space["first"]) - 1
    assert search.run().trials == 5
    only = {**space, "genes": {**space["genes"], "how": [{"method": "fuse"}]}}
    with pytest.raises(AccelError, match="no class token"):
        ImageSearch.of(model, only, tmp_path / "out", 1, **SETTINGS)
    bad = {**space, "first": [{"keep": 0.5, "how": {"method": "fused"}}]}
    asked = ImageSearch.of(model, bad, tmp_path / "out", 1, **SETTINGS)
    with pytest.raises(AccelError, match="not one of"):
        asked.run()


def test_other_rounds_are_measured_anew(searched, model):
    folder, search, _ = searched
    assert ImageSearch.of(model, SPACE, folder, 1, **SETTINGS).key == search.key
    assert ImageSearch.of(model, SPACE, folder, 2, **SETTINGS).key != search.key


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({**SPACE, "name": "text"}, "none of a vision model"),
        (TOKENS, "not for a SwinTransformer"),
        ({"name": "windows"}, "none of a vision model"),
    ],
)
def test_a_space_for_something_else_is_refused(space, words, model):
    with pytest.raises(AccelError, match=words):
        genes_for(space, Host(model).pipe)
