"""Query heads and the key heads that they read: head h of H reads `h * kv_heads // H`."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

__all__ = ["by_key_head", "of_heads"]


def by_key_head(
    x: Float[Tensor, "batch heads rows inner"], y: Float[Tensor, "batch kv_heads inner columns"]
) -> Float[Tensor, "batch heads rows columns"]:
    """`x @ y`, every query head of x with its key head of y."""
    product = x.unflatten(1, (y.shape[1], -1)).flatten(2, 3) @ y
    return product.view(*x.shape[:3], -1)


def of_heads(x: Tensor, group: Sequence[int], heads: int) -> Tensor:
    """What the query heads `group` of `heads` read of x: x itself where they are all of its heads.

    A key head that serves several of them is there several times.
    """
    source = [h * x.shape[1] // heads for h in group]
    return x if len(group) == heads or source == list(range(x.shape[1])) else x[:, source]
