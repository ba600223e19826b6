"""What accel costs where it changes nothing: a denoiser under a plan of keep 1.0, and without.

    python samples/measure_overhead.py --model wan-digits
    python samples/measure_overhead.py --model flux-digits --rounds 15

The calls of one generation are kept and made again, each by turns with the plan and without, so
that a slow moment of the machine meets both. For every step the median of the ratios is told, and
over all steps the median and the worst; beside them the ratio of the fastest rounds, which other
work on the machine moves least.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median, quantiles

import torch
from omegaconf import OmegaConf
from tqdm import tqdm

import accel
from accel.choice import DENSE
from accel.files import write_atomically
from accel.pipelines.adapters import denoisers_of, geometry_of
from accel.pipelines.host import Host
from accel.pipelines.model_settings import model_config
from accel.pipelines.provenance import device_name, versions
from accel.plan import Plan
from accel.schedule import Schedule

CONFIGS = Path(__file__).parent.parent / "configs" / "model"


def recorded_calls(host: Host) -> list[dict]:
    """The arguments of every denoiser call of one generation."""
    model, calls = denoisers_of(host.pipe)[0], []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append({"args": args, "kwargs": kwargs}),
        with_kwargs=True,
    )
    host.generate(host.config.prompts[0], 0)
    hook.remove()
    return calls


def seconds_of(model, call: dict, step: int, total: int) -> float:
    """Of one call, at a step that is said."""
    cuda = next(model.parameters()).is_cuda
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    with accel.step(step, total):
        model(*call["args"], **call["kwargs"])
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def overhead(host: Host, rounds: int, every: int) -> list[list[tuple[float, float]]]:
    """For every so manieth call of a generation, its seconds with the plan and without, by round.

    Both are called once untimed after accel is put on or taken off, as in a generation.
    """
    model = denoisers_of(host.pipe)[0]
    geometry = geometry_of(host.pipe)
    # sites are taken, their steps are sparse ones, and every head keeps everything
    plan = Plan.uniform("keep 1.0", geometry, DENSE, schedule=Schedule(dense_start=0.0))
    calls = recorded_calls(host)
    kept = range(0, len(calls), every)
    seconds: list[list[tuple[float, float]]] = [[] for _ in kept]
    for turn in tqdm(range(rounds), desc="rounds"):
        taken: dict[str, list[float]] = {}
        for name in ("plain", "accel")[:: 1 if turn % 2 else -1]:
            if name == "accel":
                accel.enable(model, plan, check=False)
            else:
                accel.disable(model)
            seconds_of(model, calls[0], 0, len(calls))
            taken[name] = [seconds_of(model, calls[i], i, len(calls)) for i in kept]
        for index, pair in enumerate(zip(taken["accel"], taken["plain"], strict=True)):
            seconds[index].append(pair)
    accel.disable(model)
    return seconds


def main(model: str, rounds: int, every: int, out: Path | None) -> None:
    """Measure, print, and write the numbers into `out`."""
    settings = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{model}.yaml"), resolve=True)
    host = Host(model_config(settings))
    seconds = overhead(host, rounds, every)
    ratios = [[ours / plain for ours, plain in call] for call in seconds]
    low, middle, high = quantiles([r for row in ratios for r in row], n=4)
    fastest = [tuple(map(min, zip(*call, strict=True))) for call in seconds]
    found = {
        "model": model,
        "device": device_name(host.device),
        "versions": versions(),
        "calls": len(ratios),
        "rounds": rounds,
        "fastest rounds": sum(ours for ours, _ in fastest) / sum(plain for _, plain in fastest),
        "median": middle,
        "quartiles": [low, high],
        "worst step": max(map(median, ratios)),
        "by step": [round(median(r), 4) for r in ratios],
    }
    print(json.dumps({k: v for k, v in found.items() if k != "by step"}, indent=2))
    if out is not None:
        write_atomically(out, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="wan-digits", help="a name in configs/model")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--every", type=int, default=1, help="every so manieth call of a generation"
    )
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    main(**vars(parser.parse_args()))
