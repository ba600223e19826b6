"""How far queries and keys have moved since a mask was made (HASTE, arXiv 2605.14513).

For a head, with q̄ and k̄ the means of its blocks and sums over all blocks and dimensions,

    d = (Σ|q̄ - q̄'| + Σ|k̄ - k̄'|) / (Σ|q̄'| + Σ|k̄'|)

where the means with a prime are those that the mask was made for. HASTE compares one mean of all
tokens, without a denominator. Means of blocks do not cancel out, and a ratio has no scale, so one
bound serves all models. The bound is looked at on the host: each look waits for the device.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

MOST_HEADS = 0.5  # masks are made anew when more heads than this part have moved


@dataclass(frozen=True, slots=True, eq=False)
class BlockMeans:
    """fp32 means of the blocks of q and k, natural order; padding counts nowhere."""

    q: Float[Tensor, "batch heads q_blocks dim"]
    k: Float[Tensor, "batch kv_heads kv_blocks dim"]

    @classmethod
    def of(
        cls,
        q: Float[Tensor, "batch heads tokens dim"],
        k: Float[Tensor, "batch kv_heads tokens dim"],
        block: tuple[int, int],
        valid: int,
    ) -> "BlockMeans":
        """valid: tokens before the padding."""
        return cls(_means(q[:, :, :valid], block[0]), _means(k[:, :, :valid], block[1]))

    def drift(self, made_for: "BlockMeans") -> Float[Tensor, "batch heads"]:
        """d of every head of q; key heads serve their group."""
        moved = self._per_head(self.q - made_for.q, self.k - made_for.k)
        size = self._per_head(made_for.q, made_for.k)
        return moved / size.clamp(min=torch.finfo(torch.float32).tiny)

    def _per_head(self, q: Tensor, k: Tensor) -> Tensor:
        of_q, of_k = (x.abs().sum((2, 3)) for x in (q, k))
        return of_q + of_k.repeat_interleave(q.shape[1] // k.shape[1], 1)

    def moved(self, made_for: "BlockMeans", bound: float, heads: list[int]) -> Int[Tensor, " 2"]:
        """How many of `heads` (over the batch) have a drift above `bound`, and how many there are;
        counts of several ranks may be added.
        """
        over = self.drift(made_for)[:, heads] > bound
        return torch.stack([over.sum(), torch.full_like(over.sum(), over.numel())])


def most(moved: Int[Tensor, " 2"]) -> bool:
    """Whether that is more than half of them. Waits for the device."""
    some, of = moved.tolist()
    return some > MOST_HEADS * of


def _means(x: Tensor, size: int) -> Tensor:
    """Means of runs of `size` tokens; the last may be shorter."""
    whole = x.shape[2] // size * size
    parts = [x[:, :, :whole].unflatten(2, (-1, size)).mean(3, dtype=torch.float32)]
    if whole < x.shape[2]:
        parts.append(x[:, :, whole:].mean(2, keepdim=True, dtype=torch.float32))
    return torch.cat(parts, 2)
