"""The parts of llada-tiny, a small masked diffusion language model, and how they become a
folder.
"""

import copy
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from retrieval_tasks import KINDS, WORDS, Shape, Source, Task, make_task, new_keys, stdlib_texts
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    EuroBertConfig,
    EuroBertForMaskedLM,
    PreTrainedTokenizerFast,
)

__all__ = [
    "CHAT_TOKENS",
    "GEN_LENGTH",
    "build_model",
    "build_tokenizer",
    "count_with",
    "encode_chat",
    "export",
    "load",
    "load_tasks",
    "write_tasks",
]

VOCABULARY = 1024
GEN_LENGTH = 256  # the longest answer that was trained
LONGEST = 16_384
# tasks of the committed files, laid over held-out text
TASK_SHAPE = Shape(prompt=4096, answer=GEN_LENGTH)
TASK_SEED = 1_000_000  # seeds below are of training
TASK_FILES = {"tasks.jsonl": range(16), "tasks-calibration.jsonl": range(100, 104)}
SPECIAL = {
    "bos_token": "<|bos|>",
    "eos_token": "<|eos|>",
    "pad_token": "<|pad|>",
    "mask_token": "<|mask|>",
}
ROLES = ("<|user|>", "<|assistant|>")
CHAT_TOKENS = 3  # of the template: beginning, user, assistant
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{{ message['content'] }}{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# a line break, a word with the space before it, one digit, signs, spaces but the last
PIECES = r"\n| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|[^\S\n]+(?!\S)|[^\S\n]+"


def build_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 1,024 tokens, learned from `texts` and from keys of tasks, so that a key
    is two tokens. Digits and line breaks are tokens of their own.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[*SPECIAL.values(), *ROLES],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    keys = new_keys(np.random.default_rng(0), WORDS)
    # often enough that syllables become tokens, too rarely for whole keys
    practice = [" ".join(["", *keys])] * 60
    tokenizer.train_from_iterator([*texts, *practice], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **SPECIAL,
        additional_special_tokens=list(ROLES),
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=LONGEST,
    )


def count_with(tokenizer: PreTrainedTokenizerFast):
    """Numbers of tokens of several texts, as `retrieval_tasks.Source` wants them."""

    def count(texts: Sequence[str]) -> list[int]:
        found = tokenizer.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [len(encoding) for encoding in found]

    return count


def encode_chat(tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]) -> list[list[int]]:
    """What the chat template makes of prompts, faster."""
    begin, user, assistant = tokenizer.convert_tokens_to_ids([SPECIAL["bos_token"], *ROLES])
    found = tokenizer.backend_tokenizer.encode_batch_fast(list(prompts), add_special_tokens=False)
    return [[begin, user, *encoding.ids, assistant] for encoding in found]


def build_model(
    tokenizer: PreTrainedTokenizerFast,
    *,
    width: int = 256,
    layers: int = 4,
    heads: int = 4,
    head_dim: int = 64,
    inner: int = 768,
) -> EuroBertForMaskedLM:
    """The model before training: Llama's layers without a causal mask, two key and value heads."""
    config = EuroBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=LONGEST,
        rope_parameters={"rope_type": "default", "rope_theta": 2e5},
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        mask_token_id=tokenizer.mask_token_id,
    )
    model = EuroBertForMaskedLM(config)
    model.set_attn_implementation("sdpa")
    return model


def export(out: Path, model: EuroBertForMaskedLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write `model` (in bfloat16) and `tokenizer` beside `out`, then put them in place."""
    half = copy.deepcopy(model).to(torch.bfloat16)
    for name, part in (("model", half), ("tokenizer", tokenizer)):
        made = out / f"{name}.part"
        shutil.rmtree(made, ignore_errors=True)
        part.save_pretrained(made)
        (out / name).mkdir(parents=True, exist_ok=True)
        for file in sorted(made.iterdir()):
            os.replace(file, out / name / file.name)
        made.rmdir()


def load(folder: Path) -> tuple[EuroBertForMaskedLM, PreTrainedTokenizerFast]:
    """The committed model in float32, and its tokenizer."""
    model = AutoModelForMaskedLM.from_pretrained(folder / "model", dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder / "tokenizer")


def write_tasks(out: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write the task files: of each kind 16 for comparisons and 4 others for calibration."""
    out.mkdir(parents=True, exist_ok=True)
    source = Source(stdlib_texts(held_out=True), count_with(tokenizer))
    for name, indices in TASK_FILES.items():
        lines = []
        for index in indices:
            for kind in KINDS:
                task = make_task(kind, TASK_SEED, index, source, TASK_SHAPE)
                row = {"id": f"{kind}-{index}", "task": kind, "prompt": task.prompt}
                row |= {"answer": task.answer, "values": task.values}
                lines.append(json.dumps(row) + "\n")
        (out / name).write_text("".join(lines))


def load_tasks(path: Path) -> list[tuple[str, Task]]:
    """The ids and tasks of a file of `write_tasks`."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [(row.pop("id"), Task(**row)) for row in rows]
