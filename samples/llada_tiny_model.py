"""The parts of llada-tiny, a small masked diffusion language model, and how they become a
folder.
"""

import copy
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from retrieval_tasks import KEYS, KINDS, Shape, Source, Task, make_task, stdlib_texts
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from training import save_pipeline
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    EuroBertConfig,
    EuroBertForMaskedLM,
    PreTrainedTokenizerFast,
)

from accel.pipelines.dllm import MaskedDiffusionPipeline

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

VOCABULARY = 1536
PRACTICE = 3000  # how often keys and pairs of digits are shown to what learns the tokens
GEN_LENGTH = 256  # the longest answer that was trained
LONGEST = 16_384
# the slowest half of the turns stays below half a radian over the longest context, so that what
# matches near by matches far away too
ROPE_BASE = 1e8
# tasks of the committed files, laid over held-out text
TASK_SHAPE = Shape(prompt=4096, answer=GEN_LENGTH)
TASK_SEED = 1_000_000  # seeds below are of training
TASK_FILES = {"tasks.jsonl": range(16), "tasks-calibration.jsonl": range(100, 102)}
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
# a line break, a word with the space before it, one or two digits, signs, spaces but the last
PIECES = r"\n| ?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|[^\S\n]+(?!\S)|[^\S\n]+"


def build_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 1,536 tokens, learned from `texts` and from keys of tasks, so that a key
    is one token. Digits go by twos; line breaks are tokens of their own.
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
    # often enough that keys and pairs of digits become tokens
    numbers = [f"{n:02d}" for n in range(100)]
    lines = [*KEYS, *numbers, *(f" {n}" for n in numbers), " ? ?"]
    practice = ["\n".join(lines)] * PRACTICE
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
    inner: int = 512,
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
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_BASE},
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        mask_token_id=tokenizer.mask_token_id,
    )
    model = EuroBertForMaskedLM(config)
    _initialise(model)
    model.set_attn_implementation("sdpa")
    return model


@torch.no_grad()
def _initialise(model: EuroBertForMaskedLM) -> None:
    """Begin as a weak induction circuit, which small models are slow to find.

    One half of the embeddings' dimensions tells tokens apart, the last is the same for all. By it
    the heads of the first layer look at one neighbour each and copy what token it is into a part of
    the other half; later heads look where these parts are alike and copy the token there.
    """
    config = model.config
    width, dim, heads = config.hidden_size, config.head_dim, config.num_attention_heads
    half, part = width // 2, (width // 2 - 2) // heads
    groups = heads // config.num_key_value_heads
    base = config.rope_parameters["rope_theta"]
    turns = base ** (-torch.arange(dim // 2) / (dim // 2))
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            zero = name.endswith(("o_proj.weight", "down_proj.weight"))
            weight.normal_(std=0.0 if zero else (0.3 if "attn" in name else 1) * width**-0.5)
    embeddings = model.model.embed_tokens.weight
    embeddings.zero_()
    embeddings[:, :half].normal_(std=0.7)
    embeddings[config.mask_token_id] = 0.0  # it is no token, and none to be copied
    embeddings[config.mask_token_id, -2] = 0.7 * half**0.5
    embeddings[:, -1] = 4.0
    model.model.norm.weight.fill_(0.1)

    def rows(tensor: torch.Tensor, head: int) -> torch.Tensor:
        return tensor[head * dim : (head + 1) * dim]

    def orthogonal(size: int) -> torch.Tensor:
        return torch.linalg.qr(torch.randn(size, size))[0]

    offsets = (-1, -2, -3, -4)
    fast, slow = 3 * dim // 16, 7 * dim // 32  # of the dim // 2 turns
    places = [slice(half + part * i, half + part * (i + 1)) for i in range(heads)]
    for number, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        query, key, value, out = (
            getattr(attention, f"{x}_proj").weight for x in ("q", "k", "v", "o")
        )
        for head in range(heads):
            kv = head // groups
            if number == 0:
                angle = turns[:fast] * offsets[head % 4]
                rows(query, head)[:fast, -1] = angle.cos() * 1.5
                rows(query, head)[dim // 2 : dim // 2 + fast, -1] = angle.sin() * 1.5
                rows(key, kv)[:fast, -1] = 1.5
                if head % groups == 0:
                    rows(value, kv)[:part, :half] = orthogonal(half)[:part]
                out[places[head], head * dim : head * dim + part] = torch.eye(part)
                continue
            if head % groups == 0:  # keys and values are those of the group
                seen = (0, 1) if kv == 0 or number != 2 else (0, 3)
                for i, place in enumerate(seen):
                    reading = orthogonal(part)[:slow] * 1.5
                    stop = dim // 2 * (i + 1)
                    rows(key, kv)[stop - slow : stop, places[place % heads]] = reading
                rows(value, kv)[:, :half] = orthogonal(half)[:dim]
                rows(key, kv)[dim // 2 - slow - 1, -2] = -1.0  # away from masked places
            rows(query, head)[:] += rows(key, kv)
            rows(query, head)[dim // 2 - slow - 1] = 0.0
            rows(query, head)[dim // 2 - slow - 1, -1] = 1.0
            out[:half, head * dim : (head + 1) * dim] = rows(value, kv)[:, :half].T * 0.5


def export(out: Path, model: EuroBertForMaskedLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write the pipeline of `model` (in bfloat16) and `tokenizer` beside `out`, then put its parts
    in place.
    """
    half = copy.deepcopy(model).to(torch.bfloat16)
    save_pipeline(MaskedDiffusionPipeline(half, tokenizer), out)


def load(folder: Path) -> tuple[EuroBertForMaskedLM, PreTrainedTokenizerFast]:
    """The committed model in float32, and its tokenizer."""
    model = AutoModelForMaskedLM.from_pretrained(folder / "model", dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder / "tokenizer")


def write_tasks(out: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write the task files: of each kind 16 for comparisons and 2 others for calibration."""
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
