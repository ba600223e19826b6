"""Train `samples/models/vit-digits`: a small ViT that names the digit of a small canvas.

    python samples/train_vit_digits.py --minutes 18 --seed 0

A length in minutes suits any machine; `--steps` gives the same weights again on the same one. Given
again with --resume, the command goes on where it stopped. Two CPU cores are enough.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from training import Length, Run
from vit_digits_model import PATCH, build_pipeline, export, write_crops
from vit_digits_training import ClassifierSettings, classifier_step

from accel.pipelines.vision import VisionPipeline

HERE = Path(__file__).parent


def main(
    minutes: float,
    steps: int | None,
    seed: int,
    out: Path,
    work: Path,
    threads: int,
    bfloat16: bool,
    compiled: bool,
    resume: bool,
    pipe: VisionPipeline | None = None,
    settings: ClassifierSettings | None = None,
) -> None:
    """One stage, whose windows grow as it goes on."""
    torch.set_num_threads(threads)
    work.mkdir(parents=True, exist_ok=True)
    if not resume and any(work.glob("*.pt")):
        raise SystemExit(
            f"{work} holds an earlier run: give --resume to go on with it, or another --work"
        )
    run = Run(work, seed)
    torch.manual_seed(seed)
    pipe = build_pipeline() if pipe is None else pipe
    settings = replace(settings or ClassifierSettings(), bfloat16=bfloat16, compiled=compiled)
    patch = pipe.config.model_args.get("patch_size", PATCH)
    kept = VisionPipeline.create(pipe.config)
    write_crops(out)
    step, parts = classifier_step(pipe, settings, seed, patch)

    def after_checkpoint(progress: float) -> None:
        kept.model.load_state_dict(parts["average"].weights["model"])
        export(out, kept)
        run.log(stage="export", progress=progress)

    length = Length(minutes, steps)
    done = run.stage("classifier", length, dict(parts), step, after_checkpoint=after_checkpoint)
    print("classifier:", done)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=18.0)
    parser.add_argument("--steps", type=int, help="steps instead of minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "models" / "vit-digits")
    parser.add_argument("--work", type=Path, default=HERE / ".work" / "vit-digits")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--bfloat16", action="store_true", help="autocast: faster where the CPU has AMX"
    )
    parser.add_argument(
        "--compiled", action="store_true", help="torch.compile: faster steps, after minutes"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the checkpoints in --work"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main(**vars(_arguments()))
