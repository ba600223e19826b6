"""Heads that are dense for a while, though their choices are not."""

from collections.abc import Collection
from dataclasses import replace

import torch

from accel.blocking import Blocking
from accel.kernels.block_mask import BlockMask
from accel.layout import Layout
from accel.masks import SiteMask


def with_dense_heads(chosen: SiteMask, heads: Collection[int], layout: Layout) -> SiteMask:
    """`chosen`, with every block of `heads` kept that is not padding alone.

    Their order stays: with all blocks kept it says nothing. Waits for the device.
    """
    if not heads:
        return chosen
    mask = chosen.mask
    keep = mask.to_dense()
    q_pad, kv_pad = Blocking(layout, block=mask.block).pad_blocks(keep.device)
    keep[:, sorted(heads)] = ~q_pad[:, None] & ~kv_pad
    mask = BlockMask.from_dense(
        keep, block=mask.block, q_length=mask.q_length, kv_length=mask.kv_length
    )
    return replace(chosen, mask=mask, keep=mask.keep)


def with_more_heads(
    chosen: SiteMask | None,
    more: int,
    layout: Layout,
    block: tuple[int, int],
    device: torch.device,
) -> SiteMask:
    """`chosen` with `more` dense heads after its own, or those alone; their order is the natural
    one. Waits for the device.
    """
    q_pad, kv_pad = Blocking(layout, block=block).pad_blocks(device)
    keep = (~q_pad[:, None] & ~kv_pad).expand(1, more, -1, -1)
    order: torch.Tensor | None = None
    rest: str | tuple[str, ...] = "drop"
    if chosen is not None:
        before = chosen.mask.to_dense()
        keep = torch.cat([before, keep.expand(len(before), -1, -1, -1)], 1)
        if chosen.order is not None:
            natural = torch.arange(layout.length, device=device).expand(more, -1)
            order = torch.cat([chosen.order, natural])
        rests = (chosen.rest,) * before.shape[1] if isinstance(chosen.rest, str) else chosen.rest
        rest = (*rests, *("drop",) * more)
    length = layout.length
    mask = BlockMask.from_dense(keep, block=block, q_length=length, kv_length=length)
    valid = layout.valid_length
    return SiteMask(mask, order, rest, mask.keep, valid if valid < length else None)
