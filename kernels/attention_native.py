"""Launches the compiled CPU kernels of ``attention_native.cpp``."""

import ctypes

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor

from accel.kernels import attention_cpu
from accel.kernels.arguments import RESTS
from accel.kernels.native import library

__all__ = ["block_mass", "forward"]

Strides = ctypes.c_int64 * 3
STRIDED = ("q", "k", "v", "out")
POINTERS = ("counts", "indices", "lengths", "order", "pooled", "known_lse", "lse", "mass")
SIZES = ("batch", "heads", "kv_heads", "q_tokens", "kv_tokens", "dim", "q_block", "kv_block")


class Problem(ctypes.Structure):
    """The struct of this name in the source: null pointers for what a call has no use for."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in (*STRIDED, *POINTERS)],
        *[(f"{name}_stride", Strides) for name in STRIDED],
        *[(name, ctypes.c_int64) for name in (*SIZES, "mask_batch", "width", "orders", "threads")],
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
    if RESTS.index("taylor") in rests:
        return attention_cpu.forward(
            q,
            k,
            v,
            counts,
            indices,
            block=block,
            rests=rests,
            scale=scale,
            lengths=lengths,
            order=order,
            precision=precision,
        )
    tensors = {name: _rows(x) for name, x in (("q", q), ("k", k), ("v", v))}
    out, lse = torch.empty(q.shape), torch.empty(q.shape[:3])
    tensors["out"], tensors["lse"] = out, lse
    tensors["counts"], tensors["indices"] = counts.contiguous(), indices.contiguous()
    tensors["pooled"] = torch.tensor(rests, dtype=torch.uint8)
    sizes = {"mask_batch": counts.shape[0], "width": indices.shape[3]}
    _call("accel_attention", tensors, sizes, block, scale, lengths, order)
    return out.to(q.dtype), lse


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
    tensors = {"q": _rows(q), "k": _rows(k)}
    blocks = (-(-q.shape[2] // block[0]), -(-k.shape[2] // block[1]))
    mass = tensors["mass"] = torch.zeros(*q.shape[:2], *blocks)
    if lse is None:
        lse = tensors["lse"] = torch.empty(q.shape[:3])
    else:
        lse = tensors["known_lse"] = lse.float().contiguous()
    _call("accel_block_mass", tensors, {}, block, scale, lengths, order)
    return mass, lse


def _rows(x: Tensor) -> Tensor:
    """fp32 with unit stride along the head dim."""
    if x.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError("the sparse kernels give no gradients: use torch.no_grad()")
    x = x.float()
    return x if x.stride(3) == 1 else x.contiguous()


def _call(name, tensors, sizes, block, scale, lengths, order) -> None:
    (batch, heads, q_tokens, dim), (_, kv_heads, kv_tokens, _) = (
        tensors[x].shape for x in ("q", "k")
    )
    if lengths is not None:
        tensors["lengths"] = lengths.contiguous()
    if order is not None:
        low, high = (int(x) for x in torch.aminmax(order))
        if low < 0 or high >= q_tokens:
            raise IndexError(f"order must lie in 0..{q_tokens - 1}, got {low}..{high}")
        tensors["order"], sizes["orders"] = order.contiguous(), order.shape[0]
    problem = Problem(
        **{name: x.data_ptr() for name, x in tensors.items()},
        **{f"{x}_stride": Strides(*tensors[x].stride()[:3]) for x in STRIDED if x in tensors},
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
        raise MemoryError(f"{name} found no memory for {batch} x {heads} x {kv_tokens} keys")
