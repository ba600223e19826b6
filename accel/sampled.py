"""What attention gives on a few query rows: exactly, and with the blocks of a choice.

What choices are judged by, in a calibration or while the model runs (Sparse VideoGen, arXiv
2502.01776, takes 64 rows). The logits of the rows are found once and shared by all choices, so that
memory stays at `rows x tokens` per head and a choice costs no second pass over the keys.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from accel.blocking import Blocking
from accel.heads import by_key_head
from accel.kernels.pooling import TAYLOR_GROUP, block_slopes, pool_blocks
from accel.layout import Layout
from accel.order import inverse

__all__ = ["SampledRows", "evenly_spaced"]


def evenly_spaced(
    count: int, tokens: int, device: torch.device | str | None = None
) -> Int[Tensor, " rows"]:
    """`count` of the places `0, …, tokens - 1`, both ends among them; all where there are fewer."""
    return torch.linspace(0, tokens - 1, min(count, tokens), device=device).long()


@dataclass(frozen=True, slots=True, eq=False)
class SampledRows:
    """Some query rows of one attention call, and their weights over all keys.

    rows: natural tokens. q: the rows, times the scale. weights: `exp(logit - peak)`, 0 at padding.
    lengths: valid tokens. All in fp32.
    """

    rows: Int[Tensor, " rows"]
    lengths: Int[Tensor, " batch"]
    q: Float[Tensor, "batch heads rows dim"]
    k: Float[Tensor, "batch kv_heads tokens dim"]
    v: Float[Tensor, "batch kv_heads tokens dim"]
    peak: Float[Tensor, "batch heads rows 1"]
    weights: Float[Tensor, "batch heads rows tokens"]

    @classmethod
    def of(
        cls,
        q: Float[Tensor, "batch heads tokens dim"],
        k: Float[Tensor, "batch kv_heads tokens dim"],
        v: Float[Tensor, "batch kv_heads tokens dim"],
        *,
        layout: Layout,
        rows: int | Int[Tensor, " rows"] = 64,
        scale: float | None = None,
        lengths: Int[Tensor, " batch"] | None = None,
    ) -> "SampledRows":
        """`rows` evenly spaced ones of the layout's valid tokens, or those that are named.

        k and v may have fewer heads than q; `scale` is `dim ** -0.5` unless given. Natural tokens
        from `lengths[b]` on are padding, as are those of the layout.
        """
        if isinstance(rows, int):
            rows = evenly_spaced(rows, layout.valid_length, q.device)
        some = q[:, :, rows].float() * (q.shape[3] ** -0.5 if scale is None else scale)
        k, v = k.float(), v.float()
        padded = lengths is not None or layout.valid_length < layout.length
        if lengths is None:
            lengths = torch.full(q.shape[:1], layout.valid_length, device=q.device)
        lengths = lengths.clamp(max=layout.valid_length)
        logits = by_key_head(some, k.mT)
        if padded:  # it may hold anything
            padding = torch.arange(k.shape[2], device=k.device) >= lengths[:, None]
            logits.masked_fill_(padding[:, None, None], -torch.inf)
            v = v.masked_fill(padding[:, None, :, None], 0.0)
        # the peak of a row without a valid key only has to be finite
        peak = logits.amax(-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).min)
        return cls(rows, lengths, some, k, v, peak, logits.sub_(peak).exp_())

    @property
    def exact(self) -> Float[Tensor, "batch heads rows dim"]:
        """The output of dense attention."""
        return by_key_head(self.weights, self.v) / self._total(self.weights)

    @property
    def values(self) -> Float[Tensor, "batch heads rows dim"]:
        """The rows' own values: the output under `identity`."""
        own = self.v[:, :, self.rows]
        return own.repeat_interleave(self.q.shape[1] // own.shape[1], 1)

    def output(
        self,
        keep: Bool[Tensor, "mask_batch heads q_blocks kv_blocks"],
        blocking: Blocking,
        rest: str = "drop",
    ) -> Float[Tensor, "batch heads rows dim"]:
        """The output with these blocks kept and `rest` for the others; 0 where a row has nothing.

        As `sparse_attention` gives it in fp32. `keep` may have a batch size of 1 for all.
        """
        by_row, kept = self._kept(keep, blocking)
        total, mixed = kept.sum(-1, keepdim=True), by_key_head(kept, self.v)
        if rest != "drop":
            order = blocking.indices(self.k.device)
            turn: dict[str, Any] = {
                "block": blocking.block[1],
                "lengths": self.lengths,
                "order": None if order is None else order[None],
            }
            k_mean, v_mean, log_n = pool_blocks(self.k, self.v, **turn)
            group = self.q.shape[1] // log_n.shape[1]
            log_n = log_n.repeat_interleave(group, 1)[:, :, None]
            logits = by_key_head(self.q, k_mean.mT) + log_n
            share = (logits - self.peak).exp() * ~by_row
            total, mixed = total + share.sum(-1, keepdim=True), mixed + by_key_head(share, v_mean)
            if rest == "taylor":
                slopes = block_slopes(self.k, self.v, ~keep.all(2), **turn)
                # an empty block has the share 0, and one token so that 0 is what is left of it
                one = share / log_n.exp().clamp(min=1)
                one = pad(one, (0, -one.shape[3] % TAYLOR_GROUP)).unflatten(3, (-1, TAYLOR_GROUP))
                one = one.sum(4) * blocking.block[1]
                mixed = mixed + torch.einsum("bhrg,bhrd,bhgde->bhre", one, self.q, slopes)
        return mixed / total.clamp(min=1e-30)

    def recall(
        self, keep: Bool[Tensor, "mask_batch heads q_blocks kv_blocks"], blocking: Blocking
    ) -> Float[Tensor, "batch heads"]:
        """Share of the softmax mass that lies in kept blocks, in the mean over the rows."""
        _, kept = self._kept(keep, blocking)
        return (kept.sum(-1, keepdim=True) / self._total(self.weights)).mean((2, 3))

    @staticmethod
    def _total(weights: Tensor) -> Tensor:
        return weights.sum(-1, keepdim=True).clamp(min=1e-30)

    def _kept(self, keep: Tensor, blocking: Blocking) -> tuple[Tensor, Tensor]:
        """Kept key blocks of every row, and the weights with what is not kept at 0."""
        q_block, kv_block = blocking.block
        order = blocking.indices(self.k.device)
        place = torch.arange(self.k.shape[2], device=self.k.device)
        place = place if order is None else inverse(order)
        by_row = keep[:, :, place[self.rows] // q_block]
        return by_row, self.weights * by_row[..., place // kv_block]
