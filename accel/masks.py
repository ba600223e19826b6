"""From the choices of one site to the block mask, orders and rests of one attention call."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from accel.blocking import Blocking
from accel.choice import Alternatives, Choice
from accel.estimators import Estimator
from accel.heads import of_heads
from accel.kernels.block_mask import BlockMask
from accel.layout import Layout
from accel.order import inverse
from accel.pattern import known_mask

RECALL_ROWS = 64


@dataclass(frozen=True, slots=True)
class SiteMask:
    """What `sparse_attention` needs for one site; `keep` is the fraction of blocks computed.

    kv_length: tokens before the layout's padding, which is never attended; None without padding.
    """

    mask: BlockMask
    order: Tensor | None
    rest: str | tuple[str, ...]
    keep: float
    kv_length: int | None = None


def static_keep(
    choice: Choice, layout: Layout, block: tuple[int, int], device: torch.device
) -> Bool[Tensor, "q_blocks kv_blocks"]:
    """The blocks of a choice whose pattern is known before the run."""
    if isinstance(choice.select, Estimator):
        raise TypeError(f"{choice.name} looks at q and k; it has no mask of its own")
    return choice.select.mask(Blocking(layout, choice.order, block), device)


def site_mask(
    choices: tuple[Choice, ...],
    q: Float[Tensor, "batch heads tokens dim"],
    k: Float[Tensor, "batch kv_heads tokens dim"],
    v: Float[Tensor, "batch kv_heads tokens dim"],
    *,
    layout: Layout,
    block: tuple[int, int],
    lse: dict[int, Tensor],
    patterns: dict[Any, Tensor] | None = None,
    precision: str = "full",
) -> SiteMask:
    """Select the blocks of every head; heads with the same choice are selected together.

    Of alternatives every head takes one, with its order and its rest.

    lse: log-sum-exp rows `[batch, 1, tokens]` of single heads, cached over refreshes (AdaSpa) and
    whatever the head's choice was; read and updated.
    patterns: block masks of patterns met before (`known_mask`); the same.
    """
    patterns = {} if patterns is None else patterns
    batch, heads, tokens, _ = q.shape
    online = any(c.online for c in choices)
    q_blocks, kv_blocks = (-(-tokens // b) for b in block)
    keep = q.new_zeros((batch if online else 1, heads, q_blocks, kv_blocks), dtype=torch.bool)
    if online:
        q, k, v = selectable(precision, q, k, v)
    taken = list(choices)
    for choice in dict.fromkeys(choices):
        group = [h for h, c in enumerate(choices) if c == choice]
        blocking = Blocking(layout, choice.order, block)
        if isinstance(choice.select, Estimator):
            known = torch.cat([lse[h] for h in group], 1) if lse.keys() >= set(group) else None
            found = choice.select.select(
                *(of_heads(x, group, heads) for x in (q, k, v)),
                blocking=blocking,
                lse=known,
                patterns=patterns,
            )
            if found.lse is not None:
                lse.update(zip(group, found.lse.split(1, dim=1), strict=True))
            if isinstance(choice.select, Alternatives) and found.taken is not None:
                for h, option in zip(group, found.taken, strict=True):
                    taken[h] = choice.select.options[option]
            keep[:, group] = found.keep
        else:
            keep[:, group] = known_mask(choice.select, blocking, q.device, patterns)
    indices = {o: Blocking(layout, o, block).indices(q.device) for o in {c.order for c in taken}}
    orders = [indices[c.order] for c in taken]
    order = _stack(orders, tokens, q.device)
    mask = BlockMask.from_dense(keep, block=block, q_length=tokens, kv_length=tokens)
    # the one place that waits for the device: the keep, and how long the lists have to be
    kept, width = torch.stack([mask.keep_per_head().mean(), mask.counts.max().float()]).tolist()
    rests = tuple(c.rest for c in taken)
    return SiteMask(
        # by sixteens: Triton compiles anew for sizes that sixteen divides and for those it does not
        mask=mask.trimmed(max(1, -(-int(width) // 16)) * 16),
        order=order,
        rest=rests[0] if len(set(rests)) == 1 else rests,
        keep=kept,
        kv_length=layout.valid_length if layout.valid_length < tokens else None,
    )


def selectable(precision: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors as estimators see them: fp32 as bf16 where the plan allows 16-bit operands."""
    half = precision != "full"
    return tuple(x.bfloat16() if half and x.dtype == torch.float32 else x for x in tensors)


def _stack(orders: list[Tensor | None], tokens: int, device: torch.device) -> Tensor | None:
    if all(o is None for o in orders):
        return None
    natural = torch.arange(tokens, device=device)
    return torch.stack([natural if o is None else o for o in orders])


def sampled_recall(
    q: Float[Tensor, "batch heads tokens dim"],
    k: Float[Tensor, "batch kv_heads tokens dim"],
    chosen: SiteMask,
) -> Float[Tensor, " heads"]:
    """Share of softmax mass inside the kept blocks, per head, on evenly spaced query rows.

    Padding has no mass and no rows.
    """
    _, heads, tokens, dim = q.shape
    valid = tokens if chosen.kv_length is None else chosen.kv_length
    rows = torch.linspace(0, valid - 1, min(RECALL_ROWS, valid), device=q.device).long()
    place = torch.arange(tokens, device=q.device)
    keep, block = chosen.mask.to_dense(), chosen.mask.block
    recall = []
    for h in range(heads):  # one at a time: the scores of all would be larger than the keys
        if chosen.order is not None:
            place = inverse(chosen.order[h])
        by_row = keep[:, h, place[rows] // block[0]]
        kept = by_row[..., place[:valid] // block[1]]
        keys = k[:, h * k.shape[1] // heads, :valid].float()
        shares = (q[:, h, rows].float() * dim**-0.5 @ keys.mT).softmax(-1)
        recall.append((shares * kept).sum(-1).mean())
    return torch.stack(recall)
