"""A tiny random MaskedDiffusionPipeline with a tokenizer of characters, and tasks for it."""

import json
import string

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import EuroBertConfig, EuroBertForMaskedLM, PreTrainedTokenizerFast

from accel.pipelines.dllm import MaskedDiffusionPipeline

SPECIAL = ["<pad>", "<s>", "</s>", "<mask>", "<unk>"]
CALL = {"gen_length": 24, "block_length": 8}


def tokenizer():
    """One token for each printable character, line breaks among them."""
    words = {word: i for i, word in enumerate([*SPECIAL, *string.printable])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        mask_token="<mask>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def build_tiny_llada(folder):
    """Save a pipeline with random weights and two files of tasks to `folder`."""
    torch.manual_seed(0)
    words = tokenizer()
    config = EuroBertConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        mask_token_id=3,
    )
    pipe = MaskedDiffusionPipeline(EuroBertForMaskedLM(config).eval(), words)
    pipe.save_pretrained(folder)
    for name, first in (("tasks", 0), ("tasks-calibration", 7)):
        lines = [json.dumps(task(first + i)) for i in range(3)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)


def task(number):
    """Of two kinds, with two values and with one."""
    kind = ("recall", "needle")[number % 2]
    values = [f"key {word}={number:04d}" for word in ("vemo", "tiba")[: 2 - number % 2]]
    text = "".join(f"line {i}\n" for i in range(4 + number))
    return {
        "id": f"{kind}-{number}",
        "task": kind,
        "prompt": text + "\n".join(values) + "\nfind\n",
        "answer": "\n".join(values) + "\n",
        "values": values,
    }


def tiny_llada_config(path):
    return {
        "name": "tiny-llada",
        "pipeline": "accel.pipelines.dllm.MaskedDiffusionPipeline",
        "path": path,
        "output": "text",
        "call": dict(CALL),
        "device": "cpu",
        "tasks": f"{path}/tasks.jsonl",
        "calibration_tasks": f"{path}/tasks-calibration.jsonl",
    }
