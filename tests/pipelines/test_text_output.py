"""Texts as an output: how a pipeline is called, and how what it made is kept and judged."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_llada import CALL, tiny_llada_config

from accel.errors import AccelError
from accel.pipelines.adapters import geometry_of
from accel.pipelines.enable import enabled, plan_of
from accel.pipelines.host import Host
from accel.pipelines.model_settings import model_config
from accel.pipelines.outputs import output_of
from accel.pipelines.text_loss import dense_loss
from accel.pipelines.text_output import Text, TextOutput, agreement
from accel.recipes import recipe

TEXT = TextOutput()


@pytest.fixture(scope="module")
def host(tiny_llada_path):
    return Host(model_config(tiny_llada_config(tiny_llada_path)))


def test_prompts_are_those_of_the_tasks(host):
    config = host.config
    assert (len(config.prompts), len(config.calibration)) == (3, 3)
    assert not set(config.prompts) & set(config.calibration)
    assert (config.kind.name, config.steps) == ("text", CALL["gen_length"])
    assert replace(config, prompts=("find",)).prompts == ("find",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"call": {"block_length": 8}}, "model.call.gen_length is None; it is a whole number"),
        ({"call": {**CALL, "block_length": 0}}, "model.call.block_length is 0"),
        ({"output": "texts"}, "model.output 'texts' is unknown; did you mean 'text'"),
        ({"tasks": "", "prompts": ()}, "model.prompts must be prompts with text"),
        ({"tasks": "nowhere.jsonl", "prompts": ()}, "there is no file 'nowhere.jsonl'"),
    ],
)
def test_what_a_configuration_lacks_is_named(host, changes, message):
    with pytest.raises(AccelError, match=message):
        replace(host.config, **changes)


def test_a_generation_is_tokens_and_their_text(host):
    made = host.generate(host.config.prompts[0], 0)
    assert made.tokens.shape == (CALL["gen_length"],)
    assert made.calls == CALL["gen_length"]
    assert TEXT.counts(made) == {"tokens": 24, "calls": 24}
    again = host.generate(host.config.prompts[0], 0)
    assert np.array_equal(made.tokens, again.tokens)


def test_what_a_plan_decodes_by_is_left_to_it(host):
    plan = recipe("sparse_dllm", geometry_of(host.pipe), block_length=6)
    assert TEXT.call(host.pipe, CALL) == CALL
    with enabled(host.pipe, plan):
        assert TEXT.call(host.pipe, CALL) == {"gen_length": 24}
        assert TEXT.call(host.pipe, {**CALL, "num_inference_steps": 4}) == {"gen_length": 24}
    with enabled(host.pipe, recipe("sparsed", geometry_of(host.pipe))):
        assert TEXT.call(host.pipe, CALL) == CALL


@pytest.mark.parametrize(
    ("call", "steps", "shorter"),
    [
        (CALL, 4, {"gen_length": 16, "num_inference_steps": 8}),
        ({"gen_length": 10, "block_length": 8}, 4, {"gen_length": 10, "num_inference_steps": 8}),
        ({"gen_length": 10}, 4, {"gen_length": 10, "num_inference_steps": 4}),
        ({"gen_length": 10, "block_length": 16}, 2, {"gen_length": 10, "num_inference_steps": 2}),
    ],
)
def test_a_short_generation_has_two_blocks(call, steps, shorter):
    assert TEXT.shortened(call, steps) == shorter


def test_the_loss_is_that_of_the_untouched_model(host):
    prompt = host.config.prompts[0]
    tokens = torch.from_numpy(host.generate(prompt, 0).tokens)
    (ids,) = host.pipe.prompt_ids(prompt)
    whole = torch.cat([torch.tensor(ids), tokens])
    expected = []
    for parity in (0, 1):
        places = torch.arange(len(ids) + parity, len(whole), 2)
        masked = whole.clone()
        masked[places] = host.pipe.mask_id
        with torch.no_grad():
            logits = host.pipe.model(masked[None]).logits[0, places].double()
        logits[:, host.pipe.mask_id] = -torch.inf
        expected += (-logits.log_softmax(-1).gather(1, whole[places, None])).flatten().tolist()
    found = dense_loss(host.pipe, prompt, tokens)
    assert found == pytest.approx(np.mean(expected), rel=1e-5)
    plan = recipe("sparse_dllm", geometry_of(host.pipe))
    with enabled(host.pipe, plan, strict=True):
        assert dense_loss(host.pipe, prompt, tokens) == found
        assert plan_of(host.pipe.model).name == "sparse_dllm"
    assert plan_of(host.pipe.model) is None


def test_a_text_comes_back_as_it_was_kept(host, tmp_path):
    made = Text(np.arange(24), "zwei \n ½ lines\n", 7)
    TEXT.save(tmp_path / "t.npz", made, host, host.config.prompts[1])
    back = TEXT.load(tmp_path / "t.npz")
    assert np.array_equal(back.tokens, made.tokens)
    assert (back.text, back.calls) == (made.text, 7)
    assert back.loss > 0


def test_texts_are_judged_by_their_tasks_and_by_dense(host):
    judge = TEXT.judge(host.config)
    needle, recall, _ = host.config.prompts
    right = "key vemo=0000\nkey tiba=0000\n"
    dense = Text(np.array([1, 2, 3, 4]), "key tiba=0000", 4, 0.5)
    plan = Text(np.array([1, 2, 0, 4]), right, 4, 0.75)
    told = TEXT.judged(dense, None, recall, judge)
    assert told == {"task": "recall", "accuracy": 0.5, "agreement": None, "loss": 0.5}
    told = TEXT.judged(plan, dense, recall, judge)
    assert told == {"task": "recall", "accuracy": 1.0, "agreement": 0.75, "loss": 0.75}
    assert TEXT.judged(plan, dense, needle, judge)["accuracy"] == 0.0
    assert TEXT.judged(plan, dense, "another", judge)["accuracy"] is None


def test_places_that_one_text_lacks_are_no_agreement():
    assert agreement(np.array([1, 2, 3]), np.array([1, 2])) == pytest.approx(2 / 3)


def test_results_are_medians_over_prompts_and_means_over_tasks():
    def record(seconds, cache=0):
        summary = {"cache_bytes": cache}
        return {"tokens": 12, "calls": 6, "seconds": seconds, "summary": summary}

    def judged(task, accuracy, agreement):
        return {"task": task, "accuracy": accuracy, "agreement": agreement, "loss": 0.5}

    found = [judged("copy", 1.0, 0.5), judged("recall", 0.5, 0.75), judged("copy", 0.0, 1.0), None]
    records = {0: [record(1.0), record(3.0), record(2.0)], 1: [record(4.0, 64)], 2: [record(12.0)]}
    results = TEXT.results(found, [None] * 4, {**records, 3: []})
    assert results == {
        "tokens_per_second": 3.0,
        "calls": 6,
        "call_seconds": pytest.approx(4 / 6),
        "cache_bytes": 64,
        "accuracy": 0.5,
        "accuracy_by_task": {"copy": 0.5, "recall": 0.5},
        "agreement": {"mean": 0.75, "worst": 0.5},
        "loss": 0.5,
    }
    nothing = TEXT.results([None], [None], {0: []})
    assert nothing.pop("accuracy_by_task") == {}
    assert set(nothing.values()) == {None}


def test_other_tasks_judge_anew_and_are_no_other_model(host, tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_bytes(Path(host.config.tasks).read_bytes())
    moved = replace(host.config, tasks=str(path))
    assert TEXT.judges(moved) == TEXT.judges(host.config)
    path.write_text(path.read_text().replace("0000", "0009"))
    assert TEXT.judges(moved) != TEXT.judges(host.config)


@pytest.mark.parametrize("out", ["two.gif", "."])
def test_a_text_is_no_picture_and_no_folder(out):
    with pytest.raises(AccelError, match="no text can be written to"):
        output_of("text").checked_path(out)
