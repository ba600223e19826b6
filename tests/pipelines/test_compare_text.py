"""A comparison of a masked diffusion language model: what is measured, kept, and shown."""

import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
from tiny_llada import CALL, tiny_llada_config

from accel.decoding import Decoding
from accel.errors import AccelError
from accel.pipelines.adapters import geometry_of
from accel.pipelines.arm_commands import serve
from accel.pipelines.compare_arm import Arm
from accel.pipelines.compare_run import Comparison
from accel.pipelines.compare_settings import CompareSettings
from accel.pipelines.compare_table import as_markdown, as_text
from accel.pipelines.compare_worker import ArmFailed
from accel.pipelines.generate import generate
from accel.pipelines.host import Host
from accel.pipelines.model_settings import model_config
from accel.pipelines.report import write_report
from accel.recipes import recipe


class Killed(BaseException):
    """The comparison's end, in the middle of it."""


class InProcess:
    """An arm without a process: the same commands and answers, through JSON."""

    asked: list[tuple[str, str]]
    ends_after: int | None

    def __init__(self, folder, spec):
        self._name = folder.name
        self._arm = Arm(**json.loads(json.dumps(spec)))

    def ask(self, command, timeout_s):
        self.asked.append((self._name, command["do"]))
        answers = []
        serve(self._arm, [json.dumps(command)], answers.append)
        if len(self.asked) == self.ends_after:
            raise Killed  # the arm has written its text, and nobody has noted it
        answer = json.loads(answers[0])
        if "error" in answer:
            raise ArmFailed(answer["error"])
        return answer["ok"]

    def close(self):
        self._arm = None


def run(model, settings, folder, ends_after=None):
    """The results, and what the arms were asked for."""
    asked = []
    launch = type("Launch", (InProcess,), {"asked": asked, "ends_after": ends_after})
    return Comparison(model, settings, folder, launch).run(), asked


@pytest.fixture(scope="module")
def model(tiny_llada_path):
    return model_config(tiny_llada_config(tiny_llada_path))


@pytest.fixture(scope="module")
def settings(model, tmp_path_factory):
    plan = recipe("fast_dllm", geometry_of(Host(model).pipe), threshold=0.2, block_length=8)
    path = plan.save(tmp_path_factory.mktemp("plans") / "ours.json")
    return CompareSettings(
        plans={"ours": str(path)},
        recipes={
            "now": {"recipe": "sparse_dllm", "delay": 0, "block_length": 8},
            "later": {"recipe": "sparse_dllm", "delay": 9, "block_length": 8},
        },
        prompts=2,
        dtypes=("float32",),
        rounds=1,
        predict=True,
        baselines=("dense", "full"),
        output="text",
        command="accel-compare model=tiny-llada",
    )


@pytest.fixture(scope="module")
def compared(model, settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare-text")
    results, asked = run(model, settings, folder)
    write_report(folder)
    return folder, results, asked


def test_every_arm_is_measured(compared):
    folder, results, asked = compared
    arms = results["arms"]
    assert list(arms) == ["dense", "full", "ours", "now", "later"]
    assert results == json.loads((folder / "results.json").read_text())
    for arm in arms.values():
        assert arm["speedup"] > 0
        assert arm["tokens_per_second"] > 0
        assert arm["call_seconds"] > 0
        assert 0 <= arm["accuracy"] <= 1
        assert set(arm["accuracy_by_task"]) == {"needle", "recall"}
        assert arm["loss"] > 0
        assert arm["notices"] == {}
    assert arms["dense"]["calls"] == arms["full"]["calls"] == CALL["gen_length"]
    assert arms["ours"]["calls"] < CALL["gen_length"]
    assert arms["dense"]["agreement"] is None
    assert arms["full"]["agreement"]["worst"] == 1
    # the whole delay is whole calls: nothing is left out
    assert arms["later"]["agreement"]["worst"] == 1
    assert arms["now"]["agreement"]["mean"] < 1
    assert arms["now"]["cache_bytes"] > 0
    assert arms["dense"]["cache_bytes"] is None
    assert arms["now"]["parameters"] == {"delay": 0, "block_length": 8}
    assert {do for _, do in asked} == {"start", "generate"}  # nothing is priced or looked at


def test_tables_say_what_texts_are_worth(compared):
    _, results, _ = compared
    head = as_text(results).splitlines()[0]
    for word in ("tokens/s", "calls", "cache MiB", "accuracy", "needle", "recall", "loss"):
        assert word in head
    assert "PSNR" not in head
    assert "float32, 24 tokens in blocks of 8, prompts: 2" in as_markdown(results)


def test_the_report_shows_answers_and_both_trade_offs(compared):
    folder, results, _ = compared
    page = (folder / "report.html").read_text()
    titles = re.findall(r"<h2>([^<]+)</h2>", page)
    assert titles == [
        "Speed, memory and quality",
        "Trade-off",
        "Accuracy by task",
        "Prompt 1: needle",
        "Prompt 2: recall",
        "What is computed, and what it holds",
        "How it was measured",
    ]
    assert page.count("<figure class=answer>") == 2 * len(results["arms"])
    for name in ("trade-off.svg", "agreement.svg"):
        assert (folder / name).is_file()
    lengths = [len(prompt) for prompt in results["settings"]["prompts"]]
    told = f"2, of {min(lengths)} to {max(lengths)} characters"
    assert told in page  # prompts, which are long, are not all of them spelt out


def test_the_same_again_makes_nothing(compared, model, settings, tmp_path):
    original, before, _ = compared
    folder = shutil.copytree(original, tmp_path / "again")
    after, asked = run(model, settings, folder)
    assert asked == []
    assert after["arms"] == before["arms"]


def test_a_killed_comparison_goes_on_where_it_was(model, settings, tmp_path):
    few = replace(settings, plans={}, recipes={"now": settings.recipes["now"]}, predict=False)
    with pytest.raises(Killed):
        run(model, few, tmp_path, ends_after=6)
    made = sorted(p.relative_to(tmp_path).parts[1] for p in tmp_path.rglob("p*-*.npz"))
    assert made == ["dense", "full", "now"]
    results, asked = run(model, few, tmp_path)
    # "now" had its text of the first prompt, and no record of it; dense is timed beside it again
    generated = [name for name, do in asked if do == "generate"]
    assert sorted(generated) == ["dense", "dense", "full", "full", "now", "now"]
    assert len(list(tmp_path.rglob("p*-*.npz"))) == 6
    assert all(None not in arm["texts"] for arm in results["arms"].values())


def test_prompts_of_ones_own_have_no_right_answer(model, settings, tmp_path):
    few = replace(settings, plans={}, recipes=(), baselines=("dense",), prompts=["find\n"])
    results, _ = run(model, few, tmp_path)
    (arm,) = results["arms"].values()
    assert arm["accuracy"] is None
    assert arm["loss"] > 0
    assert "<h2>Prompt 1</h2>" in write_report(tmp_path).read_text()


def test_a_plan_keeps_its_own_decoding(model, tmp_path):
    pipe = Host(model).pipe
    plan = replace(
        recipe("full", geometry_of(pipe)), decoding=Decoding(block_length=12, tokens_per_step=3)
    )
    path = plan.save(tmp_path / "p.json")
    arm = Arm(tiny_llada_config(model.path), str(path))
    arm.start()
    assert arm.generate(model.prompts[0], 0)["calls"] == 8  # and not one for each token


def test_a_cache_of_diffusers_is_refused_in_one_line(model):
    config = {"model": tiny_llada_config(model.path), "prompt": "a", "plan": None, "out": None}
    with pytest.raises(AccelError, match="cache=pab is one of diffusers', which know nothing of"):
        generate({**config, "cache": "pab"})


def test_generate_prints_the_text_and_writes_it(model, tmp_path, capsys):
    config = {
        **{"model": tiny_llada_config(model.path), "prompt": "line 1", "plan": "sparse_dllm"},
        **{"cache": None, "strict": True, "seed": 0, "steps": None, "min_side": 0},
        "out": str(tmp_path / "made" / "text.txt"),
    }
    generate(config)
    text, said = (tmp_path / "made" / "text.txt").read_text(), capsys.readouterr().out
    assert text
    assert text in said
    assert "plan 'sparse_dllm'" in said
    assert "text.txt: 24 tokens in 24 calls of the model, generated in" in said
    generate({**config, "plan": None, "out": None, "steps": 6})
    assert "\n24 tokens in 6 calls of the model" in capsys.readouterr().out


def test_a_long_prompt_comes_from_a_file_as_it_is(model, tmp_path, capsys):
    config = {
        **{"model": tiny_llada_config(model.path), "prompt": None, "plan": None, "cache": None},
        **{"strict": True, "seed": 0, "steps": None, "min_side": 0, "out": None},
    }
    (tmp_path / "q.txt").write_text(model.prompts[0])
    generate({**config, "prompt_file": str(tmp_path / "q.txt")})
    made = Host(model).generate(model.prompts[0], 0)
    assert made.text in capsys.readouterr().out
    for changes, message in (
        ({"prompt_file": "nowhere.txt"}, "there is no file 'nowhere.txt'"),
        ({"prompt_file": str(tmp_path / "q.txt"), "prompt": "a"}, "are two prompts"),
        ({}, "there is no prompt"),
    ):
        with pytest.raises(AccelError, match=message):
            generate({**config, **changes})


def test_steps_of_a_text_are_timed_without_telling_them_apart(model):
    arm = Arm(tiny_llada_config(model.path), "sparsed")
    assert arm.start()["call"] is None
    made = arm.generate(model.prompts[0], 0, steps=4)
    assert made["steps"] == made["calls"] == 8
    assert made["tokens"] == 16
    steps = SimpleNamespace(**made["step_seconds"])
    assert steps.all > 0
    assert steps.dense is steps.sparse is None
