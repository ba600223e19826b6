"""What a choice costs on this device: a measured table, and the price of a plan by it.

Every entry is a ratio to the host's fastest dense attention of the same shape, dtype and device,
measured in turn with it, so that a busy machine shifts both. Prices add up over heads.

The generation time that is predicted is Amdahl's: with `share` the part of the host's own dense
generation spent in the sites and `ratio` the mean price over all steps and sites,

    speedup = 1 / (1 - share * (1 - ratio))
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from accel.blocking import Blocking
from accel.choice import Choice
from accel.dense import usual_dense
from accel.estimators import Estimator
from accel.files import write_atomically
from accel.kernels.arguments import RESTS
from accel.kernels.attention import sparse_attention
from accel.kernels.block_mask import BlockMask
from accel.layout import Layout
from accel.masks import selectable, static_keep
from accel.plan import Plan
from accel.timing import in_turns

KEEPS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)


@dataclass(frozen=True, slots=True)
class Shape:
    """One attention call: what a price depends on besides the choice."""

    tokens: int
    heads: int
    head_dim: int
    dtype: str
    device: str
    block: tuple[int, int]
    precision: str = "full"


@dataclass(frozen=True, slots=True)
class CostTable:
    """Prices of one shape.

    dense_ms: the host's fastest dense call; sparse: "rest/ordered" -> price at each of KEEPS;
    select: work of an estimator -> price of one selection; dense: price of a dense call by accel's
    own kernel in the precisions of dense recipes, whatever that of the shape is.
    """

    shape: Shape
    dense_ms: float
    sparse: Mapping[str, tuple[float, ...]]
    select: Mapping[str, float]
    dense: Mapping[str, float]

    @property
    def own_dense(self) -> float:
        """Price of a dense call by accel's own kernel in the precision of the shape."""
        return self.price(1.0, "drop", False)

    def price(self, keep: float, rest: str, ordered: bool) -> float:
        """Price of a head that keeps `keep` of its blocks: linear between the measured keeps."""
        prices = self.sparse[f"{rest}/{'ordered' if ordered else 'natural'}"]
        if keep <= KEEPS[0]:
            # what is left there is mostly the fixed part of a row, so the price hardly falls
            return prices[0]
        for low, high, a, b in zip(KEEPS, KEEPS[1:], prices, prices[1:], strict=False):
            if keep <= high:
                return a + (b - a) * (keep - low) / (high - low)
        return prices[-1]

    def save(self, path: Path) -> None:
        write_atomically(path, json.dumps(asdict(self), indent=1))

    @classmethod
    def load(cls, path: Path) -> "CostTable":
        data = json.loads(path.read_text())
        sparse = {name: tuple(prices) for name, prices in data["sparse"].items()}
        shape = Shape(**{**data["shape"], "block": tuple(data["shape"]["block"])})
        return cls(shape, data["dense_ms"], sparse, data["select"], data["dense"])


def measure(
    shape: Shape,
    *,
    estimators: tuple[Estimator, ...] = (),
    layout: Layout | None = None,
    rounds: int = 5,
    known: CostTable | None = None,
    progress: Callable[[Iterator[Any]], Iterator[Any]] = lambda jobs: jobs,
) -> CostTable:
    """Measure the prices of one shape on this device; medians over `rounds`.

    Masks are random with equal counts in every row: the price depends on the keep, hardly on which
    blocks are kept. Tensors lie in memory as models hand them over, tokens before heads. layout is
    needed to time estimators. known: a table of this shape whose prices are not measured again.
    """
    device = torch.device(shape.device)
    generator = torch.Generator().manual_seed(0)
    size = (1, shape.tokens, shape.heads, shape.head_dim)
    q, k, v = (
        torch.randn(size, generator=generator)
        .to(device, getattr(torch, shape.dtype))
        .transpose(1, 2)
        for _ in range(3)
    )
    order = torch.stack([torch.randperm(shape.tokens, generator=generator)] * shape.heads)
    jobs: dict[tuple[str, Any], Callable[[], Any]] = {}
    for rest in RESTS if known is None else ():
        for name, turn in (("natural", None), ("ordered", order.to(device))):
            for keep in KEEPS:
                mask = _random_mask(shape, keep, generator).to(device)
                jobs[f"{rest}/{name}", keep] = partial(
                    sparse_attention,
                    q,
                    k,
                    v,
                    mask,
                    rest=rest,
                    order=turn,
                    precision=shape.precision,
                )
    if known is None:
        everything = _random_mask(shape, 1.0, generator).to(device)
        for word in ("full", "half"):
            jobs["dense", word] = partial(sparse_attention, q, k, v, everything, precision=word)
    for estimator in estimators:
        if layout is None:
            raise ValueError("estimators are timed on a layout; pass layout=")
        blocking = Blocking(layout, "thw", shape.block)
        seen = selectable(shape.precision, q, k, v)
        jobs["select", estimator.work] = partial(estimator.select, *seen, blocking=blocking)
    dense_s: list[float] = []
    prices: dict[tuple[str, Any], float] = {}
    for key, job in progress(iter(jobs.items())):
        times = in_turns(
            {"dense": partial(usual_dense, q, k, v), "job": job}, device, rounds=rounds
        )
        dense_s += times["dense"]
        prices[key] = median(b / a for a, b in zip(times["dense"], times["job"], strict=True))
    select = {kind: price for (name, kind), price in prices.items() if name == "select"}
    if known is not None:
        return replace(known, select={**known.select, **select})
    names = dict.fromkeys(name for name, _ in prices if name not in ("select", "dense"))
    return CostTable(
        shape=shape,
        dense_ms=median(dense_s) * 1000,
        sparse={name: tuple(prices[name, keep] for keep in KEEPS) for name in names},
        select=select,
        dense={word: value for (name, word), value in prices.items() if name == "dense"},
    )


def keep_of(choice: Choice, layout: Layout, block: tuple[int, int]) -> float | None:
    """The fraction of blocks that a choice will compute; None where only the call can tell."""
    if isinstance(choice.select, Estimator):
        return getattr(choice.select, "keep", None)
    return float(static_keep(choice, layout, block, torch.device("cpu")).float().mean())


def price(
    plan: Plan, tables: Mapping[str, CostTable], *, layout: Layout, steps: int, share: float
) -> Plan:
    """`plan` with what the tables predict of it in `expected`.

    tables: one for each precision of the plan. share: part of a dense generation spent in the
    sites. A plan with a choice whose keep only the call can tell is returned as it is.
    """
    keeps: dict[Choice, float] = {}
    for choice in {c for bands in plan.sites.values() for heads in bands for c in heads}:
        keep = keep_of(choice, layout, plan.block)
        if keep is None:
            return plan
        keeps[choice] = keep
    phases = [plan.schedule.phase(step, steps) for step in range(steps)]
    ratios: dict[str, list[float]] = {}
    by_step = [0.0] * steps
    for site, bands in plan.sites.items():
        table = tables[plan.precision_of(site)]
        dense = table.own_dense if plan.dense == "kernel" else 1.0
        ratios[site] = []
        for band, heads in enumerate(bands):
            ratio = _site_price(heads, keeps, table, dense)
            in_band = [p for p in phases if p.band == band]
            looks = len({p.generation for p in in_band})
            select = mean(select_price(c, table) for c in heads)
            ratios[site].append(ratio + (select * looks / len(in_band) if in_band else 0.0))
        for step, phase in enumerate(phases):
            by_step[step] += dense if phase.band is None else min(dense, ratios[site][phase.band])
    # sites without a name run dense
    words = [plan.precision_of("")] * (plan.n_sites - len(ratios))
    if isinstance(plan.precision, Mapping):
        told = [word for site, word in plan.precision.items() if site not in ratios]
        words[: len(told)] = told
    rest = sum(tables[w].own_dense if plan.dense == "kernel" else 1.0 for w in words)
    table = tables[plan.precisions[0]]
    ratio = mean((priced + rest) / plan.n_sites for priced in by_step)
    expected = {
        **plan.expected,
        "attention_ratio": ratios,
        "attention_share": share,
        "dense_ratio": {**table.dense, **{word: tables[word].own_dense for word in tables}},
        "speedup": 1 / (1 - share * (1 - ratio)),
        "steps": steps,
        "device": table.shape.device,
        "dtype": table.shape.dtype,
        "tokens": table.shape.tokens,
    }
    return replace(plan, expected=expected)


def dense_speedup(expected: Mapping[str, Any], precision: str) -> float | None:
    """What a priced plan expects of accel's own dense kernel: its speed-up over the host's dense.

    None for a precision that was not measured.
    """
    ratio = expected["dense_ratio"].get(precision)
    return None if ratio is None else 1 / (1 - expected["attention_share"] * (1 - ratio))


def dense_price(table: CostTable) -> float:
    """Price of a dense call: 1 by the host, or less by accel's own kernel where that is faster.

    It has to be faster by a twentieth: below that, noise would decide.
    """
    own = table.own_dense
    return own if own < 0.95 else 1.0


def fastest_dense(plan: Plan, tables: Mapping[str, CostTable]) -> Plan:
    """`plan`, with its dense calls on accel's own kernel where that beats the host's attention.

    With several precisions it has to in each of them.
    """
    own = all(dense_price(tables[word]) < 1 for word in plan.precisions)
    return replace(plan, dense="kernel") if own else plan


def _site_price(
    heads: tuple[Choice, ...], keeps: Mapping[Choice, float], table: CostTable, dense: float
) -> float:
    """Mean over heads; beside sparse heads a dense one is a row of full counts in the kernel."""
    if all(c.dense for c in heads):
        return dense
    return mean(_head_price(c, keeps[c], table) for c in heads)


def _head_price(choice: Choice, keep: float, table: CostTable) -> float:
    if keep == 0 and choice.rest == "drop":
        return 0.0
    return table.price(keep, choice.rest, choice.order != "thw")


def select_price(choice: Choice, table: CostTable) -> float:
    if not isinstance(choice.select, Estimator):
        return 0.0
    return table.select.get(choice.select.work, 0.0)


def _random_mask(shape: Shape, keep: float, generator: torch.Generator) -> BlockMask:
    q_blocks, kv_blocks = (-(-shape.tokens // b) for b in shape.block)
    count = max(1, round(keep * kv_blocks))
    scores = torch.rand(shape.heads, q_blocks, kv_blocks, generator=generator)
    dense = torch.zeros_like(scores, dtype=torch.bool)
    dense.scatter_(-1, scores.topk(count, -1).indices, True)
    return BlockMask.from_dense(
        dense, block=shape.block, q_length=shape.tokens, kv_length=shape.tokens
    )
