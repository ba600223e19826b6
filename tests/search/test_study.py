"""The study: first generation, children, duplicates, workers that die, other studies."""

import json
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from accel.errors import AccelError
from accel.search.genome import Genes
from accel.search.study import MINIMIZE, Trials, open_storage

GENES = Genes.of(["a", "b", "c"], 2, levels=9, dense_starts=(0.1, 0.3), precisions=("full",))
FIRST = [GENES.uniform(level) for level in range(1, 9, 2)]
PROVENANCE = {"prepared": "abc", "seed": 7}


def cost(genome) -> list[float]:
    """A trade-off with an interaction, so that neighbours matter."""
    levels, late = genome[:-1], genome[-1]
    time = 1 - sum(levels) / 60 + 0.05 * late
    harm = sum((i + 1) * x**2 for i, x in enumerate(levels)) - 3 * levels[0] * levels[1]
    return [time, 60 - harm / 10 + 4 * late]


def trials(folder: Path, *, provenance=PROVENANCE, seed=7, first=FIRST, repair=None, **changes):
    return Trials(
        open_storage("", folder),
        "test",
        GENES,
        provenance,
        first,
        repair=repair or (lambda genome: genome),
        seed=seed,
        lock=folder / "lock",
        **changes,
    )


def values(study: Trials) -> list:
    return [(d.number, d.genome, d.values) for d in study.finished]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    study = trials(tmp_path_factory.mktemp("study"))
    study.run(20, cost)
    return values(study)


def test_the_first_generation_is_what_was_given_and_has_children(undisturbed, tmp_path):
    assert [genome for _, genome, _ in undisturbed[:4]] == FIRST
    study = trials(tmp_path)
    study.run(12, cost)
    raw = optuna.load_study(study_name="test", storage=open_storage("", tmp_path)).trials
    generations = [t.system_attrs["NSGAIISampler:generation"] for t in raw]
    assert generations == [0] * 4 + [1] * 4 + [2] * 4


def test_no_genome_is_evaluated_twice(undisturbed):
    genomes = [genome for _, genome, _ in undisturbed]
    assert len(set(genomes)) == len(genomes) == 20


def test_children_of_the_front_get_better_than_chance(undisturbed):
    best = max(v[1] - 40 * v[0] for _, _, v in undisturbed[:4])
    assert max(v[1] - 40 * v[0] for _, _, v in undisturbed[4:]) > best


def test_trials_wanted_is_how_many_the_study_has_in_the_end(undisturbed, tmp_path):
    for wanted in (7, 7, 20):
        trials(tmp_path).run(wanted, cost)
        assert len(trials(tmp_path).finished) == wanted
    assert values(trials(tmp_path)) == undisturbed


def test_another_seed_is_another_search(undisturbed, tmp_path):
    study = trials(tmp_path, seed=8)
    study.run(20, cost)
    assert values(study)[:4] == undisturbed[:4]
    assert values(study) != undisturbed


def test_genomes_are_repaired_before_they_are_tried(tmp_path):
    seen = []

    def evaluate(genome):
        seen.append(genome)
        return cost(genome)

    trials(tmp_path, repair=lambda g: GENES.with_levels(g, 8)).run(5, evaluate)
    assert all(set(genome[:-1]) == {8} for genome in seen[4:])


def test_a_genome_that_is_known_all_the_same_is_not_evaluated_again(tmp_path):
    seen = []

    def evaluate(genome):
        seen.append(genome)
        return cost(genome)

    study = trials(tmp_path, repair=lambda g: (1,) * 6 + (0,))
    study.run(9, evaluate)
    assert len(study.finished) == 9
    assert len(seen) == len(set(seen)) == 4
    raw = optuna.load_study(study_name="test", storage=open_storage("", tmp_path)).trials
    assert [t.user_attrs.get("same_as") for t in raw[4:]] == [0] * 5


def test_a_study_of_something_else_is_refused(tmp_path):
    trials(tmp_path).run(2, cost)
    with pytest.raises(AccelError, match=r"made with prepared 'abc', this search has 'abd'"):
        trials(tmp_path, provenance={**PROVENANCE, "prepared": "abd"})
    with pytest.raises(AccelError) as error:
        trials(tmp_path, provenance={**PROVENANCE, "prepared": "abd", "code": "x"}, third=MINIMIZE)
    told = str(error.value)
    assert "; with code None, this search has 'x'" in told
    assert "; with objectives ['minimize', 'maximize'], this search has" in told
    assert "search.fresh=true" in told
    assert len(trials(tmp_path).finished) == 2, "the study is as it was"


def test_a_study_that_does_not_say_what_it_is_of_is_refused(tmp_path):
    study = optuna.create_study(
        study_name="test", storage=open_storage("", tmp_path), directions=["minimize", "maximize"]
    )
    study.add_trial(optuna.create_trial(values=[1.0, 2.0]))
    with pytest.raises(AccelError, match=r"made with prepared None, this search has 'abc'; with s"):
        trials(tmp_path)
    assert "first_generation" not in study.user_attrs


def test_an_empty_study_that_a_crash_left_is_taken(tmp_path):
    optuna.create_study(
        study_name="test", storage=open_storage("", tmp_path), directions=["minimize", "maximize"]
    )
    trials(tmp_path).run(2, cost)
    assert len(trials(tmp_path).finished) == 2


def test_memory_can_be_a_third_objective(tmp_path):
    study = trials(tmp_path, third=MINIMIZE)
    study.run(6, lambda genome: [*cost(genome), 1000.0 * genome[0]])
    assert all(len(d.values) == 3 for d in study.finished)


def test_a_url_is_a_storage_too_and_a_wrong_one_is_an_error(tmp_path):
    storage = open_storage(f"sqlite:///{tmp_path}/study.db", tmp_path)
    study = Trials(storage, "t", GENES, PROVENANCE, FIRST, repair=lambda g: g, seed=7,
                   lock=tmp_path / "lock")  # fmt: skip
    study.run(5, cost)
    assert len(study.finished) == 5
    with pytest.raises(AccelError, match="cannot be opened"):
        open_storage("nosuch://server/db", tmp_path)


def slow(genome) -> list[float]:
    time.sleep(0.03)
    return cost(genome)


def work(folder: str, wanted: int) -> None:
    trials(Path(folder)).run(wanted, slow)


def start(folder: Path, wanted: int) -> multiprocessing.Process:
    worker = multiprocessing.get_context("spawn").Process(target=work, args=(str(folder), wanted))
    worker.start()
    return worker


def count(folder: Path) -> int:
    if not (folder / "study.log").exists():
        return 0
    try:
        study = optuna.load_study(study_name="test", storage=open_storage("", folder))
    except KeyError:
        return 0
    return len(study.get_trials(states=(TrialState.COMPLETE,)))


def test_killed_three_times_it_finds_what_an_undisturbed_search_finds(undisturbed, tmp_path):
    for stop_at in (2, 7, 13):
        worker = start(tmp_path, 20)
        while count(tmp_path) < stop_at:
            assert worker.is_alive() or worker.exitcode == 0
            time.sleep(0.01)
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
        assert count(tmp_path) < 20
    trials(tmp_path).run(20, slow)
    assert values(trials(tmp_path)) == undisturbed


ELSEWHERE = {"machine": "another", "pid": os.getpid(), "began": "7"}


class TestOtherMachines:
    @pytest.fixture(autouse=True)
    def short(self, monkeypatch):
        for name, seconds in (("BEAT_S", 0.05), ("STALE_S", 0.6), ("WAIT_S", 0.02)):
            monkeypatch.setattr(f"accel.search.study.{name}", seconds)

    def claimed_elsewhere(self, folder) -> Trials:
        """A study of four trials, the first of which is another machine's."""
        there = trials(folder)
        there._me = ELSEWHERE
        number, _ = there._claim(4)
        assert number == 0
        return there

    def test_a_worker_that_is_silent_there_is_gone(self, tmp_path):
        self.claimed_elsewhere(tmp_path)
        here, began = trials(tmp_path), time.monotonic()
        order = []
        here.run(4, cost, lambda done: order.append(done.number))
        assert order == [1, 2, 3, 0], "the others come first"
        assert time.monotonic() - began > 0.6

    def test_one_whose_heart_beats_is_not_whatever_its_clock_says(self, tmp_path, monkeypatch):
        there = self.claimed_elsewhere(tmp_path)
        monkeypatch.setattr(time, "time", lambda: 0.0)
        here, order = trials(tmp_path), []
        with there._beating(0):
            worker = threading.Thread(
                target=here.run, args=(4, cost, lambda done: order.append(done.number))
            )
            worker.start()
            worker.join(1.5)
            assert worker.is_alive()
            assert order == [1, 2, 3]
            there._study.tell(0, [1.0, 2.0])
        worker.join(5)
        assert not worker.is_alive()
        assert here.finished[0].values == (1.0, 2.0)

    def test_a_heart_beats_for_an_evaluation_and_no_longer(self, tmp_path):
        study = trials(tmp_path)
        before = threading.active_count()
        study.run(1, lambda genome: time.sleep(0.4) or cost(genome))
        raw = optuna.load_study(study_name="test", storage=open_storage("", tmp_path)).trials
        assert raw[0].user_attrs["beat"] >= 2
        with pytest.raises(ZeroDivisionError):
            study.run(2, lambda genome: 1 / 0)
        assert threading.active_count() == before

    def test_a_claim_that_nobody_signed(self, tmp_path, monkeypatch):
        """Without a lock in common somebody may be about to; with one it was not finished."""
        monkeypatch.setattr("accel.search.study.UNSIGNED_S", 0.3)

        def order(storage) -> list[int]:
            study = Trials(storage, "t", GENES, PROVENANCE, FIRST, repair=lambda g: g, seed=7,
                           lock=tmp_path / "lock")  # fmt: skip
            study._study.ask()
            told: list[int] = []
            study.run(3, cost, lambda done: told.append(done.number))
            return told

        assert order(open_storage("", tmp_path)) == [0, 1, 2]
        assert order(open_storage(f"sqlite:///{tmp_path}/s.db", tmp_path))[0] != 0


def test_three_workers_share_a_study_without_a_lost_or_doubled_trial(tmp_path):
    workers = [start(tmp_path, 24) for _ in range(3)]
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    study = trials(tmp_path)
    raw = optuna.load_study(study_name="test", storage=open_storage("", tmp_path)).trials
    assert [t.state for t in raw] == [TrialState.COMPLETE] * 24
    genomes = [d.genome for d in study.finished]
    assert len(set(genomes)) == 24
    assert set(FIRST) <= set(genomes)
    assert all(cost(d.genome) == list(d.values) for d in study.finished)
    by = {json.dumps(t.user_attrs["worker"]) for t in raw}
    assert len(by) == 3
