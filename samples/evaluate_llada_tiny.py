"""Measure samples/models/llada-tiny: does it answer questions about long texts, and how well does
it know source text?

    python samples/evaluate_llada_tiny.py
    python samples/evaluate_llada_tiny.py --tasks 1 --cached-tasks 16
    python samples/evaluate_llada_tiny.py --tasks 0 --plan my-plan.json --out plan.json

A dense answer is 256 calls with all tokens, minutes on a CPU; `--cached-tasks` are answered with a
cache of all tokens outside the block (Fast-dLLM's dual cache), filled anew for each block, one
token a step like the dense ones, whose answers theirs are held against; with `--plan` they are
answered by that plan instead. Writes `evaluation.json` into the model folder. Finished tasks are
kept in the work folder, so that the same command goes on where a killed one stopped.
"""

import argparse
import hashlib
import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from llada_tiny_denoiser import BLOCK
from llada_tiny_model import GEN_LENGTH, load, load_tasks
from retrieval_tasks import KINDS, Task, stdlib_texts
from torch import Tensor
from tqdm import tqdm
from transformers import EuroBertForMaskedLM

from accel.pipelines.adapters import geometry_of
from accel.pipelines.dllm import MaskedDiffusionPipeline
from accel.pipelines.enable import enabled
from accel.pipelines.provenance import device_name
from accel.plan import Plan
from accel.recipes import recipe

HERE = Path(__file__).parent

__all__ = ["digest", "held_out_loss", "judged", "rates"]


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
    pipe: MaskedDiffusionPipeline,
    tasks: list[tuple[str, Task]],
    steps: int,
    folder: Path,
    plan: Plan | None = None,
) -> list[dict]:
    """One row per task, answered in `steps` steps and as far as the first end of text, by a plan
    where one is given; those that an earlier call made come from `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights, rows = digest(pipe.model), []
    on = nullcontext() if plan is None else enabled(pipe, plan, check=False, guard=False)
    with on, tqdm(tasks, desc="dense" if plan is None else plan.name, mininterval=10) as bar:
        for name, task in bar:
            how = None if plan is None else plan.digest
            words = json.dumps([weights, task.prompt, steps, str(pipe.model.dtype), how])
            path = folder / f"{hashlib.sha256(words.encode()).hexdigest()[:16]}.json"
            if not path.exists():
                call = {"block_length": BLOCK, "num_inference_steps": steps, "stop_at_eos": True}
                found = pipe(task.prompt, gen_length=GEN_LENGTH, **call).texts[0]
                path.write_text(json.dumps(found))
            found = json.loads(path.read_text())
            right = round(task.score(found) * len(task.values))
            row = {"id": name, "task": task.task, "values": len(task.values), "right": right}
            rows.append(row | {"answer": hashlib.sha256(found.encode()).hexdigest()[:16]})
            bar.set_postfix({k: v["accuracy"] for k, v in rates(rows).items()}, refresh=False)
    return rows


def _first(tasks: list[tuple[str, Task]], count: int) -> list[tuple[str, Task]]:
    """The first `count` of each kind."""
    chosen, seen = [], dict.fromkeys(KINDS, 0)
    for name, task in tasks:
        seen[task.task] += 1
        if seen[task.task] <= count:
            chosen.append((name, task))
    return chosen


def main(
    model_folder: Path,
    work: Path,
    tasks: int,
    cached_tasks: int,
    steps: int,
    windows: int,
    bfloat16: bool,
    out: Path,
    plan_file: Path | None = None,
) -> None:
    """Evaluate and write."""
    torch.set_num_threads(min(2, torch.get_num_threads()))
    model, tokenizer = load(model_folder)
    pipe = MaskedDiffusionPipeline(model, tokenizer)
    pipe.set_progress_bar_config(disable=True)
    held_out = "".join(stdlib_texts(held_out=True))
    ids = torch.tensor(tokenizer.backend_tokenizer.encode(held_out).ids)
    loss = {str(n): held_out_loss(model, ids, windows, n) for n in (512, 2048)}
    print(json.dumps(loss, indent=2))
    whole = load_tasks(model_folder / "tasks.jsonl")
    pipe.to(torch.bfloat16 if bfloat16 else torch.float32)
    exact = recipe("fast_dllm", geometry_of(pipe.model), threshold=None)
    plan = exact if plan_file is None else Plan.load(plan_file).check(geometry_of(pipe.model))
    cached = judged(pipe, _first(whole, cached_tasks), steps, work, plan)
    print(json.dumps(rates(cached), indent=2))
    rows = judged(pipe, _first(whole, tasks), steps, work)
    by_id = {row["id"]: row["answer"] for row in cached}
    alike = [row["answer"] == by_id[row["id"]] for row in rows if row["id"] in by_id]
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
        "cached": {
            "rates": rates(cached),
            "answers_as_dense": [sum(alike), len(alike)],
            "tasks": cached,
        },
    }
    print(json.dumps(found["rates"], indent=2))
    out.write_text(json.dumps(found, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=HERE / "models" / "llada-tiny")
    parser.add_argument("--work", type=Path, default=HERE / ".work" / "llada-tiny-evaluation")
    parser.add_argument("--tasks", type=int, default=16, help="of each kind")
    parser.add_argument("--cached-tasks", type=int, default=16, help="of each kind, with a cache")
    parser.add_argument("--steps", type=int, default=GEN_LENGTH, help="of each answer")
    parser.add_argument("--windows", type=int, default=64, help="of held-out text, each length")
    parser.add_argument("--bfloat16", action="store_true", help="answer tasks in bfloat16")
    parser.add_argument("--out", type=Path, help="instead of evaluation.json of the model")
    parser.add_argument(
        "--plan", type=Path, help="a plan, by which the cached tasks are answered instead"
    )
    return parser.parse_args()


if __name__ == "__main__":
    options = _arguments()
    main(
        options.model,
        options.work,
        options.tasks,
        options.cached_tasks,
        options.steps,
        options.windows,
        options.bfloat16,
        options.out or options.model / "evaluation.json",
        options.plan,
    )
