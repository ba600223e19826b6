"""How the windowed blocks of timm compute: how they cut a map, and what they do inside a window.

Nothing of a block is written anew but its residual sums: norms, attention, MLP, LayerScale and
stochastic depth are the block's own modules, called on the tokens of some windows. A block rolls
its map, then pads it, after its first norm where it has one before attention, so that padding
enters attention as zeros.
"""

from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn

from accel.pipelines.window_inside import fused, runs_fused
from accel.window_ranking import Cut

__all__ = ["HostBlock", "host_block"]

Rows = Float[Tensor, "batch kept size channels"]
Valid = Bool[Tensor, "batch kept size"] | None
BEGINS = "begins a stage: it pools or widens tokens, and has none to pass unchanged"


class HostBlock:
    """One block of a windowed model.

    shifted: whether it is one of those that roll their map; obstacle: why its windows cannot be
    pruned, None where they can; kind: what must be the same for blocks to share a ranking.
    """

    def __init__(self, block: Any) -> None:
        self.block = block
        self.shifted = False
        self.obstacle: str | None = None
        self.kind: Any = None

    def windows(self, grid: tuple[int, int]) -> int:
        """How many windows the block has, where so many rows and columns of patches enter the
        model.
        """
        raise NotImplementedError

    def cut(self, x: Tensor) -> Cut:
        """How the block cuts a map of tokens."""
        raise NotImplementedError

    def mask(self, x: Tensor) -> Tensor | None:
        """The block's attention mask, [windows, size, size], 0 or -100 as the host has it."""
        return None

    def dynamic_mask(self) -> bool:
        """Whether the host makes its mask anew in every call."""
        return False

    def inside(self, rows: Rows, valid: Valid, mask: Tensor | None, kind: Tensor) -> Rows:
        """The block on some windows of every image.

        mask: of all windows of the block; kind: the windows that these are, [batch kept].
        """
        raise NotImplementedError


class SwinBlock(HostBlock):
    """Swin v1: ``x + attn(norm1(x))``, then ``x + mlp(norm2(x))``."""

    def __init__(self, block: Any, halved: int) -> None:
        super().__init__(block)
        self.shifted = any(block.target_shift_size)
        self._halved = halved

    def windows(self, grid: tuple[int, int]) -> int:
        rows, columns = grid
        for _ in range(self._halved):
            rows, columns = (rows + 1) // 2, (columns + 1) // 2
        return Cut(rows, columns, tuple(self.block.window_size)).windows

    def cut(self, x: Tensor) -> Cut:
        block = self.block
        return Cut(x.shape[1], x.shape[2], tuple(block.window_size), tuple(block.shift_size))

    def dynamic_mask(self) -> bool:
        return bool(getattr(self.block, "dynamic_mask", False))

    def mask(self, x: Tensor) -> Tensor | None:
        if not self.dynamic_mask():
            return self.block.attn_mask
        cut = self.cut(x)
        sides = (n * w for n, w in zip(cut.counts, cut.window, strict=True))
        return self.block.get_attn_mask(x.new_zeros(1, *sides, 1))

    def inside(self, rows: Rows, valid: Valid, mask: Tensor | None, kind: Tensor) -> Rows:
        block = self.block
        rows = _add(rows, block.drop_path1, self._attend(block.norm1(rows), valid, mask, kind))
        return _add(rows, block.drop_path2, block.mlp(block.norm2(rows)))

    def _attend(self, rows: Rows, valid: Valid, mask: Tensor | None, kind: Tensor) -> Rows:
        attn: Any = self.block.attn
        inner = _zeroed(rows, valid).flatten(0, 1)
        if runs_fused(attn, inner):
            return fused(attn, inner, mask, kind.flatten()).view_as(rows)
        if mask is not None:
            # as many masks as windows: the host takes one for each
            mask = mask.index_select(0, kind.flatten())
        return attn(inner, mask=mask).view_as(rows)


class SwinV2Block(SwinBlock):
    """Swin v2: ``x + norm1(attn(x))``, then ``x + norm2(mlp(x))``."""

    def inside(self, rows: Rows, valid: Valid, mask: Tensor | None, kind: Tensor) -> Rows:
        block = self.block
        attended = self._attend(rows, valid, mask, kind)
        rows = _add(rows, block.drop_path1, block.norm1(attended))
        return _add(rows, block.drop_path2, block.norm2(block.mlp(rows)))


class SwinV2CrBlock(SwinV2Block):
    """Christoph Reich's Swin v2: computes as the other, but for a norm behind some blocks."""

    def __init__(self, block: Any, halved: int) -> None:
        super().__init__(block, halved)
        if not isinstance(block.norm3, nn.Identity):
            self.obstacle = "norms its whole map behind the MLP, and has no token to pass unchanged"


class SamBlock(HostBlock):
    """SAM's ViT: windows without a shift or a mask; padding is attended to."""

    def __init__(self, block: Any) -> None:
        super().__init__(block)
        if not block.window_size:
            self.obstacle = "attends to the whole map"

    def windows(self, grid: tuple[int, int]) -> int:
        side = self.block.window_size
        return Cut(*grid, (side, side)).windows if side else 1

    def cut(self, x: Tensor) -> Cut:
        side = self.block.window_size
        return Cut(x.shape[1], x.shape[2], (side, side))

    def inside(self, rows: Rows, valid: Valid, mask: Tensor | None, kind: Tensor) -> Rows:
        block = self.block
        inner = _zeroed(block.norm1(rows), valid).flatten(0, 1)
        inner = inner.unflatten(1, (block.window_size, block.window_size))
        # stochastic depth of attention is the host's: by window
        attended = block.drop_path1(block.ls1(block.attn(inner)))
        rows = rows + attended.reshape(rows.shape)
        return _add(rows, block.drop_path2, block.ls2(block.mlp(block.norm2(rows))))


class HieraDetBlock(HostBlock):
    """SAM 2's Hiera: windows of a map, without a shift or a mask; padding is attended to.

    As in Hiera, a block that pools its queries, or changes the channels, passes no token unchanged.
    """

    def __init__(self, block: Any, pooled: list[tuple[int, int]]) -> None:
        super().__init__(block)
        self._pooled = pooled  # by the blocks before it
        self.kind = block.window_size
        if not block.is_windowed:
            self.obstacle = "attends to the whole map"
        elif block.q_stride or block.dim != block.dim_out:
            self.obstacle = BEGINS

    def windows(self, grid: tuple[int, int]) -> int:
        rows, columns = grid
        for down, across in self._pooled:
            rows, columns = rows // down, columns // across
        return Cut(rows, columns, self.block.window_size).windows if self.block.is_windowed else 1

    def cut(self, x: Tensor) -> Cut:
        return Cut(x.shape[1], x.shape[2], self.block.window_size)

    def inside(self, rows: Rows, valid: Valid, mask: Tensor | None, kind: Tensor) -> Rows:
        block = self.block
        inner = _zeroed(block.norm1(rows), valid).flatten(0, 1).unflatten(1, block.window_size)
        rows = _add(rows, block.drop_path1, block.ls1(block.attn(inner)).reshape(rows.shape))
        return _add(rows, block.drop_path2, block.ls2(block.mlp(block.norm2(rows))))


class HieraBlock(HostBlock):
    """Hiera: mask units, whose places lie a number of windows apart.

    A block that pools its queries, or changes the channels, passes no token unchanged.
    """

    def __init__(self, block: Any, units: tuple[int, int]) -> None:
        super().__init__(block)
        self._units = units
        self.kind = block.attn.window_size
        if not block.attn.use_mask_unit_attn:
            self.obstacle = "attends to the whole map"
        elif block.do_expand or block.attn.q_stride > 1:
            self.obstacle = BEGINS

    def windows(self, grid: tuple[int, int]) -> int:
        return self._units[0] * self._units[1] if self.block.attn.use_mask_unit_attn else 1

    def cut(self, x: Tensor) -> Cut:
        size = self.block.attn.window_size
        windows = x.shape[1] // size
        # fewer units than the model has: a mask left some out, and they have no places in a map
        rows, columns = self._units
        rows, columns = (rows, columns) if rows * columns == windows else (1, windows)
        return Cut(rows, columns, (1, size), by_unit=True)

    def inside(self, rows: Rows, valid: Valid, mask: Tensor | None, kind: Tensor) -> Rows:
        block = self.block
        attended = block.attn(block.norm1(rows).flatten(0, 1)).view_as(rows)
        rows = _add(rows, block.drop_path1, block.ls1(attended))
        return _add(rows, block.drop_path2, block.ls2(block.mlp(block.norm2(rows))))


def _zeroed(rows: Rows, valid: Valid) -> Rows:
    return rows if valid is None else rows.masked_fill(~valid[..., None], 0.0)


def _add(rows: Rows, drop_path: nn.Module, more: Rows) -> Rows:
    # tokens of an image are dropped together, as in the host's map
    return rows + drop_path(more.flatten(1, 2)).view_as(rows)


def host_block(model: Any, block: nn.Module, path: str) -> HostBlock:
    """What is known of the block of `model` at `path`, by the model's class."""
    names = {cls.__name__ for cls in type(model).__mro__}
    if "VisionTransformerSAM" in names:
        return SamBlock(block)
    if "Hiera" in names:
        rows, columns = tuple(model.mask_spatial_shape)[-2:]
        return HieraBlock(block, (rows, columns))
    within, number = path.split(".")[:2]
    if "HieraDet" in names:
        strides = (b.q_stride for b in model.blocks[: int(number)])
        return HieraDetBlock(block, [stride for stride in strides if stride])
    stages: Any = model.get_submodule(within)[: int(number) + 1]
    halved = sum(not isinstance(s.downsample, nn.Identity) for s in stages)
    kinds = {"SwinTransformerV2": SwinV2Block, "SwinTransformerV2Cr": SwinV2CrBlock}
    kind = next((kind for name, kind in kinds.items() if name in names), SwinBlock)
    return kind(block, halved)
