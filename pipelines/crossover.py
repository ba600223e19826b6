"""From how many tokens on a plan's sparse calls are faster than dense ones on this device.

Prompts of text differ in length, and below some length block masks cost more than they leave out
(SparseD, arXiv 2509.24014, is slower than dense attention below 16k tokens, and does not tell). The
lengths are tried from the longest down to the first that does not gain, so that none above the
crossover loses; every try times the host's dense attention, a sparse call with as many blocks as
the plan keeps, and the selection of its blocks, in turn.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from accel.blocking import Blocking
from accel.choice import Choice
from accel.cost_measure import random_mask
from accel.cost_table import Shape
from accel.dense import usual_dense
from accel.estimators import Estimator
from accel.kernels.attention import sparse_attention
from accel.layout import Layout
from accel.masks import selectable
from accel.pipelines.adapters import denoisers_of, sites_of
from accel.pipelines.devices import execution_device
from accel.pipelines.text_host import TextHost
from accel.plan import Plan
from accel.timing import in_turns

__all__ = ["LENGTHS", "crossover", "price_at", "with_crossover"]

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
WINS = 0.98  # of a dense call: what takes longer than this is no gain
ROUNDS = 5


def with_crossover(
    plan: Plan, target: Any, *, steps: int, lengths: Sequence[int] | None = None
) -> Plan:
    """`plan`, with the length from which on its sparse calls are worth while here; shorter calls
    run dense. steps: of a run, over which its selections are spread. lengths: see `crossover`.

    A plan whose heads are all dense comes back as it is.
    """
    found = crossover(plan, target, steps=steps, lengths=lengths)
    if found is None:
        return plan
    model: Any = denoisers_of(target)[0]
    where = {
        "tokens": found,
        "device": execution_device(model).type,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    return replace(plan, expected={**plan.expected, "crossover": where})


def crossover(
    plan: Plan, target: Any, *, steps: int, lengths: Sequence[int] | None = None
) -> int | None:
    """The least of `lengths` from which on sparse calls win at all of them, and where they lose at
    the longest, twice that. None for a plan without sparse heads.

    lengths: in tokens; `LENGTHS` that the model was made for, unless given.
    """
    if not plan.wants_sparse:
        return None
    model = denoisers_of(target)[0]
    if lengths is None:
        longest = TextHost(model).longest or LENGTHS[-1]
        lengths = [n for n in LENGTHS if n <= longest] or LENGTHS[:1]
    down = sorted(lengths, reverse=True)
    found = 2 * down[0]
    with tqdm(down, desc="crossover", unit="length", leave=False) as bar:
        for tokens in bar:
            bar.set_postfix_str(f"{tokens} tokens")
            if price_at(plan, model, tokens, steps=steps) >= WINS:
                break
            found = tokens
    return found


def price_at(plan: Plan, model: nn.Module, tokens: int, *, steps: int) -> float:
    """What a sparse call of the plan takes at so many tokens, as a ratio to the host's dense call,
    with its part in the selections; the median over rounds, of the sites in the mean.
    """
    device = execution_device(model)
    dtype: torch.dtype = getattr(model, "dtype", torch.float32)
    groups: Counter[_Alike] = Counter()
    sparse_steps = max(1, plan.schedule.sparse_steps(steps))
    for site, module in sites_of(model).items():
        choices = plan.choices(site.name, 0)
        if choices is None or all(c.dense for c in choices):
            continue
        per_key = getattr(module, "num_key_value_groups", 1)
        precision = plan.precision_of(site.name)
        groups[_Alike(site.heads, site.head_dim, per_key, choices, precision)] += 1
    looks = len({phase.generation for phase in plan.schedule.steps_of(0, steps)})
    total = 0.0
    for alike, count in groups.items():
        taken = in_turns(_jobs(plan, alike, tokens, device, dtype), device, rounds=ROUNDS)
        times = {name: median(seconds) for name, seconds in taken.items()}
        sparse = times["sparse"] + times.get("select", 0.0) * looks / sparse_steps
        total += count * sparse / times["dense"]
    return total / groups.total()


class _Alike(NamedTuple):
    """Sites whose calls take the same time."""

    heads: int
    head_dim: int
    per_key: int
    choices: tuple[Choice, ...]
    precision: str


def _jobs(
    plan: Plan, alike: _Alike, tokens: int, device: torch.device, dtype: torch.dtype
) -> Mapping[str, Any]:
    """Dense attention, a sparse call, and where the choices look at the call their selection."""
    generator = torch.Generator().manual_seed(0)
    heads, dim, per_key, choices, precision = alike
    q, k, v = (
        torch.randn(1, tokens, n, dim, generator=generator).to(device, dtype).transpose(1, 2)
        for n in (heads, heads // per_key, heads // per_key)
    )
    layout = Layout.of([(1, 1, tokens - tokens // 8), (1, 1, tokens // 8)])
    blocking = Blocking(layout, "thw", plan.block)
    selects = [c.select for c in dict.fromkeys(choices) if isinstance(c.select, Estimator)]
    keep = sum(_keep(c, blocking, q, k, v, precision) for c in choices) / len(choices)
    shape = Shape(tokens, heads, dim, "", device.type, plan.block)
    mask = random_mask(shape, keep, generator).to(device)
    repeated = [x.repeat_interleave(per_key, 1) if per_key > 1 else x for x in (k, v)]
    jobs: dict[str, Any] = {
        "dense": partial(usual_dense, q, *repeated),
        "sparse": partial(sparse_attention, q, k, v, mask, precision=precision),
    }
    if selects:

        def select() -> None:
            for one in selects:
                one.select(*selectable(precision, q, k, v), blocking=blocking, patterns={})

        jobs["select"] = select
    return jobs


def _keep(choice: Choice, blocking: Blocking, *call: Any) -> float:
    """The share of blocks that a choice keeps of a call."""
    *tensors, precision = call
    if isinstance(choice.select, Estimator):
        seen = selectable(precision, *tensors)
        return float(
            choice.select.select(*seen, blocking=blocking, patterns={}).keep.float().mean()
        )
    return float(choice.select.mask(blocking, tensors[0].device).float().mean())
