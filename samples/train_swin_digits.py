"""Train `samples/models/swin-digits`: a small Swin that gives every pixel of a canvas its class.

    python samples/train_swin_digits.py --minutes 60 --seed 0
    python samples/train_swin_digits.py --keeps plan.json --minutes 10 --resume

Two stages, `dense` and `adapt`: training as usual, then with another share of the windows in every
step, so that a search can judge any keeps. With --keeps a third, `tune`, goes on from these at the
keeps of plans that searches have found, in turn with all windows, and its weights go to a folder of
their own.

A length in minutes suits any machine; `--steps` gives the same weights again on the same one. Given
again with --resume, the command goes on where it stopped. Two CPU cores are enough.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from swin_digits_model import build_pipeline, export, write_canvases
from swin_digits_training import (
    ADAPT,
    DENSE,
    TUNE,
    Around,
    SegmentationSettings,
    adapting,
    segmentation_step,
    tuning,
)
from training import Length, Run

from accel.pipelines.vision import VisionPipeline
from accel.plan import Plan

HERE = Path(__file__).parent
SHARES = (0.7, 0.3)  # of the minutes: dense, adapt
STAGES = {"dense": DENSE, "adapt": ADAPT, "tune": TUNE}


def _stage(
    run: Run,
    name: str,
    pipe: VisionPipeline,
    length: Length,
    settings: SegmentationSettings,
    around: Around | None,
    out: Path | None,
) -> None:
    """Train one stage, or load its checkpoint where `length` is over; the averaged weights are what
    is exported, and what the next stage begins with.
    """
    number = [*STAGES].index(name.partition("-")[0])
    more = {} if around is None else {"around": around}
    step, parts = segmentation_step(pipe, settings, run.seed, number, **more)
    kept = build_like(pipe)

    def after_checkpoint(progress: float) -> None:
        kept.model.load_state_dict(parts["average"].weights["model"])
        if out is not None:
            export(out, kept)
        run.log(stage="export", of=name, progress=progress)

    print(f"{name}:", run.stage(name, length, dict(parts), step, after_checkpoint=after_checkpoint))
    pipe.set_input_size(*pipe.config.size)
    pipe.model.load_state_dict(parts["average"].weights["model"])


def build_like(pipe: VisionPipeline) -> VisionPipeline:
    """Another pipeline of the same configuration."""
    return VisionPipeline.create(pipe.config)


def main(
    minutes: float,
    steps: list[int] | None,
    seed: int,
    out: Path | None,
    work: Path,
    keeps: list[Path],
    threads: int,
    bfloat16: bool,
    compiled: bool,
    resume: bool,
    pipe: VisionPipeline | None = None,
    stages: dict[str, SegmentationSettings] = STAGES,
) -> None:
    """Run the stages; of `tune` alone where `keeps` are given, from the others' checkpoints."""
    torch.set_num_threads(threads)
    work.mkdir(parents=True, exist_ok=True)
    if not resume and any(work.glob("*.pt")):
        raise SystemExit(
            f"{work} holds an earlier run: give --resume to go on with it, or another --work"
        )
    out = out or HERE / "models" / ("swin-digits-tuned" if keeps else "swin-digits")
    run = Run(work, seed)
    torch.manual_seed(seed)
    pipe = build_pipeline() if pipe is None else pipe
    stages = {name: replace(stage, bfloat16=bfloat16) for name, stage in stages.items()}
    # a compiled step would be compiled again for every new keep
    dense = replace(stages["dense"], compiled=compiled)
    if keeps:
        plans = [Plan.load(path).check(pipe) for path in keeps]
        found = [plan.windows for plan in plans if plan.windows is not None]
        if len(found) < len(plans) or not (work / "adapt.pt").exists():
            raise SystemExit(
                f"{' '.join(map(str, keeps))}: each needs keeps of windows, and {work} an adapt.pt"
                " of an earlier run"
            )
        over = Length(0.0)
        _stage(run, "dense", pipe, over, dense, None, None)
        _stage(run, "adapt", pipe, over, stages["adapt"], None, None)
        length = Length(minutes, None if steps is None else steps[0])
        # one checkpoint for each set of plans
        name = "-".join(["tune", *(plan.digest for plan in plans)])
        _stage(run, name, pipe, length, stages["tune"], tuning(pipe, found), out)
        return
    write_canvases(out)
    counts = steps or (None, None)
    lengths = [Length(minutes * s, c) for s, c in zip(SHARES, counts, strict=True)]
    _stage(run, "dense", pipe, lengths[0], dense, None, out)
    _stage(run, "adapt", pipe, lengths[1], stages["adapt"], adapting(pipe, seed), out)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="training time, shared out among the stages"
    )
    parser.add_argument(
        "--steps",
        type=int,
        nargs="+",
        metavar="STEPS",
        help="steps of dense and adapt, or of tune, instead of minutes",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="models/swin-digits; with --keeps one of its own")
    parser.add_argument("--work", type=Path, default=HERE / ".work" / "swin-digits")
    parser.add_argument(
        "--keeps", type=Path, nargs="+", default=[], help="plans whose keeps of windows to tune for"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--bfloat16", action="store_true", help="autocast: faster where the CPU has AMX"
    )
    parser.add_argument(
        "--compiled",
        action="store_true",
        help="torch.compile of the dense stage: takes minutes for each size of canvas",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the checkpoints in --work"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main(**vars(_arguments()))
