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
from accel.pipelines.bench.case import BenchSettings
from accel.pipelines.bench.contest import Rival, Run

Make = Callable[[BlockMask, Tensor], Run]

# an order and a rest that every rival has
USUAL = ("natural", "drop")
# the largest tile of queries or keys that FlexAttention takes by itself
FLEX_TILE = 128
# as in FlashInfer's documentation; what it plans lies there
WORKSPACE_BYTES = 128 << 20


def sparse_rivals(
    settings: BenchSettings, mask: BlockMask, q: Tensor, order: Tensor | None = None
) -> dict[tuple[str, str], Rival]:
    """By (label, precision): the backend, and with it what is not natural order and `drop`.

    Making one raises where it cannot be used here. Those of others compute in the dtype of their
    inputs: they have one precision, and know neither an order nor a rest.
    """
    asked = {"order": settings.order, "rest": settings.rest}
    special = {name: word for name, word in asked.items() if word not in USUAL}
    found: dict[tuple[str, str], Rival] = {}
    for backend in settings.backends:
        label = " ".join([backend, *special.values()])
        if backend in OTHERS:
            make = partial(_unable, special) if special else partial(OTHERS[backend], mask, q)
            found[label, "full"] = Rival(make, contiguous=backend in CONTIGUOUS)
            continue
        for precision in settings.precisions:
            options = {"precision": precision, "rest": settings.rest, "order": order}
            found[label, precision] = Rival(partial(_own, backend, mask, options), precision)
    return found


def _unable(options: dict[str, str]) -> Run:
    words = " and no ".join(f"{name}={word}" for name, word in options.items())
    raise NotImplementedError(f"it has no {words}")


def _own(backend: Any, mask: BlockMask, options: dict[str, Any]) -> Run:
    if backend == "native" and not native.available():
        raise RuntimeError("no C++ compiler is to be found")
    return partial(sparse_attention, mask=mask, backend=backend, **options)


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
# they copy what does not lie head by head
CONTIGUOUS = ("flashinfer",)
