"""A comparison of a model that sees images: baselines, smaller inputs, tables, and the report."""

import json
import re
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import tiny_vision
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from accel.choice import DENSE
from accel.errors import AccelError
from accel.pipelines.adapters import geometry_of
from accel.pipelines.arm_commands import serve
from accel.pipelines.compare import compare
from accel.pipelines.compare_arm import Arm
from accel.pipelines.compare_findings import findings_of
from accel.pipelines.compare_run import Comparison
from accel.pipelines.compare_settings import CompareSettings
from accel.pipelines.compare_table import as_markdown, as_text
from accel.pipelines.compare_worker import ArmFailed
from accel.pipelines.host import Host
from accel.pipelines.model_settings import model_config
from accel.pipelines.report import write_report
from accel.pipelines.report_vision import coloured, differing, kept_over
from accel.plan import Plan
from accel.schedule import Schedule
from accel.window_keeps import WindowKeeps

# timm's, where a window is larger than the map of a smaller input
pytestmark = pytest.mark.filterwarnings("ignore:.*(non-contiguous|non-tuple sequence)")


class InProcess:
    """An arm without a process: the same commands and answers, through JSON."""

    asked: list[tuple[str, str]]

    def __init__(self, folder, spec):
        self._name = folder.name
        self._arm = Arm(**json.loads(json.dumps(spec)))

    def ask(self, command, timeout_s):
        self.asked.append((self._name, command["do"]))
        answers = []
        serve(self._arm, [json.dumps(command)], answers.append)
        answer = json.loads(answers[0])
        if "error" in answer:
            raise ArmFailed(answer["error"])
        return answer["ok"]

    def close(self):
        self._arm = None


def run(model, settings, folder):
    """The results, and what the arms were asked for."""
    asked = []
    launch = type("Launch", (InProcess,), {"asked": asked})
    return Comparison(model, settings, folder, launch).run(), asked


def tiny_settings(**changes):
    asked = {
        **{"plans": {}, "recipes": None, "prompts": None, "dtypes": ("float32",), "rounds": 1},
        **{"output": "vision", "baselines": ("eager", "fused")},
    }
    return CompareSettings(**{**asked, **changes})


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: tiny_vision.tiny_vision_path(folder / name, name) for name in ("swin", "vit")}


@pytest.fixture(scope="module")
def model(paths):
    # two groups, of three images each
    config = tiny_vision.tiny_vision_config(paths["swin"])
    return model_config({**config, "prompts": ["test/000-002", "test/003-005"]})


@pytest.fixture(scope="module")
def plan(model, tmp_path_factory):
    """A plan of a Swin that computes some of its windows."""
    geometry = geometry_of(Host(model).pipe)
    keeps = WindowKeeps(keeps={geometry.sites[0].name: 0.5})
    schedule = Schedule(dense_start=0.0)
    made = Plan.uniform("mine", geometry, DENSE, schedule=schedule, windows=keeps)
    return str(made.save(tmp_path_factory.mktemp("plans") / "mine.json"))


@pytest.fixture(scope="module")
def compared(model, plan, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare-vision")
    settings = tiny_settings(
        plans={"mine": plan}, scaled=[0.5], command="accel-compare model=tiny-vision"
    )
    results, asked = run(model, settings, folder)
    write_report(folder)
    return folder, results, asked, settings


def test_every_arm_is_measured(compared):
    folder, results, _, _ = compared
    arms = results["arms"]
    assert list(arms) == ["dense", "fused", "mine", "scaled-0.5"]
    assert results == json.loads((folder / "results.json").read_text())
    assert results["baselines"] == ["dense", "fused"]
    assert results["baseline"] in results["baselines"]
    for arm in arms.values():
        assert "error" not in arm
        assert arm["speedup"] > 0
        assert arm["images_per_second"] == pytest.approx(3 / arm["seconds"]["median"], rel=0.5)
        assert arm["batch_seconds"] == pytest.approx(arm["seconds"]["median"] / 2, rel=0.5)
        assert 0 < arm["miou"] < 1
        assert arm["top1"] is None
        assert arm["peak_memory_bytes"] > 2**20
        assert arm["about"]["parameters"] > 10_000
        assert arm["about"]["task"] == "segmentation"
    # a sixth of what is asked for is another class than the model finds
    assert arms["dense"]["pixel_accuracy"] == pytest.approx(5 / 6)
    assert arms["dense"]["agreement"] is None
    assert arms["dense"]["score_change"] == 0
    assert arms["fused"]["agreement"]["worst"] > 0.99
    assert abs(arms["fused"]["score_change"]) < 0.01
    scaled = arms["scaled-0.5"]
    assert scaled["agreement"]["mean"] < 0.99
    assert scaled["score_change"] == pytest.approx(scaled["miou"] - arms["dense"]["miou"])
    assert scaled["about"]["image_size"] == [16, 24]
    assert arms["mine"]["about"]["image_size"] == [32, 48]
    assert arms["dense"]["against_scaled"] is arms["scaled-0.5"]["against_scaled"] is None


def test_a_plan_is_held_against_smaller_inputs_at_its_time(compared):
    _, before, _, _ = compared
    results = json.loads(json.dumps(before))
    told = {results["baseline"]: (1.0, 0.5), "scaled-0.5": (2.0, 0.4), "mine": (1.6, 0.48)}
    for name, (speedup, score) in told.items():
        results["arms"][name] |= {"speedup": speedup, "score": score}
    # times 1 with 50 and 0.5 with 40: 42.5 at 0.625
    found = findings_of(results)["arms"]["mine"]["against_scaled"]
    assert found["score"] == pytest.approx(42.5)
    assert found["above"] == pytest.approx(-5.5)
    assert before["arms"][before["baseline"]]["speedup"] == 1.0


def test_smaller_inputs_are_those_of_the_fastest_baseline(compared):
    _, results, asked, _ = compared
    probe = results["settings"]["probe"]
    assert set(probe["dense_seconds"]) == {"dense", "fused"}
    assert probe["fastest"] == min(probe["dense_seconds"], key=probe["dense_seconds"].get)
    setups = {name: arm["setup"] for name, arm in results["arms"].items()}
    assert setups["scaled-0.5"] == {**setups[probe["fastest"]], "scale": 0.5}
    assert setups["dense"] == {}
    assert setups["fused"] == setups["mine"] == {"fused": True}
    assert {do for _, do in asked} == {"start", "generate"}  # nothing is priced or looked at


def test_tables_say_what_is_seen(compared):
    _, results, _, _ = compared
    head = as_text(results).splitlines()[0]
    for word in ("images/s", "ms a batch", "mIoU", "scaled points", "agreement"):
        assert word in head
    for word in ("PSNR", "top-1", "step ms", "compile s"):
        assert word not in head
    assert "float32, images in batches of 2, prompts: 2" in as_markdown(results)


def test_the_report_shows_maps_differences_and_kept_windows(compared):
    folder, *_ = compared
    page = (folder / "report.html").read_text()
    titles = re.findall(r"<h2>([^<]+)</h2>", page)
    assert titles[:3] == ["Speed, memory and quality", "Trade-off", "IoU by class"]
    shown = [title for title in titles if title.startswith("Image test/")]
    assert shown[0] == "Image test/000"
    assert len(shown) == 3
    assert titles[-1] == "How it was measured"
    for told in ("what is right", "differs from dense", "layers.0: 50% of its windows"):
        assert told in page
    for name in ("trade-off.svg", "agreement.svg"):
        assert (folder / name).is_file()


def test_the_same_again_makes_nothing(compared, model, tmp_path):
    original, before, _, settings = compared
    folder = shutil.copytree(original, tmp_path / "again")
    after, asked = run(model, settings, folder)
    assert asked == []
    assert after["arms"] == before["arms"]


def test_a_classifier_is_compared_by_the_classes_of_its_images(paths, tmp_path):
    config = model_config(tiny_vision.tiny_vision_config(paths["vit"], 3))
    settings = tiny_settings(baselines=("dense", "compiled"), compile={"backend": "eager"})
    results, _ = run(config, settings, tmp_path)
    arms = results["arms"]
    assert arms["dense"]["top1"] == arms["compiled"]["top1"] == pytest.approx(5 / 6)
    assert arms["compiled"]["setup"] == {"fused": True, "compile": {"backend": "eager"}}
    assert arms["compiled"]["compile_seconds"] > 0  # of a compiler that only traces
    assert arms["dense"]["compile_seconds"] is None
    for word in ("top-1", "compile s"):
        assert word in as_text(results).splitlines()[0]
    page = write_report(tmp_path).read_text()
    assert "<h2>Classes of the first images</h2>" in page
    assert page.count("<mark>") == 2  # one image, by both arms
    assert "IoU by class" not in page


def test_everything_is_set_in_the_configuration(paths, tmp_path, capsys, monkeypatch):
    launch = type("Launch", (InProcess,), {"asked": []})
    run_here = partial(Comparison, launch=launch)
    monkeypatch.setattr("accel.pipelines.compare.Comparison", run_here)
    model = tiny_vision.tiny_vision_config(paths["swin"])
    with initialize_config_module(version_base="1.3", config_module="accel.configs"):
        config = compose("compare", ["baselines=[eager]", "rounds=1", "scaled=[0.5]"])
    config = OmegaConf.to_container(config)
    compare({**config, "model": model, "dtype": "float32", "out": str(tmp_path)}, "typed")
    told = capsys.readouterr().out
    assert "csv: " in told
    lines = (tmp_path / "results.csv").read_text().splitlines()
    assert [line.split(",")[1] for line in lines] == ["arm", "dense", "scaled-0.5"]


def test_samples_are_configured():
    with initialize_config_module(version_base="1.3", config_module="accel.configs"):
        config = OmegaConf.to_container(compose("compare", ["experiment=swin-digits"]))
        vit = OmegaConf.to_container(compose("compare", ["model=vit-digits"]))["model"]
    assert config["model"]["output"] == vit["output"] == "vision"
    assert (config["scaled"], config["baselines"][0]) == ([0.75, 0.5], "eager")
    for one in (config["model"], vit):
        model_config({**one, "prompts": ["test/000"], "calibration": ["calibration/000"]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baselines": ("fused",)}, r"it begins with 'dense'"),
        ({"baselines": ("dense", "half")}, "no baseline 'half'.* Known: compiled, dense, fused"),
        ({"scaled": [1.5]}, "scaled has 1.5; inputs are made smaller"),
        (
            {"output": "frames", "baselines": ("dense",), "compile": {}, "scaled": [0.5]},
            "of frames",
        ),
        ({"output": "text", "baselines": ("dense",), "compiled": True}, "not of text"),
        ({"output": "frames", "baselines": ("eager",), "compile": {}}, "it begins with 'dense'"),
        ({"combined": "all"}, "know nothing of a model of vision"),
        ({"recipes": ["sparse_dllm"]}, "is not for models of vision"),
    ],
)
def test_what_cannot_be_compared_is_refused(changes, message):
    with pytest.raises(AccelError, match=message):
        tiny_settings(**changes)


def test_models_of_plans_are_compiled_where_that_is_asked(plan):
    both = {"mine": plan, "other": plan}
    for compiled, expected in ((True, {"mine", "other"}), (["other"], {"other"}), (False, set())):
        baselines = ("eager", "fused", "compiled")
        arms = tiny_settings(plans=both, compiled=compiled, baselines=baselines).arms
        found = {a.name for a in arms if a.kind == "plan" and "compile" in json.loads(a.setup)}
        assert found == expected


def test_a_plan_is_set_up_as_what_it_is_measured_against(plan):
    arms = tiny_settings(plans={"mine": plan}, baselines=("eager",)).arms
    assert not any(arm.setup for arm in arms)
    with pytest.raises(AccelError, match=r"add 'compiled'"):
        tiny_settings(plans={"mine": plan}, compiled=True)
    wrong = tiny_settings(plans={"mine": plan}, baselines=("eager", "compiled"), compiled=["mime"])
    with pytest.raises(AccelError, match="'mime', which is no arm; did you mean 'mine'"):
        _ = wrong.arms


def test_quality_is_of_all_images_where_nothing_is_said(model):
    assert tiny_settings(scaled=0.5).scaled == (0.5,)
    assert tiny_settings().prompts_of(replace(model, prompts=model.prompts * 9)) == (
        *model.prompts * 9,
    )


def test_pictures_are_of_the_pixels_that_they_tell_of():
    pixels = np.full((6, 9, 3), 200, np.uint8)
    kept = np.array([[True, False, True], [False, True, True]])
    over = kept_over(pixels, kept).astype(int)
    centres = over[1::3, 1::3].mean(-1)  # the middle of each window, away from its outline
    assert (centres > 100).tolist() == kept.tolist()
    apart = differing(pixels, np.eye(6, 9, dtype=bool))
    assert (apart[..., 0] > apart[..., 1]).sum() == 6
    shown = coloured(np.array([[0, 1, 255]]), 3)
    assert shown[0, 0].min() > 240
    assert shown[0, 2].tolist() == [128, 128, 128]
    assert len({tuple(c) for c in coloured(np.arange(11)[None], 11)[0].tolist()}) == 11
