"""Comparisons: isolated arms, paired times, what is made once, and what goes wrong in one arm."""

import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
from tiny_denoiser import tiny_plan
from tiny_wan import tiny_wan_config

from accel.choice import DENSE as DENSE_CHOICE
from accel.errors import AccelError, PlanError
from accel.pipelines import compare_book
from accel.pipelines.arm_commands import serve
from accel.pipelines.arm_meter import StepClock
from accel.pipelines.compare_arm import Arm
from accel.pipelines.compare_arms import DENSE, ArmSpec, named_plans
from accel.pipelines.compare_book import Book, Job
from accel.pipelines.compare_results import fastest_of, records_of
from accel.pipelines.compare_run import Comparison
from accel.pipelines.compare_settings import CompareSettings
from accel.pipelines.compare_table import as_markdown, as_text
from accel.pipelines.compare_worker import ArmFailed, Worker
from accel.pipelines.model_files import files_of
from accel.pipelines.model_settings import model_config
from accel.pipelines.pricing import warm_up_steps
from accel.pipelines.video_files import load_frames, save_frames
from accel.schedule import Schedule


class InProcess:
    """An arm without a process: the same commands, answers and failures, through JSON."""

    asked: list[tuple[str, str, str]]

    def __init__(self, folder, spec):
        self._name = folder.name
        self._arm = Arm(**json.loads(json.dumps(spec)))

    def ask(self, command, timeout_s):
        assert timeout_s > 0
        self.asked.append((self._name, command["do"], command.get("prompt", "")))
        answers = []
        serve(self._arm, [json.dumps(command)], answers.append)
        answer = json.loads(answers[0])
        if "error" in answer:
            raise ArmFailed(answer["error"])
        return answer["ok"]

    def close(self):
        self._arm = None


@pytest.fixture(scope="module")
def model(tiny_wan_path):
    return model_config(tiny_wan_config(tiny_wan_path))


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Two recipes, and a plan that was made for another model."""
    choice = {"select": {"kind": "full"}}
    plan = {
        "schema": 1,
        "name": "foreign",
        "model": "AnotherTransformer",
        "n_sites": 1,
        "head_dim": 24,
        "grid": None,
        "block": [64, 64],
        "schedule": {},
        "choices": [choice],
        "sites": {"blocks.0.attn1": [[0, 0]]},
    }
    path = tmp_path_factory.mktemp("plans") / "foreign.json"
    path.write_text(json.dumps(plan))
    return CompareSettings(
        plans={"foreign": str(path)},
        recipes=("sparsed", "pisa"),
        prompts=2,
        dtypes=("float32",),
        rounds=2,
        timing_prompts=1,
        command="accel-compare plan=foreign.json",
    )


def run(model, settings, folder):
    """The results, and what the arms were asked for."""
    asked = []
    launch = type("Launch", (InProcess,), {"asked": asked})
    return Comparison(model, settings, folder, launch).run(), asked


@pytest.fixture(scope="module")
def compared(model, settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    results, asked = run(model, settings, folder)
    return folder, results, asked


def test_results_hold_every_arm_with_its_measurements(compared):
    folder, results, _ = compared
    assert results == json.loads((folder / "results.json").read_text())
    assert results["schema"] == 1
    assert list(results["arms"]) == ["dense", "foreign", "sparsed", "pisa"]
    dense, sparsed = results["arms"]["dense"], results["arms"]["sparsed"]
    assert dense["speedup"] == 1
    assert dense["psnr"] is None
    assert dense["keep"] == 1
    assert sparsed["seconds"]["p20"] <= sparsed["seconds"]["median"] <= sparsed["seconds"]["p80"]
    assert sparsed["pairs"] == 3  # two prompts, and one of them again
    assert sparsed["paired_in_one_sitting"]
    assert sparsed["step_seconds"]["sparse"] > 0
    assert sparsed["step_seconds"]["dense"] is None  # step 1 of 4, which is not timed
    assert sparsed["peak_memory_bytes"] > 2**20
    assert 20 < sparsed["psnr"]["worst"] <= sparsed["psnr"]["mean"] <= 100
    assert 0.5 < sparsed["ssim"]["worst"] <= 1
    assert 0 < sparsed["keep"] < 1
    assert sparsed["accuracy"] is None
    assert sparsed["summary"]["plan"] == "sparsed"
    assert results["device"].endswith("threads")
    assert set(results["versions"]) >= {"python", "torch", "diffusers"}
    assert results["settings"]["dtype"] == "float32"


def test_an_arm_that_fails_is_reported_and_stops_no_other(compared):
    _, results, asked = compared
    foreign = results["arms"]["foreign"]
    assert "AnotherTransformer" in foreign["error"]
    assert foreign["speedup"] is None
    assert [a for a in asked if a[0] == "foreign"] == [("foreign", "start", "")]
    assert all("error" not in results["arms"][name] for name in ("dense", "sparsed", "pisa"))


def test_the_same_comparison_again_makes_nothing_but_what_is_missing(
    compared, model, settings, tmp_path
):
    original, before, _ = compared
    folder = shutil.copytree(original, tmp_path / "again")
    kept = replace(settings, plans={})
    next((folder / "arms" / "sparsed").glob("p01-*.npz")).unlink()
    _, asked = run(model, kept, folder)
    generated = [(arm, prompt) for arm, do, prompt in asked if do == "generate"]
    # beside it dense, whose time is of another sitting
    assert sorted(generated) == [(arm, "a two moving right") for arm in ("dense", "sparsed")]
    after, asked = run(model, kept, folder)
    assert [a for a in asked if a[1] == "generate"] == []
    assert after["arms"]["sparsed"]["psnr"] == before["arms"]["sparsed"]["psnr"]


def test_tables_name_every_arm_and_what_went_wrong(compared):
    _, results, _ = compared
    text, markdown = as_text(results), as_markdown(results)
    lines = text.splitlines()
    assert len({len(line) for line in lines[:5]}) == 1
    assert any(line.startswith("foreign failed: ") for line in lines[5:])
    assert markdown.splitlines()[0].startswith("| arm | speed-up |")
    assert "float32, 4 steps, prompts: 2, rounds: 2" in markdown


def test_measurements_of_other_noise_or_another_plan_are_not_taken_over(
    model, tmp_path, monkeypatch
):
    def book(seed=0, **changes):
        return Book(tmp_path, replace(model, **changes), ("a one",), seed, "now")

    arm = ArmSpec.of("window", "window")
    book().write(arm, "p00-r1", {"seconds": 1.0}, 0)
    job = Job(arm, 0, 1)
    assert book().result(job)["seconds"] == 1.0
    assert book(seed=1).result(job) is None
    assert book(dtype="bfloat16").result(job) is None
    assert book().result(Job(ArmSpec.of("window", "radial"), 0, 1)) is None
    monkeypatch.setattr(compare_book, "versions", lambda: {"torch": "another"})
    assert book().result(job) is None


def test_what_a_plan_expects_decides_what_it_runs_and_so_names_it(tmp_path):
    plan = tiny_plan(DENSE_CHOICE)
    path = plan.save(tmp_path / "accel_plan.json")
    as_file, as_folder = (ArmSpec.of("a", str(p)).identity for p in (path, tmp_path))
    assert as_file == as_folder
    ratios = {site: [2.0] * plan.schedule.n_bands for site in plan.sites}
    replace(plan, expected={"attention_ratio": ratios}).save(path)
    assert ArmSpec.of("a", str(path)).identity != as_file
    assert ArmSpec.of("a", str(tmp_path)).identity != as_file


def test_a_video_of_other_noise_is_not_taken_for_one_that_a_killed_comparison_made(model, tmp_path):
    """The arm writes the video, then dies with the comparison before that has noted it."""
    job = Job(DENSE, 0, 0)
    first = Book(tmp_path, model, ("a one",), 0, "now")
    save_frames(first.video(DENSE, 0), np.zeros((1, 8, 8, 3), np.float32))
    first.write(DENSE, job.stem, {"seconds": 1.0}, 0)
    killed = Book(tmp_path, model, ("a one",), 1, "later")
    save_frames(killed.video(DENSE, 0), np.ones((1, 8, 8, 3), np.float32))
    again = Book(tmp_path, model, ("a one",), 0, "at last")
    assert again.result(job)["seconds"] == 1.0
    assert load_frames(again.video(DENSE, 0)).max() == 0
    again.drop_others(again.video(DENSE, 0))
    assert list(again.arm_folder(DENSE).glob("*.npz")) == [again.video(DENSE, 0)]


def test_predictions_touch_no_arm_without_a_plan(model, tmp_path):
    books = [Book(tmp_path, model, ("a one",), 0, "now", priced=p) for p in (False, True)]
    keys = {arm: {book.key(arm, 0) for book in books} for arm in (DENSE, ArmSpec.of("w", "window"))}
    assert [len(k) for k in keys.values()] == [1, 2]


def test_another_classifier_judges_anew(model, tmp_path):
    judges = [tmp_path / name for name in ("old", "new")]
    for judge in judges:
        judge.mkdir()
        (judge / f"{judge.name}.safetensors").touch()
    old, new = (
        Book(tmp_path, replace(model, classifier=str(j)), ("a one",), 0, "now") for j in judges
    )
    old.write_quality(DENSE, 0, {"reads": True})
    assert old.quality(DENSE, 0)["reads"]
    assert new.quality(DENSE, 0) is None


def test_files_that_no_output_depends_on_do_not_count(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"1")
    before = files_of(str(tmp_path))
    (tmp_path / "README.md").write_text("a card")
    (tmp_path / "samples.png").touch()
    assert files_of(str(tmp_path)) == before
    (tmp_path / "model.safetensors").write_bytes(b"12")
    assert files_of(str(tmp_path)) != before


def test_the_precision_in_which_dense_is_fastest_is_taken(model, settings, tmp_path):
    class Probed:
        """bfloat16 has the slower start and the faster steps; float16 does not run."""

        def __init__(self, folder, spec):
            self._dtype = spec["model"]["dtype"]

        def ask(self, command, timeout_s):
            if self._dtype == "float16":
                raise ArmFailed("no float16 here")
            step = {"float32": 0.5, "bfloat16": 0.25}[self._dtype]
            return {"seconds": 6 - 4 * step, "steps": 4, "step_seconds": {"all": step}}

        def close(self):
            self._dtype = None

    long = replace(model, call={**model.call, "num_inference_steps": 40})
    wanted = replace(settings, dtypes=("float32", "bfloat16", "float16"))
    comparison = Comparison(long, wanted, tmp_path, Probed)
    assert comparison.probe["seconds"] == {"float32": 22.0, "bfloat16": 14.0}
    assert comparison.probe["errors"] == {"float16": "no float16 here"}
    assert comparison.model.dtype == "bfloat16"


def test_arms_take_turns_in_being_first(model, settings, tmp_path):
    jobs = Comparison(model, replace(settings, rounds=3), tmp_path, InProcess).jobs
    firsts = [jobs[i].arm.name for i in range(0, len(jobs), 4)]
    assert firsts == ["dense", "foreign", "foreign", "sparsed"]
    assert [(j.prompt, j.round) for j in jobs[::4]] == [(0, 0), (1, 0), (0, 1), (0, 2)]


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [(Schedule(), 2), (Schedule(dense_end=0.2), 3), (Schedule(dense_start=1.0), 2)],
)
def test_warming_up_has_a_sparse_step_where_there_is_one(schedule, steps):
    assert warm_up_steps(schedule, limit=10) == steps


def test_steps_are_timed_between_callbacks():
    import torch

    clock, state = StepClock(torch.device("cpu")), {"latents": 1}
    assert [clock(None, i, 0, state) for i in range(3)] == [state] * 3
    assert len(clock.steps) == 2


ECHO = """
import sys, json, time
for line in sys.stdin:
    do = json.loads(line)["do"]
    if do == "die": print("no memory left", file=sys.stderr); sys.exit(3)
    if do == "hang": time.sleep(60)
    print(json.dumps({"error": "bad"} if do == "fail" else {"ok": {"done": do}}), flush=True)
"""


@pytest.mark.parametrize(
    ("do", "message"),
    [("fail", "^bad$"), ("die", "code 3: no memory left"), ("hang", r"within 0.5 s \(arms_timeo")],
)
def test_a_worker_that_fails_says_how(tmp_path, do, message):
    worker = Worker(tmp_path, {}, (sys.executable, "-c", ECHO))
    assert worker.ask({"do": "start"}, 60) == {"done": "start"}
    with pytest.raises(ArmFailed, match=message):
        worker.ask({"do": do}, 0.5 if do == "hang" else 60)
    worker.close()


def test_an_arm_ends_with_its_stdin_whatever_it_is_doing(tmp_path):
    busy = (
        "import sys, time\n"
        "from accel.pipelines.arm_commands import until_closed\n"
        "for line in until_closed(sys.stdin): print('{\"ok\": {}}', flush=True); time.sleep(600)"
    )
    worker = Worker(tmp_path, {}, (sys.executable, "-c", busy))
    worker.ask({"do": "start"}, 60)
    worker.close()
    assert worker.returncode == 0  # not killed after CLOSING_S


def test_an_arm_answers_errors_and_goes_on(model):
    answers = []
    lines = ['{"do": "generate", "prompt": "a one", "seed": 0}', '{"do": "__init__"}']
    serve(Arm(tiny_wan_config(model.path), None), lines, answers.append)
    first, second = map(json.loads, answers)
    assert first == {"error": "the arm was not started"}
    assert "not '__init__'" in second["error"]


def test_wrong_settings_are_refused_before_anything_runs(model, settings, tmp_path):
    with pytest.raises(PlanError, match="did you mean 'sparsed'"):
        replace(settings, recipes=("sparsd",))
    with pytest.raises(AccelError, match="rounds is 0"):
        replace(settings, rounds=0)
    with pytest.raises(AccelError, match="did you mean 'float32'"):
        replace(settings, dtypes=("float23",))
    with pytest.raises(AccelError, match="has 2"):
        replace(settings, prompts=3).prompts_of(model)
    with pytest.raises(AccelError, match="cannot be called 'dense'"):
        _ = replace(settings, plans={"dense": "a"}).arms
    with pytest.raises(AccelError, match="no file"):
        named_plans("nowhere.json")
    with pytest.raises(AccelError, match="prompts is empty"):
        replace(settings, prompts=[])
    with pytest.raises(AccelError, match=r"recipes is .* it is a list of texts"):
        replace(settings, recipes=["sparsed", " "])


def test_one_text_is_a_list_of_one(settings, model):
    assert list(replace(settings, recipes="sparsed").recipes) == ["sparsed"]
    assert replace(settings, prompts="a seven").prompts_of(model) == ("a seven",)


def test_plans_are_named_by_their_files_or_by_the_user(tmp_path):
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path in paths:
        tiny_plan(DENSE_CHOICE).save(path)
    assert named_plans(None) == {}
    assert list(named_plans(str(paths[0]))) == ["a"]
    assert list(named_plans(list(map(str, paths)))) == ["a", "b"]
    assert list(named_plans({"mild": str(paths[0])})) == ["mild"]
    with pytest.raises(AccelError, match="same name"):
        named_plans([str(paths[0])] * 2)
    paths[1].write_bytes(paths[0].read_bytes()[:300])
    with pytest.raises(PlanError, match=r"b\.json is not a whole JSON file"):
        named_plans([str(path) for path in paths])
    assert DENSE.plan is None


@pytest.mark.slow
def test_the_process_of_an_arm_generates(model, tmp_path):
    worker = Worker(tmp_path, {"plan": "sparsed", "model": tiny_wan_config(model.path)})
    assert worker.ask({"do": "start"}, 240)["plan"] == "sparsed"
    made = worker.ask(
        {"do": "generate", "prompt": "a one", "seed": 0, "save": str(tmp_path / "v.npz")}, 240
    )
    assert made["seconds"] > 0
    assert (tmp_path / "v.npz").is_file()
    worker.close()


def test_the_report_is_written_from_what_was_measured(compared):
    from accel.pipelines.report import write_report

    folder, _, _ = compared
    page = write_report(folder).read_text()
    assert "foreign failed: " in page
    # the first arm failed: maps are those of the next one
    for title in ("What is computed, and what it holds", "Attention and kept blocks of sparsed"):
        assert f"<h2>{title}</h2>" in page
    assert len(list((folder / "animations").glob("*.gif"))) >= 3


def test_speed_is_measured_against_the_fastest_dense_arm(model, settings, tmp_path):
    wanted = replace(
        settings, plans={}, recipes=("sparsed",), prompts=1, baselines=("dense", "full")
    )
    results, _ = run(model, wanted, tmp_path)
    arms = results["arms"]
    assert list(arms) == ["dense", "full", "sparsed"]
    assert results["baselines"] == ["dense", "full"]
    assert arms["full"]["psnr"]["worst"] > 60
    assert arms["full"]["keep"] == 1
    assert arms["full"]["summary"]["rows"][0]["kernels"] != ["dense"]
    fastest = results["baseline"]
    assert arms[fastest]["speedup"] == 1
    assert all(arms[name]["speedup"] <= 1 for name in ("dense", "full"))
    for arm in arms.values():
        assert arm["speedup"] == arm["speedup_over"][fastest]
    assert (tmp_path / arms["sparsed"]["maps"]["file"]).is_file()


class TimedBook(Book):
    """Knows how long every job took, and no more."""

    prompts = ("a", "b")

    def __init__(self, seconds):
        self.seconds = seconds

    def result(self, job):
        return {"sitting": 0, "seconds": self.seconds[job.arm.name][job.prompt]}


def test_no_dense_arm_is_faster_than_the_fastest():
    dense, full = ArmSpec("dense"), ArmSpec("full")
    book = TimedBook({"dense": (2.0, 0.8), "full": (1.0, 2.0)})  # medians of ratios: 1.2 and 1.5
    jobs = [Job(arm, prompt, 0) for arm in (dense, full) for prompt in (0, 1)]
    assert fastest_of(records_of(book, jobs), (dense, full)) == dense
    book.seconds["full"] = (1.0, 1.5)
    assert fastest_of(records_of(book, jobs), (dense, full)) == full


def test_a_baseline_is_dense(settings):
    with pytest.raises(AccelError, match="begins with 'dense'"):
        replace(settings, baselines=("full",))
    with pytest.raises(AccelError, match="no baseline 'sparsed'"):
        replace(settings, baselines=("dense", "sparsed"))
    with pytest.raises(AccelError, match="cannot be called 'full'"):
        _ = replace(settings, recipes=("full",), baselines=("dense", "full")).arms


def test_speed_is_predicted_from_costs_measured_once_for_all_arms(model, settings, tmp_path):
    wanted = replace(
        settings,
        plans={},
        recipes=("window", "radial", "xattention"),
        prompts=1,
        rounds=1,
        predict=True,
    )
    results, asked = run(model, wanted, tmp_path)
    assert [arm for arm, do, _ in asked if do == "price"] == list(wanted.recipes)
    assert results["arms"]["dense"]["predicted_speedup"] is None
    assert 0 < results["arms"]["window"]["predicted_speedup"] < 100
    assert results["arms"]["window"]["predicted_from"] == f"measured on {results['device']}"
    assert "predicted times rest on kernel costs: measured on" in as_text(results)
    # how much it keeps only the call can tell, and the warm-up is one
    assert 0 < results["arms"]["xattention"]["predicted_speedup"] < 100
    assert len(list(tmp_path.glob("costs/*/baseline.json"))) == 1
    # of two blocks: xattention has its own
    assert len(list(tmp_path.glob("costs/*/costs-*.json"))) == 2
