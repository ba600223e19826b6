"""Block-sparse attention by accel and by others: for a mask and a q, a function of q, k and v.

xFormers stands with the dense ones (`accel.dense`): it has no attention for a block mask of each
head's own.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from accel.kernels import native
from accel.kernels.attention import sparse_attention
from accel.kernels.block_mask import BlockMask
from accel.pipelines.bench_contest import Run
from accel.pipelines.bench_settings import BenchSettings

Make = Callable[[BlockMask, Tensor], Run]

# the largest tile of queries or keys that FlexAttention takes by itself
FLEX_TILE = 128
# as in FlashInfer's documentation; what it plans lies there
WORKSPACE_BYTES = 128 << 20


def sparse_rivals(settings: BenchSettings) -> dict[tuple[str, str], Make]:
    """By (backend, precision); making one raises where it cannot be used here.

    Those of others compute in the dtype of their inputs: they have one precision.
    """
    found: dict[tuple[str, str], Make] = {}
    for backend in settings.backends:
        if backend in OTHERS:
            found[backend, "full"] = OTHERS[backend]
            continue
        for precision in settings.precisions:
            found[backend, precision] = partial(_own, backend, precision)
    return found


def _own(backend: Any, precision: str, mask: BlockMask, _: Tensor) -> Run:
    if backend == "native" and not native.available():
        raise RuntimeError("no C++ compiler is to be found")
    return partial(sparse_attention, mask=mask, precision=precision, backend=backend)


def _flex(mask: BlockMask, _: Tensor) -> Run:
    """FlexAttention, compiled for the shape; masks of one block size share the compiled kernel."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    options: Any = None
    if mask.device.type == "cuda" and min(mask.block) < FLEX_TILE:
        # its tiles have to divide the blocks, and not every version of torch makes them smaller
        tiles = (min(size, FLEX_TILE) for size in mask.block)
        options = dict(zip(("BLOCK_M", "BLOCK_N"), tiles, strict=True))
    return partial(compiled, block_mask=mask.to_flex(), kernel_options=options)


def _flashinfer(mask: BlockMask, q: Tensor) -> Run:
    """FlashInfer's attention for a block mask of each head; what it plans is no part of a call."""
    from flashinfer import VariableBlockSparseAttentionWrapper

    batch, heads, tokens, dim = q.shape
    sizes = (
        _block_sizes(tokens, size, q.device).expand(batch * heads, -1).contiguous()
        for size in mask.block
    )
    kept = mask.to_dense().expand(batch, -1, -1, -1).flatten(0, 1)
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
    wrapper = VariableBlockSparseAttentionWrapper(workspace)
    wrapper.plan(kept, *sizes, batch * heads, batch * heads, dim, q_data_type=q.dtype)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = wrapper.run(*(x.flatten(0, 1) for x in (q, k, v)))
        return out.unflatten(0, (batch, heads))

    return run


def _block_sizes(length: int, block: int, device: torch.device) -> Tensor:
    starts = torch.arange(0, length, block, device=device)
    return (length - starts).clamp(max=block).to(torch.int32)


OTHERS: dict[str, Make] = {"flex": _flex, "flashinfer": _flashinfer}
