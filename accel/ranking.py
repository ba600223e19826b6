"""From scores of blocks to the blocks that are kept: the rules that all estimators share.

* Text rows and columns are always kept, blocks of padding never (`Blocking.force`). Text columns
  take nothing from the share of the visual ones.
* Every row with a valid query keeps at least one block, and rows of one head keep equally many
  wherever a share is given; a global choice over rows shows as artefacts (AdaSpa).
* A score of -inf is never kept. Ties go to the block that comes first, so the same scores keep the
  same blocks.
"""

from math import inf

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from accel.blocking import Blocking

__all__ = [
    "best_blocks",
    "competing_blocks",
    "recall_of",
    "row_counts",
    "settled",
    "top_blocks",
    "top_mass",
]


def top_blocks(
    scores: Float[Tensor, "batch heads q_blocks kv_blocks"], keep: int | float, blocking: Blocking
) -> Bool[Tensor, "batch heads q_blocks kv_blocks"]:
    """Per row the `ceil(keep * n)` best of its n visual blocks, and text; never a score of -inf."""
    allowed = competing_blocks(scores, blocking)
    return settled(best_blocks(scores, allowed, row_counts(keep, allowed)), scores, blocking)


def top_mass(
    scores: Float[Tensor, "batch heads q_blocks kv_blocks"],
    tau: int | float,
    blocking: Blocking,
    *,
    least: int | float = 0.0,
) -> Bool[Tensor, "batch heads q_blocks kv_blocks"]:
    """Per row text and the fewest visual blocks that together hold `tau` of the row's mass.

    Scores are masses, at least 0, in any unit; -inf marks a block that must not be kept. `tau = 1`
    keeps the blocks of mass 0 too. However few they are, `ceil(least * n)` of the n visual blocks
    are kept, the heaviest.
    """
    allowed = competing_blocks(scores, blocking)
    text = blocking.text_blocks(scores.device)[1] & (scores > -inf)
    fixed = scores.where(text, 0.0).sum(-1, keepdim=True)
    ranked = scores.where(allowed, 0.0).sort(dim=-1, descending=True, stable=True).values
    needed = tau * (fixed + ranked.sum(-1, keepdim=True))
    before = fixed + ranked.cumsum(-1) - ranked
    counts = (before < needed).sum(-1, keepdim=True).maximum(row_counts(least, allowed))
    counts = allowed.sum(-1, keepdim=True) if tau >= 1 else counts
    return settled(best_blocks(scores, allowed, counts), scores, blocking)


def recall_of(
    mass: Float[Tensor, "batch heads q_blocks kv_blocks"],
    keep: Bool[Tensor, "batch heads q_blocks kv_blocks"],
) -> Float[Tensor, "batch heads"]:
    """Share of the mass that lies in kept blocks; rows weigh as much as they have mass."""
    return mass.where(keep, 0.0).sum((2, 3)) / mass.sum((2, 3)).clamp(min=1e-30)


def competing_blocks(scores: Tensor, blocking: Blocking) -> Tensor:
    """Blocks that compete: columns without text, not padding, and a score above -inf."""
    apart = blocking.text_blocks(scores.device)[1] | blocking.pad_blocks(scores.device)[1]
    return ~apart & (scores > -inf)


def row_counts(keep: int | float, allowed: Tensor) -> Tensor:
    """`ceil(keep * n)` and at least 1, per row; the slack keeps 0.7 * 10 at 7."""
    count = allowed.sum(-1, keepdim=True)
    return (count.double() * keep - 1e-6).ceil().long().clamp(min=1)


def best_blocks(scores: Tensor, allowed: Tensor, counts: Tensor) -> Tensor:
    """The `counts` best allowed blocks of every row, ties to the one that comes first."""
    order = scores.masked_fill(~allowed, -inf).argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return (torch.empty_like(order).scatter_(-1, order, places) < counts) & allowed


def settled(keep: Tensor, scores: Tensor, blocking: Blocking) -> Tensor:
    """Text in, padding out, and out whatever the scores rule out (valid length of this call)."""
    return blocking.force(keep) & (scores > -inf)
