"""The report: one file with everything in it, from whatever a comparison left behind."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from tiny_wan import tiny_wan_config

from accel.pipelines import figures
from accel.pipelines.compare_run import Comparison
from accel.pipelines.compare_settings import CompareSettings
from accel.pipelines.compare_worker import ArmFailed
from accel.pipelines.model_settings import model_config
from accel.pipelines.report import write_report
from accel.pipelines.video_files import save_frames

FRAMES, HEIGHT, WIDTH = 4, 16, 20


def _row(site, phase, keep, recall):
    return {"site": site, "phase": phase, "calls": 2, "keep": keep, "recall": recall,
            "worst_recall": recall and recall - 0.2}  # fmt: skip


class Canned:
    """Arms that answer at once: noisy videos, two layers of which the first stays dense."""

    def __init__(self, folder, spec):
        self._plan = spec["plan"]
        self._noise = np.random.default_rng(len(folder.name))

    def ask(self, command, timeout_s):
        if self._plan == "radial":
            raise ArmFailed("no <memory> left")
        return getattr(self, command.pop("do"))(**command)

    def start(self):
        return {"load_s": 1.0, "warm_up_s": 2.0, "device": "a CPU, 2 threads", "plan": self._plan,
                "digest": None, "predicted_speedup": 1.5}  # fmt: skip

    def generate(self, prompt, seed, save):
        video = np.linspace(0, 0.5, FRAMES * HEIGHT * WIDTH * 3, dtype=np.float32)
        video = video.reshape(FRAMES, HEIGHT, WIDTH, 3)
        if self._plan is not None:
            video = video + self._noise.normal(0, 0.02 + seed, video.shape).astype(np.float32)
        save_frames(save, video)
        rows = [
            _row("blocks.0.attn1", "band 0", 1.0, None),
            _row("blocks.1.attn1", "dense", 1.0, None),
            _row("blocks.1.attn1", "band 0", 0.3, 0.9),
            _row("blocks.1.attn1", "band 1", 0.2, 0.8),
        ]
        summary = {"rows": rows, "notices": {"the grid was <odd>": 3}}
        return {
            "seconds": 4.0 if self._plan is None else 2.0,
            "step_seconds": {"all": 0.5, "dense": 0.6, "sparse": None},
            "peak_memory_bytes": 2**30,
            "summary": None if self._plan is None else summary,
        }

    def look(self, prompt, seed, save):
        keep = np.eye(3, 5, dtype=bool)
        np.savez(save, **{"mass-0": np.full((6, 10), 0.02), "keep-0": keep})
        one = {"site": "blocks.1.attn1", "head": 1, "choice": "block_mass", "tokens": 80,
               "cell": [16, 8], "block": [32, 16], "recall": 0.7}  # fmt: skip
        return {"step": 2, "steps": 4, "prompt": prompt, "maps": [one]}

    def close(self):
        self._plan = None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    settings = CompareSettings(
        plans={},
        recipes=("sparsed", "radial"),
        prompts=("a seven & a two", "a <one>"),
        dtypes=(),
        rounds=1,
        command="accel-compare recipes=[sparsed,radial]",
    )
    Comparison(model_config(tiny_wan_config(folder)), settings, folder, Canned).run()
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


def test_nothing_is_fetched_from_outside(page):
    sources = re.findall(r"(?:src|href)\s*=\s*[\"']?([^\"'\s>]{0,12})", page)
    assert len(sources) > 8
    assert all(source.startswith("data:image/") for source in sources)
    assert not re.search(r"@import|url\(|<script|<link", page)


def test_the_table_has_speed_prediction_and_quality(page):
    text = re.sub(r"<[^>]+>", " ", page)
    for shown in ("2.00x", "1.50x", "4.00 [4.00, 4.00]", "1.00", "600 / -"):
        assert shown in text
    assert "accuracy" not in page  # there was no classifier


def test_failures_and_notices_are_told_and_escaped(page):
    assert "radial failed: no &lt;memory&gt; left" in page
    assert "sparsed ran dense 3 times: the grid was &lt;odd&gt;" in page
    assert "a &lt;one&gt;" in page
    assert "<one>" not in page


def test_the_first_prompt_and_the_hardest_one_are_shown(folder, page):
    assert re.findall(r"<h2>Prompt (\d)", page) == ["1", "2"]
    with Image.open(folder / "animations" / "p01-sparsed.gif") as gif:
        assert gif.n_frames == FRAMES
        assert min(gif.size) >= 192


def test_every_part_of_the_report_is_there(page):
    titles = re.findall(r"<h2>([^<]+)</h2>", page)
    assert titles == [
        "Speed, memory and quality",
        "Trade-off",
        "Prompt 1: “a seven &amp; a two”",
        "Prompt 2: “a &lt;one&gt;”",
        "What is computed, and what it holds",
        "Attention and kept blocks of sparsed",
        "How it was measured",
    ]


def test_files_of_an_earlier_comparison_are_not_shown(folder, tmp_path):
    """Only what the results name is taken: other videos may lie in the same folders."""
    again = shutil.copytree(folder, tmp_path / "again")
    results = json.loads((again / "results.json").read_text())
    results["arms"]["sparsed"] |= {"videos": [None, None], "maps": None}
    (again / "results.json").write_text(json.dumps(results))
    page = write_report(again).read_text()
    assert "<figcaption>sparsed" not in page
    assert "Attention and kept blocks" not in page


def test_how_to_make_it_again_is_on_the_page(page):
    assert "<pre>accel-compare recipes=[sparsed,radial]</pre>" in page
    assert "a CPU, 2 threads" in page


def test_a_comparison_in_which_all_failed_still_has_a_report(folder, tmp_path):
    results = json.loads((folder / "results.json").read_text())
    results["arms"] = {"dense": {**results["arms"]["radial"], "error": "out of memory"}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert "dense failed: out of memory" in write_report(tmp_path).read_text()


def test_differences_are_amplified_and_clipped():
    a = np.zeros((1, 1, 1, 3), dtype=np.float32)
    b = a + np.float32([0.1, 0.2, 0.5])
    assert figures.difference(a, b).ravel() == pytest.approx([0.4, 0.8, 1.0])


def test_a_strip_runs_from_the_first_frame_to_the_last(tmp_path):
    video = np.linspace(0, 1, 33, dtype=np.float32)[:, None, None, None]
    video = np.broadcast_to(video, (33, 2, 3, 3))
    (tmp_path / "strip.png").write_bytes(figures.strip(video))
    with Image.open(tmp_path / "strip.png") as image:
        pixels = np.asarray(image)
    assert pixels.shape == (2, 3 * figures.FRAMES_SHOWN, 3)
    assert pixels[0, 0, 0] == 0
    assert pixels[0, -1, 0] == 255
