"""llada-tiny: tasks over long texts, its training on growing prompts, and the committed model."""

import hashlib
import json
import math
import re
from collections import Counter
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import train_llada_tiny
from evaluate_llada_tiny import held_out_loss, judged, rates
from llada_tiny_denoiser import (
    BLOCK,
    LABELS,
    PHASES,
    Lengths,
    LladaSettings,
    Phase,
    Rows,
    _holes,
    llada_step,
)
from llada_tiny_model import (
    CHAT_TOKENS,
    GEN_LENGTH,
    TASK_SHAPE,
    build_model,
    count_with,
    encode_chat,
    export,
    load,
    load_tasks,
)
from retrieval_tasks import (
    KEYS,
    KINDS,
    LINE_TOKENS,
    Shape,
    Source,
    Task,
    make_task,
    new_keys,
    stdlib_texts,
)
from transformers import AutoTokenizer

from accel import recipe
from accel.pipelines.adapters import geometry_of
from accel.pipelines.dllm import MaskedDiffusionPipeline

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "samples" / "models" / "llada-tiny"
SHORT = Lengths(prompt=70, answer=44, batch=4, reach=200)


@lru_cache
def tokenizer():
    """The committed one."""
    return AutoTokenizer.from_pretrained(MODEL / "tokenizer")


@lru_cache
def some_texts() -> list[str]:
    """A part of the held-out text."""
    return [text for text in stdlib_texts(held_out=True) if len(text) < 40_000]


@lru_cache
def source() -> Source:
    return Source(some_texts(), count_with(tokenizer()))


def tiny_model():
    torch.manual_seed(0)
    return build_model(tokenizer(), width=16, layers=1, heads=2, head_dim=8, inner=24)


def test_the_tokenizer_gives_texts_back_and_takes_digits_by_twos() -> None:
    text = "def f(x):\n    return 1234  # ünïcode\n\n\tbake=0042\n"
    ids = tokenizer()(text).input_ids
    assert tokenizer().decode(ids) == text
    assert tokenizer().tokenize("= 00421") == ["=", "Ġ00", "42", "1"]
    assert len(tokenizer()) == 1536
    for source_text in some_texts()[:3]:
        assert tokenizer().decode(tokenizer()(source_text).input_ids) == source_text


def test_special_tokens_are_one_token_each_and_padding_is_on_the_left() -> None:
    names = ["<|bos|>", "<|eos|>", "<|pad|>", "<|mask|>", "<|user|>", "<|assistant|>"]
    assert tokenizer()("".join(names)).input_ids == list(range(6))
    t = tokenizer()
    assert [t.bos_token, t.eos_token, t.pad_token, t.mask_token] == names[:4]
    ids = t(["a", "a b c d e"], padding=True).input_ids
    assert ids[0][0] == t.pad_token_id
    assert t.decode(t(names[3] + "x").input_ids, skip_special_tokens=True) == "x"


def test_the_chat_template_is_what_training_encodes() -> None:
    task = make_task("recall", 0, 1, source(), Shape(200, 100))
    talk = [{"role": "user", "content": task.prompt}]
    ids = tokenizer().apply_chat_template(talk, add_generation_prompt=True)["input_ids"]
    assert encode_chat(tokenizer(), [task.prompt]) == [ids]
    assert len(ids) == len(tokenizer()(task.prompt).input_ids) + CHAT_TOKENS


def test_a_key_is_one_token_and_no_key_comes_twice() -> None:
    assert len(set(KEYS)) == len(KEYS) == 512
    for key in KEYS:
        assert tokenizer().tokenize(f"\n{key} 0123\n")[1:] == [key, "Ġ01", "23", "Ċ"]
        assert len(tokenizer().tokenize(f"{key} ? ?\n")) == LINE_TOKENS
    keys = new_keys(np.random.default_rng(1), 500)
    assert len(set(keys)) == 500


def test_lines_have_as_many_tokens_as_the_text_of_them() -> None:
    lines = source().window(50, 400)
    assert sum(source().count([f"{line}\n" for line in lines])) == len(
        tokenizer()("".join(f"{line}\n" for line in lines)).input_ids
    )
    assert source().lines[50 : 50 + len(lines)] == lines


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("prompt", "answer"), [(96, 64), (320, 192), (1500, 256)])
def test_tasks_keep_their_lengths_and_hold_their_answers(
    kind: str, prompt: int, answer: int
) -> None:
    shape = Shape(prompt, answer)
    for index in range(25):
        task = make_task(kind, 3, index, source(), shape)
        tokens = len(encode_chat(tokenizer(), [task.prompt])[0])
        assert prompt - 90 <= tokens <= prompt
        assert len(tokenizer()(task.answer).input_ids) + 1 <= answer
        lines = task.prompt.splitlines()
        assert task.values
        assert all(value in lines for value in task.values)
        assert all(value in task.answer.splitlines() for value in task.values)
        assert task.score(task.answer) == 1
        assert task.score("") == 0
        assert task.score("nothing 0000\n") == 0
        assert task == make_task(kind, 3, index, source(), shape)
        assert task.prompt != make_task(kind, 4, index, source(), shape).prompt


def test_recall_asks_for_many_of_many_pairs_in_another_order() -> None:
    tasks = [make_task("recall", 0, i, source(), Shape(2048, 256)) for i in range(20)]
    for task in tasks:
        given = [line for line in task.prompt.splitlines() if re.fullmatch(r"[a-z]{4} \d{4}", line)]
        asked = task.prompt.split("find\n")[-1].splitlines()
        assert asked == [f"{value.split()[0]} ? ?" for value in task.values]
        assert 20 <= len(asked) <= 40
        assert len(given) >= max(16, len(asked))
    assert len({len(task.values) for task in tasks}) > 3


def test_a_score_is_the_share_of_lines_each_as_often_as_asked() -> None:
    task = Task("copy", "", "", ["a", "b", "a", "c"])
    assert task.score("a\nb\na\nc\n") == 1
    assert task.score("a\nx\nb\n") == 0.5
    assert task.score("aa\nbc\n") == 0


def test_held_out_files_are_others_and_the_same_again() -> None:
    kept, held_out = stdlib_texts(held_out=False), stdlib_texts(held_out=True)
    assert not set(kept) & set(held_out)
    assert 0.02 < len(held_out) / (len(kept) + len(held_out)) < 0.1
    assert held_out == stdlib_texts(held_out=True)


@pytest.mark.parametrize("step", [0, 5])
def test_a_batch_masks_answers_alone_and_text_anywhere(step: int) -> None:
    rows = Rows.of(tokenizer(), some_texts(), LladaSettings())
    lengths = Lengths(prompt=96, answer=64, batch=16, reach=500)
    batch = rows.batch(lengths, 0, step)
    assert batch.clean.shape == (16, 160)
    assert torch.equal(batch.clean, rows.batch(lengths, 0, step).clean)
    assert not torch.equal(batch.clean, rows.batch(lengths, 0, step + 1).clean)
    assert ((batch.weight > 0) == batch.masked).all()
    assistant = tokenizer().convert_tokens_to_ids("<|assistant|>")
    for row, label in enumerate(batch.labels.tolist()):
        assert batch.masked[row].any()
        steps = batch.positions[row].diff()
        assert batch.positions[row, 0] == 0
        assert (steps >= 1).all()
        assert batch.positions[row, -1] < 500
        if LABELS[label] == "text":
            assert (steps == 1).all()
            continue
        prompt = int((batch.clean[row] == assistant).nonzero()) + 1
        assert not batch.masked[row, :prompt].any()
        assert (steps[prompt - 1 :] == 1).all()
        assert (batch.clean[row] == tokenizer().eos_token_id).any()


def test_what_comes_after_the_decoded_block_is_masked_and_counts_little() -> None:
    rows = Rows.of(tokenizer(), some_texts(), LladaSettings(later_weight=0.01))
    lengths = Lengths(prompt=320, answer=192, batch=24, shares=(0.0, 0.0, 1.0, 0.0, 0.0))
    batch = rows.batch(lengths, 0, 0)
    found = 0
    for row in range(24):
        later = batch.masked[row] & (batch.weight[row] <= 0.0101)
        if later.any():
            found += 1
            first = int(later.nonzero()[0])
            assert batch.masked[row, first:].all()
            full = (batch.masked[row] & (batch.weight[row] == 1)).nonzero()
            assert len(full) <= BLOCK
    assert 6 <= found < 24


def test_tokens_weigh_more_that_follow_from_what_is_before_them() -> None:
    rows = Rows.of(tokenizer(), some_texts(), LladaSettings(certain_weight=5.0))
    lengths = Lengths(prompt=320, answer=192, batch=24, shares=(0.0, 0.0, 1.0, 0.0, 0.0))
    batch = rows.batch(lengths, 0, 0)
    before = batch.masked.long().unfold(1, 4, 1).sum(2)[:, :-1]  # masked ones of the last four
    weight, masked = batch.weight[:, 4:], batch.masked[:, 4:]
    assert (weight[(before > 0) & masked] <= 1).all()
    assert (weight == 5).sum() > 50
    ends = batch.clean[:, 4:] == tokenizer().eos_token_id
    assert (weight[ends] <= 1).all()


def test_holes_are_as_long_as_they_are_drawn() -> None:
    begun = torch.tensor([0, 1, 0, 0, 0, 0, 1, 1, 0, 1], dtype=torch.bool)
    sizes = torch.tensor([4, 4, 1, 1, 1, 1, 2, 1, 3, 4])
    assert _holes(begun, sizes).int().tolist() == [0, 1, 1, 1, 1, 0, 1, 1, 0, 1]


def test_trained_weights_begin_at_later_phases(tmp_path: Path) -> None:
    long = Lengths(prompt=90, answer=44, batch=4, reach=200)
    phases = (Phase(0.5, (SHORT,)), Phase(1.0, (long,)))
    settings = LladaSettings(phases=phases, begin_at=0.6)
    step, _ = llada_step(tiny_model(), Rows.of(tokenizer(), some_texts(), settings), settings, 0)
    assert any(key.endswith("_90") for key in step(0, 0.0))
    for wrong in (-0.1, 1.0):
        with pytest.raises(SystemExit, match=f"--begin-at is {wrong}; it is a fraction"):
            train_llada_tiny.main(1, 1, 0, tmp_path, tmp_path, False, False, False, None, wrong)


def test_a_step_trains_all_parts_and_shows_each_kind() -> None:
    settings = LladaSettings(phases=(Phase(0.5, (SHORT,)), Phase(1.0, (SHORT,))))
    model = tiny_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    step, parts = llada_step(model, Rows.of(tokenizer(), some_texts(), settings), settings, 0)
    shown = {}
    for index in range(4):
        shown |= step(index, index / 4)
    assert {"copy_70", "recall_70"} <= set(shown) <= {*(f"{k}_70" for k in KINDS), "text"}
    assert all(math.isfinite(value) for value in shown.values())
    for name, weight in model.state_dict().items():
        assert not torch.equal(before[name], weight), name
    assert set(parts) == {"model", "muon", "adam", "average"}


def test_phases_grow_to_the_whole_length() -> None:
    assert [p.until for p in PHASES] == sorted(p.until for p in PHASES)
    assert PHASES[-1].until == 1.0
    longest = [max(x.prompt for x in phase.lengths) for phase in PHASES]
    assert longest == sorted(longest)
    assert (4096, GEN_LENGTH) in [(x.prompt, x.answer) for x in PHASES[-1].lengths]


def test_a_resumed_training_is_the_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_llada_tiny, "stdlib_texts", lambda held_out: some_texts())
    monkeypatch.setattr(train_llada_tiny, "build_tokenizer", lambda texts: tokenizer())
    monkeypatch.setattr(train_llada_tiny, "build_model", lambda tokenizer: tiny_model())
    monkeypatch.setattr(train_llada_tiny, "write_tasks", lambda out, tokenizer: None)
    settings = LladaSettings(phases=(Phase(1.0, (SHORT,)),))

    def train(name: str, steps: int, resume: bool = False, begin: Path | None = None) -> dict:
        train_llada_tiny.main(
            minutes=0,
            steps=steps,
            seed=1,
            out=tmp_path / name,
            work=tmp_path / f"{name}.work",
            bfloat16=False,
            compiled=False,
            resume=resume,
            begin=begin,
            settings=settings,
        )
        return load(tmp_path / name)[0].state_dict()

    # rates follow the progress: a resumed run of the same length has to stop by another means
    whole = train("whole", 3)
    with pytest.raises(SystemExit, match="resume"):
        train("whole", 3)
    assert all(torch.equal(v, whole[k]) for k, v in train("whole", 3, resume=True).items())
    # rates are small in the first step, so weights that were begun with are still near
    near, far = train("near", 1, begin=tmp_path / "whole"), train("far", 1)
    name = "model.embed_tokens.weight"
    assert not torch.equal(near[name], whole[name])
    moved = [(one[name] - whole[name]).norm() for one in (near, far)]
    assert moved[0] < moved[1]
    first = train("longer", 2)
    longer = train("longer", 4, resume=True)
    assert any(not torch.equal(v, first[k]) for k, v in longer.items())
    log = (tmp_path / "longer.work" / "log.jsonl").read_text().splitlines()
    assert json.loads(log[-1])["stage"] == "export"


def test_an_export_loads_in_float32_with_tied_embeddings(tmp_path: Path) -> None:
    model = tiny_model()
    export(tmp_path / "m", model, tokenizer())
    loaded, loaded_tokenizer = load(tmp_path / "m")
    names = ["model", "model_index.json", "tokenizer"]
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == names
    pipe = MaskedDiffusionPipeline.from_pretrained(str(tmp_path / "m"))
    assert pipe.mask_id == tokenizer().mask_token_id
    assert loaded.dtype == torch.float32
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded_tokenizer.chat_template == tokenizer().chat_template
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], weight, atol=1e-2, rtol=1e-2)


def test_finished_tasks_are_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def answer(pipe, prompt, **call):
        made.append(call["num_inference_steps"])
        return SimpleNamespace(texts=["a=1\n"])

    monkeypatch.setattr(MaskedDiffusionPipeline, "__call__", answer)
    tasks = [("x", Task("needle", "find\n", "", ["a=1", "b=2"]))]
    pipe = MaskedDiffusionPipeline(tiny_model(), tokenizer())
    first = judged(pipe, tasks, 8, tmp_path)
    answer = hashlib.sha256(b"a=1\n").hexdigest()[:16]
    assert first == [{"id": "x", "task": "needle", "values": 2, "right": 1, "answer": answer}]
    assert judged(pipe, tasks, 8, tmp_path) == first
    assert made == [8]
    # with a cache it is another answer
    plan = recipe("fast_dllm", geometry_of(pipe.model), threshold=None)
    assert judged(pipe, tasks, 8, tmp_path, plan) == first
    assert made == [8, 8]


def test_rates_count_values_and_whole_tasks() -> None:
    rows = [
        {"task": "needle", "values": 2, "right": 1},
        {"task": "needle", "values": 2, "right": 2},
        {"task": "recall", "values": 4, "right": 4},
    ]
    found = rates(rows)
    assert set(found) == {"needle", "recall", "all"}
    assert found["needle"] == {
        "tasks": 2,
        "values": 4,
        "right": 3,
        "accuracy": 0.75,
        "tasks_all_right": 0.5,
    }
    assert found["all"]["accuracy"] == 0.875


def test_an_untrained_model_has_the_loss_of_chance() -> None:
    ids = torch.tensor(tokenizer()(some_texts()[0]).input_ids)
    found = held_out_loss(tiny_model().eval(), ids, 4, 40)
    assert abs(found["loss_per_masked_token"] - math.log(1536)) < 0.3
    assert abs(found["bound_nats_per_token"] - math.log(1536)) < 0.3


@pytest.mark.parametrize(("name", "each"), [("tasks.jsonl", 16), ("tasks-calibration.jsonl", 2)])
def test_the_committed_tasks_fit_the_model(name: str, each: int) -> None:
    tasks = load_tasks(MODEL / name)
    assert Counter(task.task for _, task in tasks) == dict.fromkeys(KINDS, each)
    assert len({key for key, _ in tasks}) == len(tasks)
    for ids in encode_chat(tokenizer(), [task.prompt for _, task in tasks]):
        assert TASK_SHAPE.prompt - 90 <= len(ids) <= TASK_SHAPE.prompt
    for _, task in tasks:
        assert len(tokenizer()(task.answer).input_ids) < GEN_LENGTH
        assert task.score(task.answer) == 1


def test_calibration_shares_no_task() -> None:
    files = ("tasks.jsonl", "tasks-calibration.jsonl")
    first, second = ({task.prompt for _, task in load_tasks(MODEL / name)} for name in files)
    assert not first & second


def test_the_committed_files_are_small_and_name_no_folder() -> None:
    files = [f for f in MODEL.rglob("*") if f.is_file()]
    assert 0 < sum(f.stat().st_size for f in files) <= 12 * 2**20
    for config in MODEL.rglob("*.json"):
        assert "_name_or_path" not in config.read_text(), config


def test_the_committed_model_finds_keys_in_one_call() -> None:
    """One row for every token of a value, with it and all that follows masked."""
    model, t = load(MODEL)
    task = make_task("needle", 5, 3, source(), Shape(160, 96))
    prompt = encode_chat(t, [task.prompt])[0]
    answer = t(task.answer).input_ids
    values = [i for i, token in enumerate(answer) if t.decode([token]).isdigit()]
    rows = [prompt + answer[:i] + [t.mask_token_id] * (96 - i) for i in values]
    with torch.no_grad():
        best = model(input_ids=torch.tensor(rows)).logits.argmax(2)
    found = [int(row[len(prompt) + i]) for row, i in zip(best, values, strict=True)]
    right = sum(a == answer[i] for a, i in zip(found, values, strict=True))
    assert right / len(values) >= 0.75
