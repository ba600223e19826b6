"""What leaving windows out saves in each stage of a windowed model, and where the rest of the time
goes.

    python samples/measure_windows.py                       # Swin-T at 672 x 672, random weights
    python samples/measure_windows.py --model samples/models/swin-digits --batch 8
    python samples/measure_windows.py --model swinv2_tiny_window8_256 --size 768 --keeps 0.5

Stages are timed alone, on the tokens that enter them in the whole model: the blocks as timm has
them, with scaled_dot_product_attention as TIMM_FUSED_ATTN=2 has it, and with some windows kept, in
turns. What a pruned stage does is told apart: ranking
windows, which no keep makes shorter; moving tokens, out of the map and back into a copy of it; and
the blocks themselves. Times are medians, on the CPU; no weight's value changes them.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import timm
import torch
from torch import Tensor, nn
from tqdm import tqdm
from window_adaptation import keeps_plan, window_blocks

import accel
from accel.files import write_atomically
from accel.pipelines.enable import session_of
from accel.pipelines.provenance import device_name, versions
from accel.pipelines.segmenter import Segmenter
from accel.pipelines.vision import VisionPipeline, fuse_attention
from accel.pipelines.window_blocks import stages_served
from accel.pipelines.window_stage import Stage
from accel.plan import Plan
from accel.window_keeps import WindowKeeps, kept_of
from accel.window_ranking import gather, scatter

PARTS = ("ranking", "moving", "blocks")


def model_of(name: str, size: int) -> nn.Module:
    """The model inside a saved pipeline, or a new one of timm."""
    if Path(name).is_dir():
        model = VisionPipeline.from_pretrained(name).model
        return model.backbone if isinstance(model, Segmenter) else model
    try:
        return timm.create_model(name, pretrained=False, img_size=size).eval()
    except (TypeError, RuntimeError) as error:
        raise SystemExit(
            f"{name!r} is no folder and no windowed model of timm at {size} pixels: {error}"
        ) from error


def keeping(model: nn.Module, keep: float) -> Plan:
    """Every block that can leave windows out keeps so many."""
    return keeps_plan(model, WindowKeeps(dict.fromkeys(window_blocks(model), keep)), "keeps")


def inputs_of(model: nn.Module, stages: list[Stage], images: Tensor) -> list[Tensor]:
    """What enters each stage."""
    found: dict[int, Tensor] = {}
    hooks = [
        stage.blocks[0].module.register_forward_pre_hook(
            lambda _, args, number=number: found.update({number: args[0].clone()})
        )
        for number, stage in enumerate(stages)
    ]
    model(images)
    for hook in hooks:
        hook.remove()
    return [found[number] for number in range(len(stages))]


def as_host(stage: Stage, x: Tensor) -> Tensor:
    for block in stage.blocks:
        x = block.own(x)
    return x


def pruned(stage: Stage, x: Tensor) -> Tensor:
    for block in stage.blocks:
        x = block.run(x)
    return x


def part_seconds(stage: Stage, x: Tensor) -> dict[str, float]:
    """What `pruned` does, told apart."""
    seconds = dict.fromkeys(PARTS, 0.0)

    def timed(part: str, function: Callable, *args: object) -> Tensor:
        start = time.perf_counter()
        out = function(*args)
        seconds[part] += time.perf_counter() - start
        return out

    cuts = {block: block.host.cut(x).windows for block in stage.blocks}
    some = [block for block in stage.blocks if kept_of(block.keep, cuts[block]) < cuts[block]]
    if not some:
        timed("blocks", as_host, stage, x)
        return seconds
    rankings = timed("ranking", stage.rankings, some[0], x, False)
    for block in stage.blocks:
        if block not in some:
            x = timed("blocks", block.own, x)
            continue
        ranking = rankings[block.host.shifted]
        kept = kept_of(block.keep, cuts[block])
        places, kind = ranking.places.first(kept), ranking.windows[:, :kept]
        flat = x.flatten(1, -2)
        rows = timed("moving", gather, flat, places)
        mask = stage.mask(block.host, x)
        rows = timed("blocks", block.host.inside, rows, places.valid, mask, kind)
        x = timed("moving", scatter, flat, places, rows).view(x.shape)
    return seconds


def seconds_of(function: Callable, *args: object) -> float:
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


@torch.inference_mode()
def measure(model: nn.Module, images: Tensor, keep: float, rounds: int) -> dict[str, dict]:
    """By stage, and of the whole model: seconds dense and pruned, their ratio in pairs, parts."""
    rows: dict[str, dict] = {}
    with accel.enabled(model, keeping(model, keep), check=False):
        stages = stages_served(session_of(model))
        jobs = list(zip(stages, inputs_of(model, stages, images), strict=True))
        for stage, x in tqdm(jobs, desc=f"keep {keep}", unit="stage"):
            for function in (as_host, pruned):
                function(stage, x)
            pairs = [
                (seconds_of(as_host, stage, x), seconds_of(pruned, stage, x)) for _ in range(rounds)
            ]
            parts = [part_seconds(stage, x) for _ in range(rounds)]
            kept = [kept_of(b.keep, n := b.host.cut(x).windows) / n for b in stage.blocks]
            rows[stage.name] = {
                **_told(pairs),
                "kept": sum(kept) / len(kept),
                "windows": stage.blocks[0].host.cut(x).windows,
                "parts": {name: median(p[name] for p in parts) for name in PARTS},
            }
    plan = keeping(model, keep)
    pairs = []
    for turn in range(rounds + 1):
        dense = seconds_of(model, images)
        with accel.enabled(model, plan, check=False):
            if turn == 0:
                model(images)
            pairs.append((dense, seconds_of(model, images)))
    rows["whole model"] = _told(pairs[1:])
    return rows


def _told(pairs: list[tuple[float, float]]) -> dict[str, float]:
    return {
        "dense_s": median(d for d, _ in pairs),
        "pruned_s": median(p for _, p in pairs),
        "ratio": median(p / d for d, p in pairs),
    }


def table(found: dict[float, dict[str, dict]]) -> list[str]:
    """Markdown: milliseconds, and what is saved."""
    head = ["keep", "stage", "windows kept", "dense ms", "pruned ms", "saved", *PARTS]
    lines = [f"| {' | '.join(head)} |", "|---|---|" + "---:|" * (len(head) - 2)]
    for keep, rows in found.items():
        for name, row in rows.items():
            kept = f"{row['kept']:.0%} of {row['windows']}" if "kept" in row else ""
            cells = [f"{keep:g}", name, kept, f"{1e3 * row['dense_s']:.1f}"]
            cells += [f"{1e3 * row['pruned_s']:.1f}", f"{1 - row['ratio']:.0%}"]
            cells += [f"{1e3 * row['parts'][p]:.1f}" if "parts" in row else "" for p in PARTS]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        default="swin_tiny_patch4_window7_224",
        help="a name of timm, or a folder of a vision pipeline",
    )
    parser.add_argument("--size", type=int, default=672, help="pixels of a side")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.8, 0.6, 0.4, 0.2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("outputs/windows"))
    args = parser.parse_args()
    if not all(0 < keep <= 1 for keep in args.keeps):
        parser.error(f"keeps are in (0, 1], got {args.keeps}")
    model = model_of(args.model, args.size)
    fuse_attention(model)
    images = torch.randn(args.batch, 3, args.size, args.size)
    found = {keep: measure(model, images, keep, args.rounds) for keep in args.keeps}
    device = device_name(torch.device("cpu"))
    told = {
        "model": args.model,
        "size": args.size,
        "batch": args.batch,
        "rounds": args.rounds,
        "threads": torch.get_num_threads(),
        "device": device,
        "versions": versions(),
        "keeps": {str(keep): rows for keep, rows in found.items()},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out / "windows.json", json.dumps(told, indent=1))
    print(f"{args.model}, {args.size} x {args.size}, batch {args.batch}, {device}")
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()
