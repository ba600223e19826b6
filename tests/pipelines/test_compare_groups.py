"""More arms than fit into memory: groups, each beside the dense arms, in sittings of their own."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from tiny_wan import tiny_wan_config

from accel.pipelines.caches import CacheSpec
from accel.pipelines.compare_run import Comparison
from accel.pipelines.compare_settings import CompareSettings
from accel.pipelines.compare_table import as_text
from accel.pipelines.compare_worker import ArmFailed
from accel.pipelines.model_settings import model_config
from accel.pipelines.video_files import save_frames

SETTINGS = CompareSettings(
    plans={},
    recipes=("window", "radial", "sparsed", "pisa"),
    caches={"pab": CacheSpec("pab")},
    prompts=("a one", "a two"),
    dtypes=(),
    rounds=2,
    timing_prompts=1,
    baselines=("dense", "half"),
    loaded_at_once=4,
)


class Machine:
    """Runs arms that answer at once, and slows down with every generation."""

    def __init__(self, failing=(), stop_after=None, blind=None):
        self.failing = failing
        self.blind = blind  # what an arm that shall show maps fails at
        self.stop_after = stop_after
        self.loaded = set()
        self.most = 0
        self.log = []
        self.specs = {}
        self.now = itertools.count(1)

    def __call__(self, folder, spec):
        return Worker(self, folder.name, spec)

    def made(self, name=None):
        return [(n, p) for n, do, p, _ in self.log if do == "generate" and name in (None, n)]


class Worker:
    def __init__(self, machine, name, spec):
        self.machine, self.name = machine, name
        machine.loaded.add(name)
        machine.specs[name] = json.loads(json.dumps(spec))
        machine.most = max(machine.most, len(machine.loaded))

    def ask(self, command, timeout_s):
        machine = self.machine
        if self.name in machine.failing or command["do"] == machine.blind:
            self.close()
            raise ArmFailed("it does not run here")
        machine.log.append(
            (self.name, command["do"], command.get("prompt"), command.get("save", ""))
        )
        if machine.stop_after == len(machine.made()):
            raise KeyboardInterrupt
        if command["do"] == "start":
            return {"load_s": 1.0, "device": "a CPU", "plan": None, "predicted_speedup": None}
        if command["do"] == "look":
            np.savez(command["save"], keep=np.ones(1))
            return {"step": 1, "steps": 2, "maps": []}
        if "save" in command:
            save_frames(command["save"], np.full((2, 16, 16, 3), 0.5, np.float32))
        # each generation takes a second more than the one before; a half is a fifth faster
        seconds = next(machine.now) * (0.8 if self.name == "half" else 1.0)
        steps = {"all": 0.1, "dense": 0.1, "sparse": None}
        memory = {"peak_memory_bytes": 2**30, "summary": None}
        return {"seconds": seconds, "step_seconds": steps, **memory}

    def close(self):
        self.machine.loaded.discard(self.name)


@pytest.fixture
def model(tmp_path):
    return model_config(tiny_wan_config(tmp_path / "model"))


def run(model, folder, machine, settings=SETTINGS):
    return Comparison(model, settings, folder, machine).run()


def test_no_more_are_loaded_than_there_is_room_for(model, tmp_path):
    machine = Machine()
    results = run(model, tmp_path / "c", machine)
    assert machine.most == 4
    assert not machine.loaded
    starts = [name for name, do, _, _ in machine.log if do == "start"]
    assert starts == ["dense", "half", "window", "radial", "sparsed", "pisa", "pab"]
    assert [name for name, do, _, _ in machine.log if do == "look"] == ["window"]
    assert CacheSpec.of(machine.specs["pab"]["cache"]) == CacheSpec("pab")
    assert machine.specs["pab"]["plan"] is None
    assert machine.specs["window"]["cache"] is None
    assert machine.specs["window"]["precision"] == "half"
    assert results["arms"]["window"]["precision"] == "half"
    assert results["arms"]["pab"]["precision"] is None
    assert list(results["arms"]) == ["dense", "half", *SETTINGS.recipes, "pab"]


def test_every_group_is_timed_beside_dense_in_a_sitting_of_its_own(model, tmp_path):
    machine = Machine()
    results = run(model, tmp_path / "c", machine)
    # 3 groups with 3 jobs each, and the videos of dense are made once
    assert len(machine.made("dense")) == 9
    assert len(machine.made("window")) == 3
    saved = [s for n, do, _, s in machine.log if do == "generate" and n == "dense" and s]
    assert len(saved) == 2
    assert len(results["sittings"]) == 3
    told = results["dense_runs"]["dense"]
    assert told["runs"] == 9
    assert 1 < told["most_over_least"] < told["seconds"]["most"] / told["seconds"]["least"]
    for name, arm in results["arms"].items():
        assert arm["paired_in_one_sitting"], name
        # were an arm of the last group held against dense of the first, it would seem slow
        assert 0.6 < arm["speedup_over"]["dense"] < 1.6, name
        assert arm["pairs"] == (9 if name in ("dense", "half") else 3)
    assert results["baseline"] == "half"


def test_what_is_done_is_not_done_again(model, tmp_path):
    folder = tmp_path / "c"
    before = run(model, folder, Machine())
    again = Machine()
    after = run(model, folder, again)
    assert again.log == []
    assert after["arms"] == before["arms"]
    (folder / "arms" / "pisa" / "p00-r1.json").unlink()
    again = Machine()
    run(model, folder, again)
    # and dense once more in that turn, for the old times are of another sitting
    assert sorted(again.made()) == [("dense", "a one"), ("half", "a one"), ("pisa", "a one")]


def test_every_turn_of_an_arm_is_paired_with_dense_of_the_same_turn_and_sitting(model, tmp_path):
    """An arm that is added to the first group, where dense was timed days ago, and a later turn."""
    folder = tmp_path / "c"
    few = replace(SETTINGS, recipes=("window",), caches={})
    run(model, folder, Machine(), few)
    slow = Machine()
    slow.now = itertools.count(1000)  # the machine of today
    results = run(model, folder, slow, replace(few, recipes=("window", "radial")))
    assert {name for name, _ in slow.made()} == {"dense", "half", "radial"}
    assert all(not saved for name, do, _, saved in slow.log if name == "dense" and do == "generate")
    radial = results["arms"]["radial"]
    assert radial["paired_in_one_sitting"]
    assert radial["pairs"] == 3
    assert radial["speedup_over"]["dense"] == pytest.approx(1, abs=0.01)
    assert results["arms"]["dense"]["pairs"] == 6
    before = results["arms"]["window"]["speedup"]
    later = run(model, folder, Machine(), replace(few, recipes=("window", "radial"), rounds=3))
    assert later["arms"]["radial"]["pairs"] == 4
    assert later["arms"]["window"]["paired_in_one_sitting"]
    assert later["arms"]["window"]["speedup"] == pytest.approx(before, rel=0.3)


def test_dense_is_timed_again_for_no_arm_that_fails(model, tmp_path):
    folder = tmp_path / "c"
    run(model, folder, Machine(failing=("radial",)))
    again = Machine(failing=("radial",))
    run(model, folder, again)
    assert again.made() == []
    (folder / "arms" / "window" / "p00-r1.json").unlink()
    again = Machine(failing=("radial",))
    run(model, folder, again)
    assert sorted(again.made()) == [("dense", "a one"), ("half", "a one"), ("window", "a one")]


@pytest.mark.parametrize("stop_after", [1, 14, 20])
def test_a_comparison_that_was_killed_goes_on_where_it_was(model, tmp_path, stop_after):
    whole = Machine()
    run(model, tmp_path / "whole", whole)
    killed = Machine(stop_after=stop_after)
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "c", killed)
    assert not killed.loaded
    rest = Machine()
    results = run(model, tmp_path / "c", rest)
    done = killed.made()[:-1]  # the one in flight is lost
    made = sorted(done + rest.made())
    sparse = [job for job in made if job[0] not in SETTINGS.baselines]
    assert sparse == sorted(job for job in whole.made() if job[0] not in SETTINGS.baselines)
    # beside arms that were all done, there is nothing to be timed any more; of the turn that was
    # cut in two, each dense arm is timed in both sittings
    assert len(whole.made()) - 1 <= len(made) <= len(whole.made()) + 2
    assert all(arm["pairs"] for arm in results["arms"].values())


@pytest.mark.parametrize("blind", ["look", "start"])
def test_an_arm_that_shows_no_maps_has_not_failed(model, tmp_path, blind):
    folder = tmp_path / "c"
    if blind == "start":  # all is measured, and the arm is started for its maps alone
        run(model, folder, Machine())
        for maps in (folder / "arms" / "window").glob("maps*"):
            maps.unlink()
    results = run(model, folder, Machine(blind=blind))
    window = results["arms"]["window"]
    assert "error" not in window
    assert window["pairs"] == 3
    assert window["maps_error"] == "it does not run here"
    assert "window has no attention maps: it does not run here" in as_text(results)
    again = Machine()
    assert "maps_error" not in run(model, folder, again)["arms"]["window"]
    assert [do for _, do, _, _ in again.log] == ["start", "look"]


def test_dense_is_not_timed_beside_arms_that_all_failed(model, tmp_path):
    machine = Machine(failing=("sparsed", "pisa"))
    results = run(model, tmp_path / "c", machine)
    assert results["arms"]["pisa"]["error"] == "it does not run here"
    assert len(machine.made("dense")) == 6
    assert results["arms"]["pab"]["pairs"] == 3


def test_an_arm_that_is_added_is_timed_beside_dense_of_its_group(model, tmp_path):
    folder = tmp_path / "c"
    run(model, folder, Machine(), replace(SETTINGS, caches={}))
    machine = Machine()
    results = run(model, folder, machine)
    assert {name for name, _ in machine.made()} == {"dense", "half", "pab"}
    assert results["arms"]["pab"]["paired_in_one_sitting"]
    assert results["arms"]["pab"]["pairs"] == 3
