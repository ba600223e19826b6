"""A whole denoising step of a Wan transformer with random weights, dense and with accel.

How much of a step attention takes, and so what a plan can gain, depends on sizes, not on weights.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

import accel
from accel.choice import Choice
from accel.dense import SDPA
from accel.errors import AccelError
from accel.estimators import Pooled
from accel.pipelines.adapters import geometry_of
from accel.pipelines.bench_contest import Outcome, reason
from accel.pipelines.bench_gate import relative_error
from accel.pipelines.bench_results import Results, Row, measured
from accel.pipelines.bench_settings import Block
from accel.pipelines.bench_table import as_text
from accel.pipelines.bench_wan_model import Step, WanStep, random_step
from accel.pipelines.enable import enabled, session_of
from accel.pipelines.host import resolve_device
from accel.pipelines.pricing import dense_plan
from accel.plan import Plan
from accel.recipes import recipe
from accel.schedule import Schedule
from accel.timing import in_turns
from accel.untrusted import check_whole

BLOCK: Block = (128, 64)
# how far accel's kernel, keeping every block, may carry the output from that of dense attention
LIMIT = 0.05


def wan_step(config: Mapping[str, Any]) -> None:
    """Measure the step that `config` describes, print it and write `wan-step.json`."""
    size = WanStep.of(config["wan_step"])
    check_whole("rounds", config["rounds"], 1)
    device = resolve_device("device", config["device"])
    if device.type != "cuda":
        raise AccelError(
            f"kernel=wan_step needs a GPU, and the device is {device.type}: a step of the 14B model"
            " takes hours here; kernel=attention measures its attention at shapes of your own"
        )
    settings = {"wan_step": config["wan_step"], "rounds": config["rounds"]}
    results = Results(Path(config["out"]) / "wan-step.json", device, settings)
    if not results.rows:
        results.add(step_rows(size, device, config["rounds"]))
    print(as_text(results.rows))
    print(f"results: {results.path}")


@torch.no_grad()
def step_rows(size: WanStep, device: torch.device, rounds: int) -> list[Row]:
    """The step with every dense attention of torch, and with accel at `size.keep`.

    In every round each runs once untimed, which is where accel makes its masks, and once timed.
    The share of attention is that of the fastest dense one, and that of accel.
    """
    step = random_step(size, device)
    contexts = _dense_contexts(device)
    times: dict[str, list[float]] = {name: [] for name in contexts}
    failed: dict[str, str] = {}
    sparse: list[Taken] = []
    geometry = geometry_of(step.model)
    plan = Plan.uniform(
        "wan_step",
        geometry,
        Choice(Pooled(keep=size.keep, value_bias=False)),
        schedule=Schedule(dense_start=0.0),
        block=BLOCK,
    )
    error = _distance(step, recipe("full", geometry, block=BLOCK))
    passed = error <= LIMIT
    for _ in range(rounds):
        for name, context in contexts.items():
            if name in failed:
                continue
            try:
                with context():
                    times[name] += in_turns({name: step}, device, rounds=1)[name]
            except RuntimeError as problem:
                failed[name] = reason(problem)
        if passed:
            sparse.append(_with_plan(step, plan, device))
    usual = {name: median(found) for name, found in times.items() if found}
    if not usual:
        raise AccelError(f"no dense attention runs the step: {failed}")
    baseline = min(usual, key=usual.__getitem__)
    with contexts[baseline]():
        dense = _with_plan(step, dense_plan(geometry), device)

    def row(backend: str, mode: str, outcome: Outcome, **more: Any) -> Row:
        found = {**measured(outcome, 0.0), "tflops": None}
        return Row(
            kernel="wan_step", backend=backend, mode=mode, baseline=baseline,
            **asdict(size.case), **found, **more,
        )  # fmt: skip

    rows = [
        row(
            name,
            "dense",
            Outcome(
                seconds=tuple(times[name]),
                price=usual[name] / usual[baseline] if name in usual else None,
                note=failed.get(name, ""),
            ),
            share=dense.share if name == baseline else None,
        )
        for name in contexts
    ]
    seconds = [taken.seconds for taken in sparse]
    pairs = zip(seconds, times[baseline], strict=False)
    outcome = Outcome(
        seconds=tuple(seconds),
        price=median(a / b for a, b in pairs) if passed else None,
        error=error,
        limit=LIMIT,
        note="" if passed else f"not timed: with every block kept its error is {error:.1e}",
    )
    more = {"share": median(t.share for t in sparse), "kept": sparse[0].kept} if passed else {}
    return [*rows, row("accel", "sparse", outcome, keep=size.keep, **more)]


def _dense_contexts(
    device: torch.device,
) -> dict[str, Callable[[], AbstractContextManager[Any]]]:
    """What makes torch's attention, which Wan calls, run as each of its implementations."""
    if device.type != "cuda":
        return {"sdpa": nullcontext}
    return {name: partial(sdpa_kernel, backend) for name, backend in SDPA.items()}


def _distance(step: Step, plan: Plan) -> float:
    """How far the output under a plan is from that of the model itself."""
    truth = step().double()
    with enabled(step.model, plan, check=False), accel.step(0, 1):
        return relative_error(step(), truth)


class Taken(NamedTuple):
    """What a step took: seconds, the part of them in self-attention, and the blocks it kept."""

    seconds: float
    share: float
    kept: float


def _with_plan(step: Step, plan: Plan, device: torch.device) -> Taken:
    """A step under a plan whose masks were made in the step before."""
    turn = iter(range(2))

    def call() -> Tensor:
        with accel.step(next(turn), 2):
            return step()

    with enabled(step.model, plan, check=False):
        (seconds,) = in_turns({"": call}, device, rounds=1)[""]
        records = list(session_of(step.model).records.values())
    for record in records:
        record.settle()
    attention = sum(record.seconds[-1] for record in records)
    kept = sum(record.keep for record in records) / sum(record.calls for record in records)
    return Taken(seconds, attention / seconds, kept)
