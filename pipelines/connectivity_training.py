"""Training the connectivity predictor of a vision transformer from its own dense attention.

Distillation as Sparsifiner's first stage has it (arXiv 2303.13755): the model is left as it is, and
the predictor of every site learns how each row of blocks spreads its mass.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from accel.blocking import Blocking
from accel.choice import Choice
from accel.errors import UnsupportedModelError
from accel.estimators.connectivity import Connectivity, block_statistics, connectivity
from accel.estimators.contract import Call
from accel.kernels.block_mass import block_mass
from accel.pipelines.adapters import adapter_of, geometry_of
from accel.pipelines.enable import untouched
from accel.pipelines.seen_calls import Seen, SeenCalls
from accel.plan import Plan
from accel.schedule import Schedule

__all__ = ["Trained", "calls_of", "spread", "start", "train_connectivity"]

Images = Float[Tensor, "batch channels height width"]


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """plan: the predictor at every site; losses: mean divergence in nats, one for each batch."""

    plan: Plan
    losses: tuple[float, ...]


def train_connectivity(
    model: nn.Module,
    batches: Iterable[Tensor],
    *,
    keep: float = 0.25,
    block: tuple[int, int] = (64, 64),
    order: str = "hilbert",
    rank: int | None = None,
    lr: float = 3e-3,
    seed: int = 0,
) -> Trained:
    """The plan whose predictors tell the spread of mass best, and how they came to.

    For every site, head and row of blocks the loss is ``KL(p || softmax(score))`` over the blocks
    of keys without prefix tokens (those with some are kept in any case), with p the shares of the
    true mass (`accel.kernels.block_mass`). Adam; the model gets no gradients. A plan for one size
    of images serves others: statistics of blocks are of any grid.

    batches: of images, each ``[batch, channels, height, width]``.
    keep: share of blocks that the plan keeps; nothing of the training depends on it.
    rank: columns of a head's matrices, at most its channels; None: as many. Training starts from
        the product of the blocks' means.
    """
    geometry = geometry_of(model)
    random = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    weights = [
        start(s.heads, s.head_dim, s.head_dim if rank is None else rank, random).to(device)
        for s in geometry.sites
    ]
    for weight in weights:
        weight.requires_grad_()
    optimizer = torch.optim.Adam(weights, lr=lr)
    losses = []
    for images in batches:
        optimizer.zero_grad()
        loss = torch.zeros((), device=device)
        for call, weight in zip(calls_of(model, images, order, block), weights, strict=True):
            loss = loss + _divergence(call, weight) / len(weights)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    sites: dict[str, Any] = {}
    for site, weight in zip(geometry.sites, weights, strict=True):
        choice = Choice(Connectivity.of(weight, keep), order=order)
        sites[site.name] = ((choice,) * site.heads,)
    told = {"batches": len(losses), "lr": lr, "seed": seed, "loss": losses[-1:] or None}
    plan = Plan.of(
        "connectivity",
        geometry,
        sites,
        schedule=Schedule(dense_start=0.0),
        block=block,
        provenance={"trained": told},
    )
    return Trained(plan, tuple(losses))


def start(
    heads: int, dim: int, rank: int, random: torch.Generator
) -> Float[Tensor, "2 heads statistics rank"]:
    """Matrices whose score is the product of the means of `rank` directions of the channels."""
    if not 1 <= rank <= dim:
        raise ValueError(f"rank is a number of directions from 1 to the {dim} channels, got {rank}")
    found = torch.zeros(2, heads, 3 * dim, rank)
    for head in range(heads):
        directions = torch.eye(dim)
        if rank < dim:
            directions = torch.linalg.qr(torch.randn(dim, dim, generator=random)).Q[:, :rank]
        found[:, head, :dim] = directions * (dim / rank) ** 0.5
    return found


def calls_of(
    model: nn.Module, images: Images, order: str, block: tuple[int, int]
) -> Iterator[Call]:
    """The attention calls of the model's sites for some images, in their order."""
    layout = adapter_of(model).layout(model, {"x": images})
    sites = len(geometry_of(model).sites)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), untouched(model), SeenCalls(frozenset(range(sites))) as calls:
            model(images)
    finally:
        for module, training in modes:
            module.training = training
    if calls.count != sites:
        raise UnsupportedModelError(
            f"of {sites} sites of this {type(model).__name__}, {calls.count} called"
            " scaled_dot_product_attention; build it with timm.layers.set_fused_attn(True)"
        )
    for number in range(sites):
        yield _call(calls.kept[number], Blocking(layout, order, block))  # type: ignore[arg-type]


def _call(seen: Seen, blocking: Blocking) -> Call:
    lengths = torch.full(seen.q.shape[:1], seen.q.shape[2], device=seen.q.device)
    more: dict[str, Any] = {"lse": None, "lengths": lengths, "padded": False}
    return Call(seen.q, seen.k, seen.k, blocking, seen.scale, patterns={}, scores={}, **more)


def spread(
    call: Call,
) -> tuple[Float[Tensor, "batch heads rows columns"], Bool[Tensor, "batch 1 rows columns"]]:
    """Shares of the true mass in each row of blocks, and which blocks compete for it."""
    block = call.blocking.block
    mass, _ = block_mass(call.q, call.k, block=block, scale=call.scale, order=call.order)
    rows = ~call.blocking.text_blocks(call.q.device)[0]
    competing = call.visual & rows.reshape(1, 1, -1, 1)
    mass = mass.where(competing, 0.0)
    return mass / mass.sum(-1, keepdim=True).clamp_min(1e-30), competing


def _divergence(call: Call, weights: Tensor) -> Float[Tensor, ""]:
    target, competing = spread(call)
    scores = connectivity(*block_statistics(call), weights)
    # what does not compete has no share; a finite score, so that rows of text are no NaN
    logs = scores.masked_fill(~competing, -1e4).log_softmax(-1)
    each = (target * (target.clamp_min(1e-30).log() - logs)).sum(-1)
    rows = competing.any(-1).expand_as(each)
    return each[rows].mean()
