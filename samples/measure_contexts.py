"""What a step of the text sample takes at each length of context, dense and with plans.

    python samples/measure_contexts.py                 # 512 to 16,384 tokens, a picture and a table
    python samples/measure_contexts.py --lengths 512 2048 --dtype bfloat16

For every length a dense generation and one with each plan take turns, `--rounds` times. The calls
of a generation are timed one by one, told apart into dense ones, those that make masks, and those
after them; medians of each are put together to a run of `--steps` steps. `sparsed` is SparseD with
a crossover measured on this device (`accel.pipelines.crossover`): below it calls run dense.
"""

import argparse
import io
import json
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tqdm import tqdm

import accel
from accel.files import write_atomically
from accel.pipelines.adapters import geometry_of
from accel.pipelines.crossover import with_crossover
from accel.pipelines.dllm import MaskedDiffusionPipeline
from accel.pipelines.provenance import device_name, versions
from accel.plan import Plan
from accel.recipes import recipe

HERE = Path(__file__).resolve().parent
MODEL = HERE / "models" / "llada-tiny"
TIMED = 12  # calls of a timed generation, of one block
BLOCK = 32


def plans(pipe: MaskedDiffusionPipeline, steps: int, lengths: list[int]) -> dict[str, Plan]:
    """SparseD in accel's precision, with its crossover and without, and two caches."""
    geometry = geometry_of(pipe.model)
    sparse = recipe("sparsed", geometry, block=(64, 32))
    return {
        "sparsed, always": sparse,
        "sparsed": with_crossover(sparse, pipe, steps=steps, lengths=lengths),
        "fast_dllm": recipe("fast_dllm", geometry, threshold=None),
        "sparse_dllm": recipe("sparse_dllm", geometry),
    }


def call_seconds(pipe: MaskedDiffusionPipeline, tokens: int) -> list[float]:
    """Seconds of each call of a generation with so many tokens in all."""
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(8, len(pipe.tokenizer), (1, tokens - BLOCK), generator=generator)
    marks = [time.perf_counter()]

    def note(*_: object) -> dict:
        marks.append(time.perf_counter())
        return {}

    pipe(
        input_ids=ids,
        gen_length=BLOCK,
        block_length=BLOCK,
        num_inference_steps=TIMED,
        rule="quota",
        output_type="ids",
        callback_on_step_end=note,
    )
    return [b - a for a, b in pairwise(marks)]


def step_seconds(plan: Plan | None, seconds: list[list[float]], steps: int, block: int) -> float:
    """Of one step in the mean of a run of `steps`, from the calls of several generations.

    block: steps of a block, after which a cache is filled anew.
    """
    by_call = [median(times) for times in zip(*seconds, strict=True)]
    if plan is None:
        return median(by_call[1:])
    if plan.cache is None:
        dense = round(plan.schedule.dense_start * TIMED)
        whole, first, then = median(by_call[1:dense]), by_call[dense], median(by_call[dense + 1 :])
        early = round(plan.schedule.dense_start * steps)
        return (early * whole + first + (steps - early - 1) * then) / steps
    whole = plan.cache.delay + 1
    return (sum(by_call[:whole]) + (block - whole) * median(by_call[whole + 1 :])) / block


def draw(rows: dict[str, dict[int, float]], crossover: int, title: str, path: Path) -> None:
    """An SVG: time of a step over that of a dense one, by length."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    dense = rows["dense"]
    colours = ("#0f766e", "#2563eb", "#d97706", "#9333ea")
    for (name, found), colour in zip(list(rows.items())[1:], colours, strict=True):
        axes.plot(list(found), [found[n] / dense[n] for n in found], "o-", color=colour, label=name)
    axes.axhline(1.0, color="#1e293b", lw=1)
    axes.axvline(crossover, color="#94a3b8", ls="--", lw=1)
    axes.annotate(f" crossover of sparsed: {crossover}", (crossover, 1.02), color="#475569")
    axes.set(xlabel="tokens", ylabel="time of a step, dense = 1", title=title)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(dense), [str(n) for n in dense])
    axes.set_yscale("log")
    axes.legend(frameon=False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    write_atomically(path, buffer.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    lengths = [512, 1024, 2048, 4096, 8192, 16384]
    parser.add_argument("--lengths", type=int, nargs="+", default=lengths)
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", type=Path, default=Path("outputs/contexts"))
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    pipe = MaskedDiffusionPipeline.from_pretrained(str(MODEL), dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    arms: dict[str, Plan | None] = {"dense": None, **plans(pipe, args.steps, args.lengths)}
    rows: dict[str, dict[int, float]] = {name: {} for name in arms}
    jobs = [(n, turn) for n in args.lengths for turn in range(args.rounds)]
    found: dict[tuple[str, int], list[list[float]]] = {}
    for tokens, turn in tqdm(jobs, unit="round"):
        for name, plan in list(arms.items())[:: 1 if turn % 2 == 0 else -1]:
            if plan is None:
                seconds = call_seconds(pipe, tokens)
            else:
                with accel.enabled(pipe, plan, check=False, guard=False):
                    seconds = call_seconds(pipe, tokens)
            found.setdefault((name, tokens), []).append(seconds)
    for (name, tokens), seconds in found.items():
        rows[name][tokens] = step_seconds(arms[name], seconds, args.steps, BLOCK)
    crossover = arms["sparsed"].expected["crossover"]["tokens"]
    title = f"llada-tiny, {args.dtype}, {device_name(torch.device('cpu'))}"
    args.out.mkdir(parents=True, exist_ok=True)
    told = {"step_seconds": rows, "crossover": crossover, "dtype": args.dtype}
    told |= {
        "device": device_name(torch.device("cpu")),
        "versions": versions(),
        "steps": args.steps,
    }
    write_atomically(args.out / "contexts.json", json.dumps(told, indent=1))
    draw(rows, crossover, title, args.out / "contexts.svg")
    print(f"{title}, {torch.get_num_threads()} threads; crossover of sparsed: {crossover} tokens")
    print(f"| ms a step | {' | '.join(map(str, args.lengths))} |")
    print("|---|" + "---:|" * len(args.lengths))
    for name, by_length in rows.items():
        cells = [
            f"{1000 * s:.0f} ({s / rows['dense'][n]:.2f})" if name != "dense" else f"{1000 * s:.0f}"
            for n, s in by_length.items()
        ]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
