"""Launches the compiled CPU kernels of ``attention_native.cpp``.

They read and write fp32, bf16 and fp16 as they lie. fp32 is computed in fp32. Half precision, and
fp32 where the caller allows ``half`` or less, is computed in 16-bit integers where the processor
has quick products of them (AVX2 and later): every row of queries and keys has its own scale and
keeps 12 to 15 bits, where bf16 has 8.
"""

import ctypes
from math import log

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor

from accel.kernels.native import library

__all__ = ["block_mass", "column_sums", "forward"]

Strides = ctypes.c_int64 * 3
ELEMENTS = (torch.float32, torch.bfloat16, torch.float16)
STRIDED = ("q", "k", "v", "out")
POINTERS = (
    *("counts", "indices", "lengths", "order", "rests"),
    *("key_bias", "known_lse", "lse", "mass"),
)
SIZES = (
    *("element", "batch", "heads", "kv_heads", "q_tokens", "kv_tokens", "dim", "q_block"),
    *("kv_block", "mask_batch", "width", "orders", "half", "threads"),
)


class Problem(ctypes.Structure):
    """The struct of this name in the source: null pointers for what a call has no use for."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in (*STRIDED, *POINTERS)],
        *[(f"{name}_stride", Strides) for name in STRIDED],
        *[(name, ctypes.c_int64) for name in SIZES],
        ("scale", ctypes.c_double),
    ]


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
):
    """``sparse_attention`` with arguments already checked; returns the result and the LSE."""
    out, lse = torch.empty(q.shape, dtype=q.dtype), torch.empty(q.shape[:3])
    tensors = {"q": q, "k": k, "v": v, "out": out, "lse": lse, "counts": counts, "indices": indices}
    tensors["rests"] = torch.tensor(rests, dtype=torch.uint8)
    sizes = {"mask_batch": counts.shape[0], "width": indices.shape[3], "half": precision != "full"}
    _call("accel_attention", tensors, sizes, block, scale, lengths, order)
    return out, lse


def block_mass(
    q: Float[Tensor, "batch heads tokens dim"],
    k: Float[Tensor, "batch kv_heads kv_tokens dim"],
    *,
    block: tuple[int, int],
    scale: float,
    lse: Float[Tensor, "batch heads tokens"] | None,
    lengths: Int[Tensor, " batch"] | None,
    order: Int[Tensor, "orders tokens"] | None,
) -> tuple[Float[Tensor, "batch heads q_blocks kv_blocks"], Float[Tensor, "batch heads tokens"]]:
    """``block_mass`` with arguments already checked."""
    tensors = {"q": q, "k": k}
    blocks = (-(-q.shape[2] // block[0]), -(-k.shape[2] // block[1]))
    mass = tensors["mass"] = torch.zeros(*q.shape[:2], *blocks)
    if lse is None:
        lse = tensors["lse"] = torch.empty(q.shape[:3])
    else:
        lse = tensors["known_lse"] = lse.float()
    _call("accel_block_mass", tensors, {}, block, scale, lengths, order)
    return mass, lse


def column_sums(
    q: Float[Tensor, "batch heads tokens dim"],
    k: Float[Tensor, "batch kv_heads kv_tokens dim"],
    *,
    scale: float,
    lse: Float[Tensor, "batch heads tokens"] | None,
    weights: Float[Tensor, "batch tokens"],
    lengths: Int[Tensor, " batch"] | None,
) -> Float[Tensor, "batch heads kv_tokens"]:
    """``column_sums`` with arguments already checked; weights are at least 0.

    Here the queries pass by the keys: ``Σ_t 2^(s_tn - lse_t + log2 w_t)`` has a bias for every t.
    """
    rows = (weights > 0).any(0).nonzero()[:, 0]  # of use to some batch element
    q, weights = q[:, :, rows], weights[:, rows]
    q = torch.where((weights > 0)[:, None, :, None], q, 0.0)
    if lse is None:
        lse = torch.empty(q.shape[:3])
        tensors = {"q": q, "k": k, "lse": lse}
        _call("accel_block_mass", tensors, {}, (64, 64), scale, lengths, None)
    else:
        lse = lse[:, :, rows].float()
    # a row without a key attends to nothing; one that counts nothing may hold NaN
    counts = (weights > 0)[:, None] & (lse != -torch.inf)
    bias = torch.where(counts, weights.log2()[:, None] - lse / log(2), -torch.inf)
    sums = torch.empty(*q.shape[:2], k.shape[2])
    keys = k[:, :, None].expand(-1, -1, q.shape[1] // k.shape[1], -1, -1).flatten(1, 2)
    tensors = {"q": keys, "k": q, "lse": sums, "key_bias": bias}
    _call("accel_row_sums", tensors, {}, (64, 64), scale, None, None)
    if lengths is not None:
        padding = torch.arange(k.shape[2]) >= lengths[:, None, None]
        sums.masked_fill_(padding, 0.0)
    return sums


def _call(name, tensors, sizes, block, scale, lengths, order) -> None:
    tensors = {
        name: x if name in STRIDED and x.stride(3) == 1 else x.contiguous()
        for name, x in tensors.items()
    }
    (batch, heads, q_tokens, dim), (_, kv_heads, kv_tokens, _) = (
        tensors[x].shape for x in ("q", "k")
    )
    if lengths is not None:
        tensors["lengths"] = lengths.contiguous()
    for which, x in tensors.items():
        if x.device.type != "cpu":
            raise ValueError(
                f"the compiled kernels are for CPUs, but {which} is on {x.device}; move it, or take"
                " backend='auto'"
            )
    if order is not None:
        low, high = (int(x) for x in torch.aminmax(order))
        if low < 0 or high >= q_tokens:
            raise IndexError(f"order must lie in 0..{q_tokens - 1}, got {low}..{high}")
        tensors["order"], sizes["orders"] = order.contiguous(), order.shape[0]
    problem = Problem(
        **{name: x.data_ptr() for name, x in tensors.items()},
        **{f"{x}_stride": Strides(*tensors[x].stride()[:3]) for x in STRIDED if x in tensors},
        element=ELEMENTS.index(tensors["q"].dtype),
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        q_tokens=q_tokens,
        kv_tokens=kv_tokens,
        dim=dim,
        q_block=block[0],
        kv_block=block[1],
        threads=torch.get_num_threads(),
        scale=scale,
        **sizes,
    )
    compiled = library()
    if compiled is None:
        raise RuntimeError("the compiled kernels are not available here; use backend='auto'")
    if getattr(compiled, name)(ctypes.byref(problem)):
        raise MemoryError(
            f"{name} found no memory for {batch} x {heads} x {kv_tokens} keys; take a smaller batch"
        )
