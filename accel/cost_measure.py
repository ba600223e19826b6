"""Measures a latency table on this device, every price in turn with the host's dense attention."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from accel.blocking import Blocking
from accel.choice import Choice
from accel.cost_table import KEEPS, CostTable, Price, Shape
from accel.dense import usual_dense
from accel.estimators import Estimator
from accel.kernels.arguments import RESTS
from accel.kernels.attention import sparse_attention
from accel.kernels.block_mask import BlockMask
from accel.layout import Layout
from accel.masks import sampled_recall, selectable, site_mask
from accel.origin import Origin
from accel.pattern import Window
from accel.timing import in_turns

__all__ = ["DENSE_BLOCK", "measure"]

# of the recipes that are dense by accel's own kernel
DENSE_BLOCK = (128, 64)
NEAR = Window(t=1)  # a pattern of one term
# a group in which a price spreads by more than this part of itself takes as many rounds again
WIDE = 0.2

Job = Callable[[], Any]
Group = tuple[str, Callable[[], Mapping[Any, Job]]]


def measure(
    shape: Shape,
    *,
    estimators: tuple[Estimator, ...] = (),
    layout: Layout | None = None,
    rounds: int = 5,
    known: CostTable | None = None,
    origin: Origin | None = None,
    progress: Callable[[Iterator[Any]], Iterator[Any]] = lambda groups: groups,
) -> CostTable:
    """Measure the prices of one shape on this device; medians over `rounds`, with their spread.

    Masks are random with equal counts in every row: the price depends on the keep, hardly on which
    blocks are kept. Tensors lie in memory as models hand them over, tokens before heads. layout is
    needed to time estimators and the making of masks; without it the latter count as free. Where
    the machine is so busy that prices spread, there are twice as many rounds. known:
    a table of this shape whose prices are not measured again. origin: goes into the table.
    progress: is given the groups of prices that are measured together, and gives them back.
    """
    if estimators and layout is None:
        raise ValueError("estimators are timed on a layout; pass layout=")
    device = torch.device(shape.device)
    generator = torch.Generator().manual_seed(0)
    size = (shape.batch, shape.tokens, shape.heads, shape.head_dim)
    q, k, v = (
        torch.randn(size, generator=generator)
        .to(device, getattr(torch, shape.dtype))
        .transpose(1, 2)
        for _ in range(3)
    )
    groups: list[Group] = []
    if known is None:
        groups += _kernel(shape, q, k, v, generator)
        if layout is not None:
            groups.append(("masks", partial(_masks, shape, layout, q, k, v)))
    for estimator in estimators:
        assert layout is not None
        job = partial(_estimator, estimator, shape, layout, q, k, v)
        groups.append((f"select {estimator.work}", job))
    dense_s: list[float] = []
    prices: dict[tuple[str, Any], Price] = {}
    for name, make in progress(iter(groups)):
        jobs = {"dense": partial(usual_dense, q, k, v), **make()}
        samples, dense = _ratios(jobs, device, rounds)
        if any(high - low > WIDE * value for value, low, high in map(Price.of, samples.values())):
            more, dense_again = _ratios(jobs, device, rounds)
            samples = {key: ratios + more[key] for key, ratios in samples.items()}
            dense += dense_again
        dense_s += dense
        prices |= {(name, key): Price.of(ratios) for key, ratios in samples.items()}
    select = {e.work: prices[f"select {e.work}", "first"] for e in estimators}
    again = {
        e.work: prices[f"select {e.work}", "again"]
        for e in estimators
        if (f"select {e.work}", "again") in prices
    }
    if known is not None:
        return replace(known, select={**known.select, **select}, again={**known.again, **again})
    keeps = knots(shape)
    rows = [name for name, _ in groups if "/" in name and not name.startswith("select")]
    making: dict[str, Any] = {
        key: price for (name, key), price in prices.items() if name == "masks"
    }
    return CostTable(
        shape=shape,
        dense_ms=Price(*(1000 * x for x in Price.of(dense_s))),
        keeps=keeps,
        sparse={name: tuple(prices[name, keep] for keep in keeps) for name in rows},
        select=select,
        again=again,
        dense={word: price for (name, word), price in prices.items() if name == "own dense"},
        origin=Origin() if origin is None else origin,
        **making,
    )


def _ratios(
    jobs: Mapping[Any, Job], device: torch.device, rounds: int
) -> tuple[dict[Any, list[float]], list[float]]:
    """Of every job but "dense", its times as multiples of dense in the same round; dense's own."""
    times = in_turns(jobs, device, rounds=rounds)
    dense = times.pop("dense")
    ratios = {
        key: [b / a for a, b in zip(dense, taken, strict=True)] for key, taken in times.items()
    }
    return ratios, dense


def knots(shape: Shape) -> tuple[float, ...]:
    """The keeps of KEEPS as rows of whole blocks have them, each once."""
    kv_blocks = -(-shape.tokens // shape.block[1])
    counts = dict.fromkeys(max(1, round(keep * kv_blocks)) for keep in KEEPS)
    return tuple(count / kv_blocks for count in counts)


def _kernel(
    shape: Shape, q: Tensor, k: Tensor, v: Tensor, generator: torch.Generator
) -> list[Group]:
    """Attention at every keep, in one group for each rest and order, and dense."""
    masks = {keep: random_mask(shape, keep, generator).to(q.device) for keep in knots(shape)}
    order = torch.stack([torch.randperm(shape.tokens, generator=generator)] * shape.heads)
    order = order.to(q.device)

    def sparse(rest: str, turn: Tensor | None) -> Mapping[Any, Job]:
        return {
            keep: partial(
                sparse_attention, q, k, v, mask, rest=rest, order=turn, precision=shape.precision
            )
            for keep, mask in masks.items()
        }

    def dense() -> Mapping[Any, Job]:
        mask = BlockMask.full(
            shape.heads,
            block=DENSE_BLOCK,
            q_length=shape.tokens,
            kv_length=shape.tokens,
            device=q.device,
        )
        words = ("full", "half")
        return {w: partial(sparse_attention, q, k, v, mask, precision=w) for w in words}

    groups: list[Group] = [
        (f"{rest}/{name}", partial(sparse, rest, turn))
        for rest in RESTS
        for name, turn in (("natural", None), ("ordered", order))
    ]
    return [*groups, ("own dense", dense)]


def _masks(shape: Shape, layout: Layout, q: Tensor, k: Tensor, v: Tensor) -> Mapping[Any, Job]:
    """What a mask takes when its blocks are known, what the look at its recall takes, and what the
    blocks of a pattern do.
    """
    choices = (Choice(NEAR),) * shape.heads
    blocking = Blocking(layout, "thw", shape.block)
    patterns: dict[Any, Tensor] = {}
    make = partial(
        site_mask, choices, q, k, v, layout=layout, block=shape.block, lse={}, patterns=patterns
    )
    return {
        "mask": make,
        "recall": partial(sampled_recall, q, k, make()),
        "term": partial(NEAR.mask, blocking, q.device),
    }


def _estimator(
    estimator: Estimator, shape: Shape, layout: Layout, q: Tensor, k: Tensor, v: Tensor
) -> Mapping[Any, Job]:
    """One selection, and one that is handed the log-sum-exp that the first has found."""
    select = partial(
        estimator.select,
        *selectable(shape.precision, q, k, v),
        blocking=Blocking(layout, "thw", shape.block),
        patterns={},
    )
    lse = select().lse
    return {"first": select} | ({} if lse is None else {"again": partial(select, lse=lse)})


def random_mask(shape: Shape, keep: float, generator: torch.Generator) -> BlockMask:
    """So many blocks of every row, at random."""
    q_blocks, kv_blocks = (-(-shape.tokens // b) for b in shape.block)
    count = max(1, round(keep * kv_blocks))
    scores = torch.rand(shape.heads, q_blocks, kv_blocks, generator=generator)
    dense = torch.zeros_like(scores, dtype=torch.bool)
    dense.scatter_(-1, scores.topk(count, -1).indices, True)
    return BlockMask.from_dense(
        dense, block=shape.block, q_length=shape.tokens, kv_length=shape.tokens
    )
