"""Heads that are dense for a while, though their choices are not."""

from collections.abc import Collection
from dataclasses import replace

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
