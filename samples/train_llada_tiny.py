"""Train `samples/models/llada-tiny`: a small masked diffusion language model that answers questions
about long texts.

    python samples/train_llada_tiny.py --minutes 60 --seed 0 --bfloat16
    python samples/train_llada_tiny.py --begin samples/models/llada-tiny --begin-at 0.55

A length in minutes suits any machine; `--steps` gives the same weights again on the same one. Given
again with --resume, the command goes on where it stopped. Two CPU cores are enough.
"""

import argparse
import copy
from pathlib import Path

import torch
from llada_tiny_denoiser import LladaSettings, Rows, llada_step
from llada_tiny_model import build_model, build_tokenizer, export, load, write_tasks
from retrieval_tasks import stdlib_texts
from training import Length, Run

HERE = Path(__file__).parent


def main(
    minutes: float,
    steps: int | None,
    seed: int,
    out: Path,
    work: Path,
    bfloat16: bool,
    compiled: bool,
    resume: bool,
    begin: Path | None = None,
    begin_at: float = 0.0,
    settings: LladaSettings | None = None,
) -> None:
    """One stage, whose prompts grow as it goes on."""
    if not 0 <= begin_at < 1:
        raise SystemExit(f"--begin-at is {begin_at}; it is a fraction of the phases, below 1")
    torch.set_num_threads(min(2, torch.get_num_threads()))
    work.mkdir(parents=True, exist_ok=True)
    if not resume and any(work.glob("*.pt")):
        raise SystemExit(
            f"{work} holds an earlier run: give --resume to go on with it, or another --work"
        )
    run = Run(work, seed)
    settings = settings or LladaSettings(bfloat16=bfloat16, compiled=compiled, begin_at=begin_at)
    texts = stdlib_texts(held_out=False)
    tokenizer = build_tokenizer(texts)
    rows = Rows.of(tokenizer, texts, settings)
    torch.manual_seed(seed)
    model = build_model(tokenizer)
    if begin is not None:
        model.load_state_dict(load(begin)[0].state_dict())
    kept = copy.deepcopy(model)
    write_tasks(out, tokenizer)
    step, parts = llada_step(model, rows, settings, seed)

    def after_checkpoint(progress: float) -> None:
        kept.load_state_dict(parts["average"].weights["model"])
        export(out, kept, tokenizer)
        run.log(stage="export", progress=progress)

    length = Length(minutes, steps)
    done = run.stage("denoiser", length, parts, step, after_checkpoint=after_checkpoint)
    print("denoiser:", done)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--steps", type=int, help="steps instead of minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "models" / "llada-tiny")
    parser.add_argument("--work", type=Path, default=HERE / ".work" / "llada-tiny")
    parser.add_argument(
        "--bfloat16", action="store_true", help="autocast: faster where the CPU has AMX"
    )
    parser.add_argument(
        "--compiled", action="store_true", help="torch.compile: half as fast again, after minutes"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the checkpoints in --work"
    )
    parser.add_argument(
        "--begin", type=Path, help="a folder of an earlier model, whose weights to begin with"
    )
    parser.add_argument(
        "--begin-at",
        type=float,
        default=0.0,
        help="the fraction of the phases to begin with: 0.55 for trained weights, which then see"
        " long prompts at once",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main(**vars(_arguments()))
