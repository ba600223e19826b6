"""The search for a text model, on a tiny random one."""

import json
from dataclasses import replace

import pytest
from tiny_llada import build_tiny_llada, tiny_llada_config

from accel.errors import AccelError
from accel.pipelines.compare_arms import read_front
from accel.pipelines.host import Host, ModelConfig
from accel.pipelines.tasks import Task, by_turns, read_tasks
from accel.plan import Plan
from accel.search.settings import Evolution
from accel.search.study import Done
from accel.search.task_search import TaskSettings, describe, undominated
from accel.search.text_bench import TextBench
from accel.search.text_genes import TextGenes
from accel.search.text_search import TextSearch
from accel.token_cache import TokenCache

GENES = TextGenes.of(
    {
        "keep": [1.0, 0.5],
        "delay": [0, 1],
        "block_length": [8, 12],
        "commit": [{"rule": "quota"}, {"rule": "threshold", "bound": 0.3}],
    },
    (16, 16),
)
SETTINGS = TaskSettings(
    genes=GENES,
    first=({"keep": 1.0, "block_length": 8},),
    evolution=Evolution(trials=5, population=3),
    points=2,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return ModelConfig(**tiny_llada_config(build_tiny_llada(folder)))


@pytest.fixture(scope="module")
def searched(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    return folder, TextSearch(model, SETTINGS, folder).run()


def test_what_a_search_leaves(searched):
    folder, outcome = searched
    front = json.loads((folder / "front.json").read_text())
    plans = [Plan.load(path) for path in read_front(str(folder / "front.json"))]
    assert [p.digest for p in plans] == [p.plan.digest for p in outcome.points]
    assert front["chosen"] == outcome.chosen.plan.name
    assert front["trials"] == 5
    assert (folder / "front.png").stat().st_size > 1000
    assert outcome.chosen.plan.cache is not None
    assert outcome.dense.agreement == 1.0
    lines = list(describe(outcome, SETTINGS))
    assert "of 5 trials" in lines[0]


def test_nothing_is_done_twice(searched, model, monkeypatch):
    folder, outcome = searched

    def never(*_, **__):
        raise AssertionError("generated again")

    monkeypatch.setattr(Host, "generate", never)
    again = TextSearch(model, SETTINGS, folder).run()
    assert again.chosen.plan.digest == outcome.chosen.plan.digest
    assert again.points == outcome.points


def test_more_trials_go_on(searched, model):
    folder, _ = searched
    more = replace(SETTINGS, evolution=replace(SETTINGS.evolution, trials=6))
    assert TextSearch(model, more, folder).run().trials == 6


def test_another_search_of_the_same_name_is_refused(searched, model):
    folder, _ = searched
    other = replace(SETTINGS, genes=TextGenes.of({"keep": [1.0, 0.25]}, (16, 16)))
    with pytest.raises(AccelError, match=r"search.fresh=true"):
        TextSearch(model, other, folder).run()


def test_a_plan_that_is_dense_in_every_call_is_worth_what_dense_is(model, tmp_path):
    host = Host(model)
    tasks = read_tasks(model.calibration_tasks)
    bench = TextBench(host, tmp_path, "key", 0)
    dense = bench.dense(tasks)
    genome = GENES.nearest({"keep": 1.0, "block_length": 8})
    search = TextSearch(model, SETTINGS, tmp_path)
    plan = replace(search.plan(genome, "p"), cache=TokenCache(refresh=1))
    worth = bench.measure(plan, tasks)
    assert (worth.accuracy, worth.agreement, worth.calls) == (dense.accuracy, 1.0, dense.calls)


def test_without_tasks_there_is_nothing_to_search_by(model, tmp_path):
    with pytest.raises(AccelError, match="calibration_tasks"):
        TextSearch(replace(model, calibration_tasks="", calibration=("a",)), SETTINGS, tmp_path)


def test_kinds_of_tasks_take_turns():
    tasks = [Task(f"{kind}{i}", kind, "p", "a", ("a",)) for kind in "ba" for i in range(2)]
    assert [task.id for task in by_turns([*tasks, Task("c0", "c", "p", "a", ("a",))])] == [
        *("a0", "b0", "c0"),
        *("a1", "b1"),
    ]


def test_only_trials_that_nothing_beats_are_of_the_front():
    values = [(0.5, 0.9, 0.9), (0.4, 0.9, 0.9), (0.4, 0.8, 0.95), (0.6, 0.9, 0.99), (0.4, 0.9, 0.9)]
    found = [Done(i, (i,), v) for i, v in enumerate(values)]
    assert sorted(done.number for done in undominated(found)) == [1, 2, 3]
