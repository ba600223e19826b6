"""Outputs of many candidates on sampled rows, for the price of one pass over the keys per order.

Candidates in one order differ in which blocks of keys a row keeps. The sums of a row over each
block, of its weights and of its weighted values, are found once; a candidate's output is then a sum
over blocks, some dozens of times cheaper than one over tokens. What stands in for the others is
shared in the same way. The results are those of `SampledRows.output` and `SampledRows.recall`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from accel.blocking import Blocking
from accel.kernels.pooling import TAYLOR_GROUP
from accel.sampled import SampledRows

__all__ = ["RowBlocks", "candidate_outputs"]


@dataclass(frozen=True, slots=True, eq=False)
class RowBlocks:
    """What is left of a block mask when a few query rows are looked at.

    by_row: the kept blocks of each row's query block. everywhere: those that all query blocks keep,
    for which nothing ever stands in. keep: the fraction kept of the whole mask.
    """

    by_row: Bool[Tensor, "heads rows kv_blocks"]
    everywhere: Bool[Tensor, "heads kv_blocks"]
    keep: Float[Tensor, " heads"]

    @classmethod
    def of(
        cls, mask: Bool[Tensor, "heads q_blocks kv_blocks"], q_blocks: Int[Tensor, " rows"]
    ) -> "RowBlocks":
        """q_blocks: that of each row."""
        return cls(mask[:, q_blocks], mask.all(1), mask.float().mean((1, 2)))


def candidate_outputs(
    some: SampledRows, blocking: Blocking, masks: Sequence[RowBlocks], rests: Sequence[str]
) -> tuple[Float[Tensor, "candidates heads rows dim"], Float[Tensor, "candidates heads"]]:
    """Output and recall of candidates in the order of `blocking`; of the first batch element.

    masks, rests: of each candidate. As `SampledRows.output`, an output is 0 where nothing is kept.
    """
    heads, rows, dim = some.q.shape[1:]
    order, size = blocking.indices(some.k.device), blocking.block[1]
    tokens, blocks = blocking.layout.length, blocking.kv_blocks
    order = torch.arange(tokens, device=some.k.device) if order is None else order

    def cut(x: Tensor) -> Tensor:
        """Places of the order along the first axis, cut into blocks."""
        x = pad(x[order], (0, 0) * (x.dim() - 1) + (0, blocks * size - tokens))
        return x.unflatten(0, (blocks, size))

    valid = torch.arange(tokens, device=some.k.device) < blocking.layout.valid_length
    count = cut(valid.float()).sum(1)  # [blocks]
    outputs = some.q.new_empty(len(masks), heads, rows, dim)
    recalls = some.q.new_empty(len(masks), heads)
    stand_in = [i for i, rest in enumerate(rests) if rest != "drop"]
    turned = [i for i, rest in enumerate(rests) if rest == "taylor"]
    for h in range(heads):  # one at a time: the sums of all would be larger than the keys
        source = h * some.k.shape[1] // heads
        keep = torch.stack([m.by_row[h] for m in masks], 1).float()  # [rows, candidates, blocks]
        values = cut(torch.where(valid[:, None], some.v[0, source], 0.0))
        weights = cut(some.weights[0, h].T).transpose(1, 2)  # [blocks, rows, size]
        mass = weights.sum(2).T  # [rows, blocks]
        total = (keep @ mass[:, :, None])[..., 0]  # [rows, candidates]
        recalls[:, h] = (total / mass.sum(1, keepdim=True)).mean(0)
        mixed = keep @ (weights @ values).transpose(0, 1)  # [rows, candidates, dim]
        if stand_in:
            keys = cut(torch.where(valid[:, None], some.k[0, source], 0.0))
            least = count.clamp_min(1)[:, None]
            k_mean, v_mean = keys.sum(1) / least, values.sum(1) / least
            share = (some.q[0, h] @ k_mean.T - some.peak[0, h]).exp()  # of one token of a block
            one = share[:, None] * (1 - keep[:, stand_in]) * (count > 0)
            total[:, stand_in] += one @ count
            mixed[:, stand_in] += (one * count) @ v_mean
        if turned:
            at = torch.tensor([stand_in.index(i) for i in turned], device=keep.device)
            centred = (keys - k_mean[:, None]) * cut(valid.float())[..., None]
            slopes = _group_means(
                centred.mT @ values,
                torch.stack([~masks[i].everywhere[h] for i in turned]) & (count > 0),
            )
            group = pad(one[:, at], (0, -blocks % TAYLOR_GROUP))
            group = group.unflatten(2, (-1, TAYLOR_GROUP)).sum(3)  # [rows, candidates, groups]
            turns = torch.einsum("rd,cgde->rcge", some.q[0, h], slopes)
            mixed[:, turned] += torch.einsum("rcg,rcge->rce", group, turns)
        outputs[:, h] = (mixed / total.clamp_min(1e-30)[..., None]).transpose(0, 1)
    return outputs, recalls


def _group_means(
    slopes: Float[Tensor, "blocks dim dim"], stands_in: Bool[Tensor, "candidates blocks"]
) -> Float[Tensor, "candidates groups dim dim"]:
    """Of each candidate the mean slope of the blocks left out, by groups of `TAYLOR_GROUP`."""
    fill = -len(slopes) % TAYLOR_GROUP
    slopes = pad(slopes, (0, 0, 0, 0, 0, fill)).unflatten(0, (-1, TAYLOR_GROUP))
    weights = pad(stands_in.float(), (0, fill)).unflatten(1, (-1, TAYLOR_GROUP))
    weights = weights / weights.sum(2, keepdim=True).clamp_min(1)
    return torch.einsum("cgb,gbde->cgde", weights, slopes)
