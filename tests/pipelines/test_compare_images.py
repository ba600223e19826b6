"""A comparison of an image pipeline: images are videos of one frame, and nothing else changes."""

import json

import pytest
from PIL import Image
from tiny_flux import CALL, tiny_flux_config

from accel.pipelines.arm_commands import serve
from accel.pipelines.compare_arm import Arm
from accel.pipelines.compare_run import Comparison
from accel.pipelines.compare_settings import CompareSettings
from accel.pipelines.compare_table import as_text
from accel.pipelines.compare_worker import ArmFailed
from accel.pipelines.model_settings import model_config
from accel.pipelines.report import write_report
from accel.pipelines.video_files import load_frames


class InProcess:
    """An arm without a process: the same commands and answers, through JSON."""

    def __init__(self, folder, spec):
        self._arm = Arm(**json.loads(json.dumps(spec)))

    def ask(self, command, timeout_s):
        answers = []
        serve(self._arm, [json.dumps(command)], answers.append)
        answer = json.loads(answers[0])
        if "error" in answer:
            raise ArmFailed(answer["error"])
        return answer["ok"]

    def close(self):
        self._arm = None


@pytest.fixture(scope="module")
def compared(tiny_flux_path, tmp_path_factory):
    config = tiny_flux_config(tiny_flux_path)
    model = model_config({**config, "classifier": "samples/models/digit-classifier"})
    settings = CompareSettings(
        plans={},
        recipes=("window",),
        prompts=2,
        dtypes=("float32",),
        rounds=1,
        timing_prompts=1,
        command="accel-compare model=tiny-flux",
    )
    folder = tmp_path_factory.mktemp("compare-images")
    results = Comparison(model, settings, folder, InProcess).run()
    write_report(folder)
    return folder, results


def test_every_arm_of_an_image_pipeline_is_measured(compared):
    folder, results = compared
    dense, window = results["arms"]["dense"], results["arms"]["window"]
    assert window["speedup"] > 0
    assert 0 < window["keep"] <= 1
    assert 5 < window["psnr"]["worst"] <= 100
    for made in (*dense["videos"], *window["videos"]):
        assert load_frames(folder / made["file"]).shape == (1, CALL["height"], CALL["width"], 3)


def test_a_classifier_looks_in_the_places_that_prompts_name(compared):
    _, results = compared
    assert all(arm["accuracy"] in (0.0, 0.5, 1.0) for arm in results["arms"].values())


def test_an_image_does_not_flicker_and_the_table_says_nothing_of_it(compared):
    _, results = compared
    assert results["arms"]["window"]["flicker"] == 0
    assert results["arms"]["window"]["flicker_ratio"] is None
    assert "flicker" not in as_text(results)


def test_the_report_shows_images(compared):
    folder, _ = compared
    page = (folder / "report.html").read_text()
    assert "images of 48 x 32" in page
    assert "1 frames" not in page
    shown = sorted((folder / "animations").glob("*.gif"))
    assert shown
    with Image.open(shown[0]) as image:
        assert image.n_frames == 1
