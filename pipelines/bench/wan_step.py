"""A whole denoising step of a Wan transformer with random weights, dense and with accel.

How much of a step attention takes, and so what a plan can gain, depends on sizes, not on weights.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor
from torch.nn.attention import sdpa_kernel

import accel
from accel import configs
from accel.choice import Choice
from accel.dense import SDPA
from accel.errors import AccelError
from accel.estimators import Pooled
from accel.kernels.attention import resolve_backend
from accel.pipelines.adapters import geometry_of
from accel.pipelines.bench.case import Block
from accel.pipelines.bench.contest import Outcome, reason
from accel.pipelines.bench.gate import relative_error
from accel.pipelines.bench.results import Results, Row, measured
from accel.pipelines.bench.settings import BACKENDS
from accel.pipelines.bench.wan_model import Step, WanStep, random_step
from accel.pipelines.enable import enabled, session_of
from accel.pipelines.host import DTYPES, resolve_device
from accel.pipelines.pricing import dense_plan
from accel.plan import Plan
from accel.recipes import recipe
from accel.records import Record
from accel.schedule import Schedule
from accel.timing import in_turns
from accel.untrusted import check_whole

BLOCK: Block = (128, 64)
# how far accel's kernel, keeping every block, may carry the output from that of dense attention
LIMIT = 0.05
# so much slower in attention alone, and no step is the fastest
HOPELESS = 1.3
# the options that a step depends on
READ = ("kernel", "device", "dtype", "rounds", "wan_step", "page", "out")


def wan_step(config: Mapping[str, Any]) -> Results:
    """Measure the step that `config` describes, into `wan-step.json`; what is there is not measured
    again.
    """
    device = resolve_device("device", config["device"])
    if device.type != "cuda":
        raise AccelError(
            f"kernel=wan_step needs a GPU, and the device is {device.type}: a step of the 14B model"
            " takes hours here; kernel=attention measures its attention at shapes of your own"
        )
    _check_unread(config)
    size = WanStep.of(config["wan_step"], config["dtype"])
    check_whole("rounds", config["rounds"], 1)
    settings = {"wan_step": asdict(size), "rounds": config["rounds"]}
    results = Results(Path(config["out"]) / "wan-step.json", device, settings)
    # a dense attention that refused the step is not asked again: the others took turns without it
    if not results.rows:
        measure_step(size, device, config["rounds"], results)
    return results


def _check_unread(config: Mapping[str, Any]) -> None:
    """An option that a step does not read, and that is not as it is delivered, is an error."""
    usual: Any = OmegaConf.load(Path(configs.__path__[0]) / "bench.yaml")
    changed = [
        name
        for name, value in config.items()
        if name not in READ and name != "shapes" and value != usual.get(name)
    ]
    if set(config["shapes"]) != set(BACKENDS):
        changed.append("shapes")
    if changed:
        raise AccelError(
            f"kernel=wan_step does not read {', '.join(changed)}; leave it out. It reads"
            f" {', '.join(READ)}"
        )


@torch.no_grad()
def measure_step(size: WanStep, device: torch.device, rounds: int, results: Results) -> None:
    """Add the rows of the step with every dense attention of torch, and with accel at `size.keep`.

    A dense attention that alone is far slower than the fastest takes no turn; its row says so. In
    every round each runs once untimed, which is where accel makes its masks, and once timed;
    rounds that `results` holds are not run again. The share of attention is that of the fastest
    dense one, and that of accel.
    """
    step = random_step(size, device)
    geometry = geometry_of(step.model)
    contexts = _dense_contexts(device)
    failed = _left_out(contexts, size, device)
    sparse = Plan.uniform(
        "wan_step",
        geometry,
        Choice(Pooled(keep=size.keep, value_bias=False)),
        schedule=Schedule(dense_start=0.0),
        block=BLOCK,
    )
    error = _distance(step, recipe("full", geometry, block=BLOCK))
    while len(results.samples) < rounds:
        taken: dict[str, Any] = {}
        for name, context in contexts.items():
            if name in failed:
                continue
            try:
                with context():
                    (taken[name],) = in_turns({name: step}, device, rounds=1)[name]
            except RuntimeError as problem:
                failed[name] = reason(problem)
        if error <= LIMIT:
            taken["accel"] = _with_plan(step, sparse, device, resolve_backend("auto", device))
        if not set(taken) & set(contexts):
            raise AccelError(f"no dense attention runs the step: {failed}")
        results.samples.append({**taken, "failed": failed})
        results.add([])
    usual = {name: [r[name] for r in results.samples if name in r] for name in contexts}
    medians = {name: median(times) for name, times in usual.items() if times}
    baseline = min(medians, key=medians.__getitem__)
    # a schedule of one phase, so that the two steps share a record
    dense = replace(dense_plan(geometry), schedule=Schedule(dense_start=0.0))
    with contexts[baseline]():
        share = Taken(*_with_plan(step, dense, device, "dense")).share

    def row(backend: str, mode: str, outcome: Outcome, **more: Any) -> Row:
        return Row(
            kernel="wan_step", backend=backend, mode=mode, baseline=baseline,
            **asdict(size.case), **measured(outcome, None), **more,
        )  # fmt: skip

    rows = []
    for name, times in usual.items():
        price = medians[name] / medians[baseline] if times else None
        note = results.samples[-1]["failed"].get(name, "")
        outcome = Outcome(tuple(times), price, note=note)
        rows.append(row(name, "dense", outcome, share=share if name == baseline else None))
    pairs = [
        (Taken(*r["accel"]), r[baseline]) for r in results.samples if {"accel", baseline} <= set(r)
    ]
    outcome = Outcome(
        seconds=tuple(taken.seconds for taken, _ in pairs),
        price=median(taken.seconds / usual for taken, usual in pairs) if pairs else None,
        error=error,
        limit=LIMIT,
        note="" if pairs else f"not timed: with every block kept its error is {error:.1e}",
    )
    more = {}
    if pairs:
        more = {"share": median(taken.share for taken, _ in pairs), "kept": pairs[0][0].kept}
    results.add([*rows, row("accel", "sparse", outcome, keep=size.keep, **more)])


def _dense_contexts(
    device: torch.device,
) -> dict[str, Callable[[], AbstractContextManager[Any]]]:
    """What makes torch's attention, which Wan calls, run as each of its implementations."""
    if device.type != "cuda":
        return {"sdpa": nullcontext}
    return {name: partial(sdpa_kernel, backend) for name, backend in SDPA.items()}


def _left_out(
    contexts: Mapping[str, Callable[[], AbstractContextManager[Any]]],
    size: WanStep,
    device: torch.device,
) -> dict[str, str]:
    """Why a dense attention cannot be the step's fastest, by its name: one call of it alone."""
    if len(contexts) == 1:
        return {}
    case = size.case
    shape = (case.batch, case.heads, case.tokens, case.dim)
    q, k, v = (torch.randn(shape, dtype=DTYPES[case.dtype], device=device) for _ in "qkv")
    found, seconds = dict[str, str](), dict[str, float]()
    for name, context in contexts.items():
        try:
            with context():
                job = partial(F.scaled_dot_product_attention, q, k, v)
                (seconds[name],) = in_turns({name: job}, device, rounds=1)[name]
        except RuntimeError as problem:
            found[name] = reason(problem)
    fastest = min(seconds.values(), default=0.0)
    for name, taken in seconds.items():
        if taken > HOPELESS * fastest:
            found[name] = f"not timed: its attention alone takes {taken / fastest:.1f}x the fastest"
    return found


def _distance(step: Step, plan: Plan) -> float:
    """How far the output under a plan of accel's own dense attention is from the model's own."""
    truth = step().double()
    device = truth.device
    with enabled(step.model, plan, check=False, strict=True), accel.step(0, 1):
        found = relative_error(step(), truth)
        _check_kernels(_records(step), resolve_backend("auto", device))
    return found


class Taken(NamedTuple):
    """What a step took: seconds, the part of them in self-attention, and the blocks it kept."""

    seconds: float
    share: float
    kept: float


def _with_plan(step: Step, plan: Plan, device: torch.device, kernel: str) -> Taken:
    """A step under a plan whose masks were made in the step before, all its sites by `kernel`."""
    turn = iter(range(2))

    def call() -> Tensor:
        with accel.step(next(turn), 2):
            return step()

    with enabled(step.model, plan, check=False, strict=True):
        (seconds,) = in_turns({"": call}, device, rounds=1)[""]
        records = _records(step)
    _check_kernels(records, kernel)
    for record in records:
        record.settle()
    attention = sum(record.seconds[-1] for record in records)
    kept = sum(record.keep for record in records) / sum(record.calls for record in records)
    return Taken(seconds, attention / seconds, kept)


def _records(step: Step) -> list[Record]:
    return list(session_of(step.model).records.values())


def _check_kernels(records: Sequence[Record], kernel: str) -> None:
    """What was timed is what it is called."""
    used = set().union(*(record.kernels for record in records))
    if used != {kernel}:
        raise AccelError(f"the step ran by {sorted(used)}, not by {kernel} alone")
