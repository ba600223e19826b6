"""Measure samples/models/llada-tiny: does it answer questions about long texts, and how well does
it know source text?

    python samples/evaluate_llada_tiny.py
    python samples/evaluate_llada_tiny.py --tasks 2 --steps 32

Writes `evaluation.json` into the model folder. Finished tasks are kept in the work folder, so that
the same command goes on where a killed one stopped.
"""

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from llada_tiny_denoiser import BLOCK
from llada_tiny_model import GEN_LENGTH, encode_chat, load, load_tasks
from retrieval_tasks import KINDS, Task, stdlib_texts
from torch import Tensor
from tqdm import tqdm
from transformers import EuroBertForMaskedLM, PreTrainedTokenizerFast

from accel.pipelines.provenance import device_name

HERE = Path(__file__).parent

__all__ = ["digest", "fill", "held_out_loss", "rates"]


@torch.no_grad()
def fill(
    model: EuroBertForMaskedLM, prompt: list[int], steps: int, length: int = GEN_LENGTH
) -> list[int]:
    """The ids of an answer: block by block, of each block in every step the places whose best token
    is the likeliest, in `steps` steps of the same size over all blocks.

    Blocks after one with an end-of-text token, which change no earlier token, are left out.
    """
    mask, end = model.config.mask_token_id, model.config.eos_token_id
    tokens = torch.tensor([prompt + [mask] * length])
    for start in range(len(prompt), len(prompt) + length, BLOCK):
        stop = min(start + BLOCK, len(prompt) + length)
        while (open_ := tokens[0, start:stop] == mask).any():
            states = model.model(input_ids=tokens).last_hidden_state[:, start:stop]
            logits = model.lm_head(states)[0].float()
            logits[:, mask] = -torch.inf  # it would never end
            chance, best = logits.softmax(1).max(1)
            count = min(max(1, length // steps), int(open_.sum()))
            chosen = chance.masked_fill(~open_, -1.0).topk(count).indices
            tokens[0, start + chosen] = best[chosen]
        if (tokens[0, start:stop] == end).any():
            return tokens[0, len(prompt) : stop].tolist()
    return tokens[0, len(prompt) :].tolist()


def answer_text(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    """The text before the first end-of-text token."""
    end = tokenizer.eos_token_id
    return tokenizer.decode(ids[: ids.index(end)] if end in ids else ids)


@torch.no_grad()
def held_out_loss(
    model: EuroBertForMaskedLM, ids: Tensor, windows: int, length: int, seed: int = 0
) -> dict[str, float]:
    """Of `windows` of held-out text, whose masked shares cover (0, 1) evenly: the mean loss of a
    masked token, and the bound of the negative log-likelihood, in nats a token.
    """
    random = torch.Generator().manual_seed(seed)
    starts = torch.linspace(0, len(ids) - length, windows).long().tolist()
    total, masked, bound = 0.0, 0, 0.0
    for i, start in enumerate(starts):
        clean = ids[start : start + length]
        count = max(1, round((i * 0.618 % 1) * length))
        chosen = torch.randperm(length, generator=random)[:count]
        seen = clean.clone()
        seen[chosen] = model.config.mask_token_id
        logits = model(input_ids=seen[None]).logits[0, chosen]
        loss = F.cross_entropy(logits.float(), clean[chosen], reduction="sum").item()
        total, masked, bound = total + loss, masked + count, bound + loss / count
    return {
        "windows": windows,
        "window_tokens": length,
        "masked_tokens": masked,
        "loss_per_masked_token": round(total / masked, 4),
        "bound_nats_per_token": round(bound / windows, 4),
    }


def digest(model: EuroBertForMaskedLM) -> str:
    """Sixteen hexadecimal digits that change with any weight."""
    made = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        made.update(name.encode() + weight.float().contiguous().numpy().tobytes())
    return made.hexdigest()[:16]


def rates(rows: list[dict]) -> dict[str, dict]:
    """Per kind of task and over all: tasks, values asked for, right ones and their share, and the
    share of tasks with all values right.
    """
    result = {}
    for kind in (*KINDS, "all"):
        of_kind = [r for r in rows if kind in ("all", r["task"])]
        if of_kind:
            values, right = (sum(r[k] for r in of_kind) for k in ("values", "right"))
            result[kind] = {
                "tasks": len(of_kind),
                "values": values,
                "right": right,
                "accuracy": round(right / values, 4),
                "tasks_all_right": round(np.mean([r["right"] == r["values"] for r in of_kind]), 4),
            }
    return result


def judged(
    model: EuroBertForMaskedLM,
    tokenizer: PreTrainedTokenizerFast,
    tasks: list[tuple[str, Task]],
    steps: int,
    folder: Path,
    bfloat16: bool = False,
) -> list[dict]:
    """One row per task; those that an earlier call made come from `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    weights, rows = digest(model), []
    with tqdm(tasks, desc="tasks", mininterval=10) as bar:
        for name, task in bar:
            words = json.dumps([weights, task.prompt, steps, bfloat16])
            path = folder / f"{hashlib.sha256(words.encode()).hexdigest()[:16]}.json"
            if not path.exists():
                with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                    ids = fill(model, encode_chat(tokenizer, [task.prompt])[0], steps)
                path.write_text(json.dumps(answer_text(tokenizer, ids)))
            right = round(task.score(json.loads(path.read_text())) * len(task.values))
            rows.append({"id": name, "task": task.task, "values": len(task.values), "right": right})
            bar.set_postfix({k: v["accuracy"] for k, v in rates(rows).items()}, refresh=False)
    return rows


def main(
    model_folder: Path,
    work: Path,
    tasks: int,
    steps: int,
    windows: int,
    bfloat16: bool,
    out: Path,
) -> None:
    """Evaluate and write."""
    torch.set_num_threads(min(2, torch.get_num_threads()))
    model, tokenizer = load(model_folder)
    held_out = "".join(stdlib_texts(held_out=True))
    ids = torch.tensor(tokenizer.backend_tokenizer.encode(held_out).ids)
    loss = {str(n): held_out_loss(model, ids, windows, n) for n in (512, 2048)}
    print(json.dumps(loss, indent=2))
    chosen, seen = [], dict.fromkeys(KINDS, 0)
    for name, task in load_tasks(model_folder / "tasks.jsonl"):
        seen[task.task] += 1
        if seen[task.task] <= tasks:
            chosen.append((name, task))
    rows = judged(model, tokenizer, chosen, steps, work, bfloat16)
    found = {
        "steps": steps,
        "block": BLOCK,
        "gen_length": GEN_LENGTH,
        "bfloat16": bfloat16,
        "device": device_name(torch.device("cpu")),
        "weights": digest(model),
        "rates": rates(rows),
        "held_out": loss,
        "tasks": rows,
    }
    print(json.dumps(found["rates"], indent=2))
    out.write_text(json.dumps(found, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=HERE / "models" / "llada-tiny")
    parser.add_argument("--work", type=Path, default=HERE / ".work" / "llada-tiny-evaluation")
    parser.add_argument("--tasks", type=int, default=16, help="of each kind")
    parser.add_argument("--steps", type=int, default=GEN_LENGTH, help="of each answer")
    parser.add_argument("--windows", type=int, default=64, help="of held-out text, each length")
    parser.add_argument("--bfloat16", action="store_true", help="autocast, of the tasks")
    parser.add_argument("--out", type=Path, help="instead of evaluation.json of the model")
    return parser.parse_args()


if __name__ == "__main__":
    options = _arguments()
    main(
        options.model,
        options.work,
        options.tasks,
        options.steps,
        options.windows,
        options.bfloat16,
        options.out or options.model / "evaluation.json",
    )
