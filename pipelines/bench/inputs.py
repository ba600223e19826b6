"""What a case is measured on: tensors, random masks, and how many token pairs a mask computes."""

import os
from math import ceil
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from accel.kernels.block_mask import BlockMask
from accel.pipelines.bench.case import Case
from accel.pipelines.host import DTYPES

Inputs = tuple[Tensor, Tensor, Tensor]

MOST_COPIES = 16
# where the system does not say how large the last-level cache is, and how much memory is free
CACHE_BYTES = 64 << 20
MEMORY_BYTES = 1 << 30
UNEVEN = (0.4, 1.6)


def inputs_of(case: Case, device: torch.device) -> list[Inputs]:
    """Copies of random q, k and v, to be taken in turn.

    Together they outgrow the last-level cache, so that no call finds its operands there; there are
    at least two, at most 16, and they fill at most a quarter of the free memory. They lie in memory
    as models hand them over, tokens before heads.
    """
    dtype = DTYPES[case.dtype]
    size = (case.batch, case.tokens, case.heads, case.dim)
    one = 3 * case.batch * case.tokens * case.heads * case.dim * dtype.itemsize
    copies = 1 + ceil(_cache_bytes(device) / one)
    copies = max(2, min(copies, MOST_COPIES, _free_bytes(device) // (4 * one)))
    generator = torch.Generator(device).manual_seed(0)

    def tensor() -> Tensor:
        x = torch.randn(size, generator=generator, device=device, dtype=dtype)
        return x.transpose(1, 2)

    return [(tensor(), tensor(), tensor()) for _ in range(copies)]


def random_mask(
    case: Case, block: tuple[int, int], keep: float, rows: str, device: torch.device
) -> BlockMask:
    """Random blocks. uniform: `keep` of every row, uneven: 0.4 to 1.6 times that, drawn anew for
    every row of every head; at least one block.
    """
    generator = torch.Generator(device).manual_seed(1)
    q_blocks, kv_blocks = (ceil(case.tokens / size) for size in block)
    shape = (case.heads, q_blocks, 1)
    share = torch.full(shape, keep, device=device)
    if rows == "uneven":
        low, high = UNEVEN
        share *= low + (high - low) * torch.rand(shape, generator=generator, device=device)
    counts = (share * kv_blocks).round().clamp(1, kv_blocks)
    scores = torch.rand(case.heads, q_blocks, kv_blocks, generator=generator, device=device)
    rank = scores.argsort(-1).argsort(-1)
    mask = BlockMask.from_dense(
        rank < counts, block=block, q_length=case.tokens, kv_length=case.tokens
    )
    return mask.trimmed(int(counts.max()))


def per_head_order(case: Case, device: torch.device) -> Int[Tensor, "heads tokens"]:
    """A random order of the tokens for every head: the dearest that a kernel can be given."""
    generator = torch.Generator(device).manual_seed(3)
    scores = torch.rand(case.heads, case.tokens, generator=generator, device=device)
    return scores.argsort(-1)


def token_pairs(mask: BlockMask) -> int:
    """Pairs of a query and a key that a mask computes, over its heads; ragged blocks count as they
    are.
    """
    q_block, kv_block = mask.block
    keys = mask.counts.long() * kv_block
    last_kept = mask.to_dense()[..., -1]
    keys -= last_kept * (mask.kv_blocks * kv_block - mask.kv_length)
    queries = torch.full((mask.q_blocks,), q_block, device=mask.device)
    queries[-1] -= mask.q_blocks * q_block - mask.q_length
    return int((keys * queries).sum())


def _cache_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    files = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    texts = [file.read_text().strip() for file in files]
    return max((int(t[:-1]) << 10 for t in texts if t.endswith("K")), default=CACHE_BYTES)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if "SC_AVPHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return MEMORY_BYTES
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
