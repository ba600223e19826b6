"""Launches the Triton kernel of block-sparse attention."""

from contextvars import copy_context
from math import ceil, log
from typing import NamedTuple

import torch
import triton
from jaxtyping import Float, Int, Int32
from torch import Tensor

from accel.kernels import permute_triton
from accel.kernels.arguments import RESTS
from accel.kernels.attention_kernel import attention_kernel
from accel.kernels.block_mask import dense_rows
from accel.kernels.pooling import TAYLOR_GROUP, in_order
from accel.kernels.pooling_triton import block_slopes, pool_blocks
from accel.kernels.quantize import Keys8, Values8, quantize_keys, quantize_values
from accel.kernels.tiles import choose_tiles, tiles_key
from accel.kernels.tiles_triton import is_interpreted, order_stride

__all__ = ["architecture", "arithmetic", "forward"]

# rows further apart than this make offsets inside a tile that 32 bits may not hold
MAX_ROW_STRIDE = 1 << 22


def arithmetic(precision: str, arch: int) -> str:
    """What sm_<arch> computes under a ``precision``: "full", "int8" or "fp8"."""
    if precision == "fp8" and arch < 89:
        return "int8"
    return precision if precision in ("int8", "fp8") else "full"


class _StandIns(NamedTuple):
    """What the kernel needs of blocks that are not kept; all None where every head drops them."""

    k_mean: Tensor | None = None
    v_mean: Tensor | None = None
    log_count: Tensor | None = None
    kept: Tensor | None = None
    rest: Tensor | None = None
    slopes: Tensor | None = None


def forward(
    q: Float[Tensor, "batch heads tokens dim"],
    k: Float[Tensor, "batch kv_heads kv_tokens dim"],
    v: Float[Tensor, "batch kv_heads kv_tokens dim"],
    counts: Int32[Tensor, "mask_batch heads q_blocks"],
    indices: Int32[Tensor, "mask_batch heads q_blocks max_count"],
    *,
    block: tuple[int, int],
    rests: tuple[int, ...],
    scale: float,
    lengths: Int[Tensor, " batch"] | None,
    order: Int[Tensor, "orders tokens"] | None,
    precision: str,
    longest_first: Int32[Tensor, " rows"],
):
    """``sparse_attention`` with arguments already checked; returns the result and the LSE."""
    interpreted = is_interpreted(q)
    arch = architecture(q.device)
    way = arithmetic(precision, arch)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if scale <= 0:  # the kernel takes the largest logit before it scales
        q, scale = q * (-1.0 if scale < 0 else 0.0), -scale or 1.0
    if precision != "full" and q.dtype == torch.float32:
        q, k, v = (x.bfloat16() for x in (q, k, v))
    q, k, v = (_rows(x) for x in (q, k, v))
    order = None if order is None else order.contiguous()

    keys8 = values8 = None
    if way != "full":
        keys8 = quantize_keys(k, block=block[1], lengths=lengths, order=order)
    if way == "fp8":
        values8 = quantize_values(v, lengths=lengths, order=order)
    stand_ins = _StandIns()
    if any(rests):
        stand_ins = _stand_ins(k, v, keys8, values8, counts, indices, block, rests, lengths, order)
    # the memory accelerator loads no rows from here and there: a copy that it can load costs less
    # than gathering them for every row of blocks
    gather = order is not None and keys8 is None and arch != 90
    keys, values = k if keys8 is None else keys8.values, v
    if order is not None and keys8 is None and not gather:
        keys, values = _in_order(order, k, v)
    elif order is not None and values8 is None and not gather:
        (values,) = _in_order(order, v)
    values = values if values8 is None else values8.values

    batch, heads, tokens, dim = q.shape
    aligned = _aligned(q, keys, values)
    # blocks of turned values start anywhere in a row
    plain = aligned and not gather and (values8 is None or block[1] % 16 == 0)
    key = tiles_key(
        arch=arch,
        block=block,
        dim=dim,
        element_bytes=q.element_size(),
        access="plain" if plain else "ordered" if gather else "unaligned",
        rest=RESTS[max(rests)],
        arithmetic=way,
    )
    tiles = choose_tiles(key, padded=lengths is not None)
    ragged = lengths is not None or k.shape[2] % block[1] != 0 or block[1] % tiles.keys != 0
    rows = counts.numel()
    works = rows * ceil(block[0] / tiles.queries) * (batch if counts.shape[0] == 1 else 1)
    programs = min(works, _multiprocessors(q.device)) if tiles.persistent else works

    def launch() -> None:
        if tiles.tma:
            triton.set_allocator(_workspace)
        attention_kernel[programs,](
            q,
            keys,
            values,
            out,
            lse,
            counts.contiguous(),
            indices.contiguous(),
            longest_first,
            lengths,
            order,
            None if keys8 is None else keys8.scale,
            None if keys8 is None else keys8.shift,
            None if values8 is None else values8.scale,
            *stand_ins,
            *_strides(q, aligned),
            *_strides(keys, aligned),
            *_strides(values, aligned),
            order_stride(order),
            works,
            rows,
            tokens,
            k.shape[2],
            heads,
            keys.shape[1],
            0 if stand_ins.k_mean is None else stand_ins.k_mean.shape[1],
            counts.shape[0],
            counts.shape[2],
            ceil(k.shape[2] / block[1]),
            indices.shape[3],
            scale / log(2),
            DIM=dim,
            Q_BLOCK=block[0],
            KV_BLOCK=block[1],
            BM=tiles.queries,
            BN=tiles.keys,
            # a tile of stand-ins is what shares a slope
            BT=TAYLOR_GROUP if stand_ins.slopes is not None else min(TAYLOR_GROUP, tiles.keys),
            BD=key.dim,
            GATHER=gather,
            ALIGNED=aligned,
            TMA=tiles.tma,
            PERSISTENT=tiles.persistent,
            SPECIALIZED=tiles.specialized,
            RAGGED=ragged,
            UPCAST=interpreted,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
            maxnreg=tiles.registers or None,
            # scale and pivot of a logit in one instruction
            enable_fp_fusion=True,
        )

    # descriptors made on the device need memory from an allocator, which is a context variable:
    # in a copy of the context it is nobody else's
    copy_context().run(launch)
    return out, lse


def _stand_ins(
    k: Tensor,
    v: Tensor,
    keys8: Keys8 | None,
    values8: Values8 | None,
    counts: Tensor,
    indices: Tensor,
    block: tuple[int, int],
    rests: tuple[int, ...],
    lengths: Tensor | None,
    order: Tensor | None,
) -> _StandIns:
    kept = dense_rows(counts, indices, ceil(k.shape[2] / block[1]))
    unit = None if values8 is None else values8.scale
    shift = None if keys8 is None else keys8.shift
    means = pool_blocks(k, v, block=block[1], lengths=lengths, order=order, shift=shift, unit=unit)
    slopes = None
    if RESTS.index("taylor") in rests:
        slopes = block_slopes(
            k, v, ~kept.all(2), block=block[1], lengths=lengths, order=order, unit=unit
        )
    codes = torch.tensor(rests, dtype=torch.int8).to(k.device, non_blocking=True)
    return _StandIns(*means, kept.view(torch.uint8), codes, slopes)


def _in_order(order: Tensor, *tensors: Tensor) -> list[Tensor]:
    """`in_order` of all, in one launch where each head has the order or its own."""
    if order.shape[0] in (1, tensors[0].shape[1]):
        return permute_triton.forward(order, list(tensors), dim=2)
    return [in_order(x, order) for x in tensors]


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 and x.stride(2) <= MAX_ROW_STRIDE else x.contiguous()


def _aligned(*tensors: Tensor) -> bool:
    """Whether rows begin at multiples of 16 bytes, as wide loads and descriptors need them to."""
    return all(
        x.data_ptr() % 16 == 0 and not any(s * x.element_size() % 16 for s in x.stride()[:3])
        for x in tensors
    )


def _strides(x: Tensor, aligned: bool) -> list[int]:
    """Of batch, head and token, in units of 16 bytes where that is what they are multiples of."""
    return [s * x.element_size() // 16 if aligned else s for s in x.stride()[:3]]


def _workspace(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for descriptors that are made on the device; torch aligns to 512 bytes."""
    del alignment, stream
    return torch.empty(size, dtype=torch.int8, device="cuda")


def architecture(device: torch.device) -> int:
    """80 for sm_80 and so on; the interpreter passes for sm_90."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _multiprocessors(device: torch.device) -> int:
    """Few in the interpreter, so that its programs take turns too."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count
