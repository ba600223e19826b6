"""What makes an attention map easy in one order and hard in another (PAROAttention).

The map after the softmax, its tokens in the order, is cut into blocks. Of each head

    sparsity     the share of blocks in which at least 90% of the entries are below 1e-3
    incoherence  the mean over blocks of max|x| / mean|x|: what an integer code of the block loses

(arXiv 2506.16054, with its thresholds). A few whole rows of blocks are looked at, evenly spaced.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from accel.blocking import Blocking
from accel.profile import Profile
from accel.sampled import SampledRows, evenly_spaced

__all__ = ["best_orders", "map_statistics"]

SMALL, MOSTLY = 1e-3, 0.9


def map_statistics(
    q: Float[Tensor, "1 heads tokens dim"],
    k: Float[Tensor, "1 kv_heads tokens dim"],
    blocking: Blocking,
    rows: int,
) -> tuple[Float[Tensor, " heads"], Float[Tensor, " heads"]]:
    """Sparsity and incoherence of each head, on `rows` query rows, rounded up to whole blocks.

    Padding is no part of the map.
    """
    q_block, kv_block = blocking.block
    valid, device = blocking.layout.valid_length, q.device
    order = blocking.indices(device)
    order = torch.arange(blocking.layout.length, device=device) if order is None else order
    blocks = -(-valid // q_block)
    chosen = evenly_spaced(-(-rows // q_block), blocks, device)
    width = -(-valid // kv_block)
    tail = width * kv_block - valid
    size = pad(torch.ones(valid, device=device), (0, tail)).view(width, kv_block).sum(1)
    empty, spread = [], []
    for block in chosen.tolist():
        tokens = order[block * q_block : min((block + 1) * q_block, valid)]
        some = SampledRows.of(q, k, k, layout=blocking.layout, rows=tokens)
        shares = some.weights[0] / some.weights[0].sum(-1, keepdim=True)
        shares = shares[..., order[:valid]]
        cut = pad(shares, (0, tail)).unflatten(2, (width, kv_block))  # [heads, rows, blocks, keys]
        entries = size * len(tokens)
        # what pads the last block is small too, and no entry
        small = (cut < SMALL).sum((1, 3)) - (kv_block - size) * len(tokens)
        empty.append((small >= MOSTLY * entries).float())
        mean = (cut.sum((1, 3)) / entries).clamp_min(1e-30)
        spread.append(cut.amax((1, 3)) / mean)
    return torch.cat(empty, 1).mean(1), torch.cat(spread, 1).mean(1)


def best_orders(profile: Profile, weight: float) -> Mapping[str, tuple[str, ...]]:
    """Per site and head the order in which the map is sparse and coherent.

    Of the profile's orders the one of least

        weight (1 - S) / sum (1 - S) + (1 - weight) I / sum I,

    with S sparsity and I incoherence, both means over the bands, and sums over the orders. Ties go
    to the order that comes first.
    """
    found = {}
    for site in dict.fromkeys(name for name, _ in profile.sparsities):
        keys = [(site, band) for band in profile.bands(site)]
        full = 1 - torch.stack([profile.sparsities[key] for key in keys]).mean(0)
        spread = torch.stack([profile.incoherences[key] for key in keys]).mean(0)
        full, spread = (x / x.sum(0).clamp_min(1e-30) for x in (full, spread))
        best = (weight * full + (1 - weight) * spread).argmin(0)
        found[site] = tuple(profile.orders[i] for i in best.tolist())
    return found
