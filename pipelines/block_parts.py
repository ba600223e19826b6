"""The two halves of timm's transformer blocks, between which tokens are merged.

A block is ``x + attention(x)``, then ``x + mlp(x)``; norms, scales, gates and dropped paths stay
the block's own modules, called as its own `forward` calls them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from accel.errors import UnsupportedModelError, nearest

__all__ = ["Halves", "halves_of"]


class Halves(NamedTuple):
    """attend: (block, x, **arguments of its attention) -> x; feed: (block, x) -> x."""

    attend: Callable[..., Tensor]
    feed: Callable[[Any, Tensor], Tensor]


def _attend_scaled(block: Any, x: Tensor, **call: Any) -> Tensor:
    return x + block.drop_path1(block.ls1(block.attn(block.norm1(x), **call)))


def _feed_scaled(block: Any, x: Tensor) -> Tensor:
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def _attend_normed(block: Any, x: Tensor, **call: Any) -> Tensor:
    return x + block.drop_path1(block.norm1(block.attn(x, **call)))


def _feed_normed(block: Any, x: Tensor) -> Tensor:
    return x + block.drop_path2(block.norm2(block.mlp(x)))


def _attend_eva(block: Any, x: Tensor, **call: Any) -> Tensor:
    out = block.attn(block.norm1(x), **call)
    return x + block.drop_path1(out if block.gamma_1 is None else block.gamma_1 * out)


def _feed_eva(block: Any, x: Tensor) -> Tensor:
    out = block.mlp(block.norm2(x))
    return x + block.drop_path2(out if block.gamma_2 is None else block.gamma_2 * out)


_BLOCKS = {
    "vision_transformer.Block": Halves(_attend_scaled, _feed_scaled),
    "vision_transformer.ResPostBlock": Halves(_attend_normed, _feed_normed),
    "eva.EvaBlock": Halves(_attend_eva, _feed_eva),
    "eva.EvaBlockPostNorm": Halves(_attend_normed, _feed_normed),
}
# those that call SDPA once, with the norm of keys and the rotation before it
_ATTENTION = ("Attention", "AttentionRope", "EvaAttention")


def halves_of(name: str, block: nn.Module) -> Halves:
    """The halves of block `name`. Raises UnsupportedModelError for a block of another structure."""
    cls = type(block)
    found = _BLOCKS.get(f"{cls.__module__.removeprefix('timm.models.')}.{cls.__qualname__}")
    if found is None:
        known = sorted(key.rpartition(".")[2] for key in _BLOCKS)
        raise UnsupportedModelError(
            f"{name} is a {cls.__qualname__}, whose tokens cannot be merged between attention and"
            f" MLP; {nearest(cls.__qualname__, known)}"
        )
    attention: Any = block.attn
    kind = type(attention).__name__
    if kind not in _ATTENTION:
        raise UnsupportedModelError(
            f"the attention of {name} is a {kind}, which is none with one map of queries and keys"
            f" ({', '.join(_ATTENTION)}); leave `tokens` out of the plan"
        )
    if not attention.fused_attn:
        raise UnsupportedModelError(
            f"the attention of {name} does not call scaled_dot_product_attention; build the model"
            " with timm.layers.set_fused_attn(True), or leave `tokens` out of the plan"
        )
    return found
