"""The arguments the operations share, checked once at the public edge and brought to one form."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = [
    "DTYPES",
    "MAX_DIM",
    "PRECISIONS",
    "RESTS",
    "check_block",
    "check_shapes",
    "check_tensors",
    "head_orders",
    "rest_codes",
    "valid_lengths",
]

# what the kernels compute
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_DIM = 256


# what stands in for the blocks that are not kept; kernels know each by its place here
RESTS = ("drop", "mean", "taylor")
# what arithmetic a caller allows, from the most exact to the least
PRECISIONS = ("full", "half", "int8", "fp8")


def check_tensors(q: Tensor, *keys_and_values: Tensor) -> None:
    """What `check_shapes` asks for, in a dtype that kernels compute."""
    check_shapes(q, *keys_and_values)
    if q.dtype not in DTYPES:
        raise ValueError(f"q must be float32, float16 or bfloat16, got {q.dtype}")


def check_shapes(q: Tensor, *keys_and_values: Tensor) -> None:
    """q is ``[batch, heads, tokens, dim]``; k and v share its batch, dim, dtype and device."""
    if q.ndim != 4:
        raise ValueError(f"q must be [batch, heads, tokens, dim], got {tuple(q.shape)}")
    if q.shape[3] > MAX_DIM:
        raise ValueError(f"head dim must be at most {MAX_DIM}, got {q.shape[3]}")
    first = keys_and_values[0]
    for name, x in zip("kv", keys_and_values, strict=False):
        if x.ndim != 4 or (x.shape[0], x.shape[3]) != (q.shape[0], q.shape[3]):
            raise ValueError(
                f"{name} must be [{q.shape[0]}, kv_heads, kv_tokens, {q.shape[3]}] to match q "
                f"{tuple(q.shape)}, got {tuple(x.shape)}"
            )
        if x.shape != first.shape:
            raise ValueError(f"k and v must agree, got {tuple(first.shape)} and {tuple(x.shape)}")
        if x.shape[1] < 1 or q.shape[1] % x.shape[1]:
            raise ValueError(
                f"the heads of {name} ({x.shape[1]}) must divide the heads of q ({q.shape[1]})"
            )
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"q and {name} must share dtype and device, got {q.dtype} on {q.device} and "
                f"{x.dtype} on {x.device}"
            )


def check_block(block: tuple[int, int]) -> None:
    """A block is two sizes, of queries and of keys, from 1 token."""
    if len(block) != 2 or min(block) < 1:
        raise ValueError(f"block must be two positive sizes (q_block, kv_block), got {block}")


def rest_codes(rest: str | Sequence[str], heads: int) -> tuple[int, ...]:
    """For each head, the place in ``RESTS`` of what stands in for blocks that are not kept."""
    names = (rest,) * heads if isinstance(rest, str) else tuple(rest)
    if len(names) != heads:
        raise ValueError(f"rest must be one word or one per head ({heads}), got {len(names)}")
    for name in names:
        if name not in RESTS:
            raise ValueError(f"rest must be one of {', '.join(RESTS)}, got {name!r}")
    return tuple(RESTS.index(name) for name in names)


def valid_lengths(
    kv_length: int | Int[Tensor, " batch"] | None, k: Float[Tensor, "batch heads tokens dim"]
) -> Int[Tensor, " batch"] | None:
    """Valid keys of each batch element as int32 on the device of k; None where all are valid."""
    batch, _, tokens, _ = k.shape
    if kv_length is None:
        return None
    if isinstance(kv_length, int):
        if not 0 <= kv_length <= tokens:
            raise ValueError(f"kv_length must lie in 0..{tokens} (the keys), got {kv_length}")
        if kv_length == tokens:
            return None
        return torch.full((batch,), kv_length, dtype=torch.int32, device=k.device)
    if kv_length.shape != (batch,):
        raise ValueError(
            f"kv_length must be one number or one per batch element ({batch}), "
            f"got shape {tuple(kv_length.shape)}"
        )
    # a compiler that traces the call has no values to look at
    if kv_length.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (int(x) for x in torch.aminmax(kv_length))
        if low < 0 or high > tokens:
            raise ValueError(f"kv_length must lie in 0..{tokens} (the keys), got {low}..{high}")
    return kv_length.to(k.device, torch.int32)


def head_orders(
    order: Int[Tensor, "*heads tokens"] | None,
    q: Float[Tensor, "batch heads tokens dim"],
    k: Float[Tensor, "batch kv_heads kv_tokens dim"],
) -> Int[Tensor, "orders tokens"] | None:
    """The order as int64 ``[1 or heads, tokens]``; that it permutes is the caller's word."""
    if order is None:
        return None
    heads, tokens = q.shape[1:3]
    if k.shape[2] != tokens:
        raise ValueError(
            f"an order needs as many keys as queries, got {k.shape[2]} and {tokens}; "
            "reorder q and k yourself before the call"
        )
    if order.shape not in ((tokens,), (1, tokens), (heads, tokens)):
        raise ValueError(
            f"order must be [{tokens}] or [{heads}, {tokens}], got {tuple(order.shape)}"
        )
    return order.to(q.device, torch.int64).reshape(-1, tokens)
