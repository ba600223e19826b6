"""Which key blocks every query block attends to, per head: the one mask type the kernels share."""

from dataclasses import dataclass, field, replace
from math import ceil
from typing import no_type_check

import torch
from jaxtyping import Bool, Float, Int32
from torch import Tensor

from accel.kernels.arguments import check_block

__all__ = ["BlockMask", "dense_rows"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockMask:
    """Lists of kept key blocks: row ``(b, h, i)`` keeps ``indices[b, h, i, :counts[b, h, i]]``.

    A leading size of 1 serves every batch element.
    Lists ascend; entries from ``counts`` on are padding: valid block numbers without a meaning.
    Blocks tile the (ordered) sequences from position 0; the last of each axis may be ragged.
    Shapes are checked always, values where reading them costs no device synchronisation (CPU).

    ``longest_first`` numbers the rows of the flattened counts head by head, those with the most
    blocks first, and within a head by falling count; equals in their own order. Rows that run at
    the same time share a head's keys, which a cache holds then (1.8 times as fast on an H200 as all
    rows by falling count), and none of the longest is left over at the end. A mask serves many
    calls, so it is made with the mask.
    """

    counts: Int32[Tensor, "batch heads q_blocks"]
    indices: Int32[Tensor, "batch heads q_blocks max_count"]
    block: tuple[int, int]
    q_length: int
    kv_length: int
    longest_first: Int32[Tensor, " rows"] = field(init=False, repr=False)

    def __post_init__(self):
        _check_geometry(self.block, self.q_length, self.kv_length)
        if self.counts.dtype != torch.int32 or self.indices.dtype != torch.int32:
            raise ValueError(
                f"counts and indices must be int32, got {self.counts.dtype} and "
                f"{self.indices.dtype}; convert them with .to(torch.int32)"
            )
        if self.counts.ndim != 3 or self.counts.shape[2] != self.q_blocks:
            raise ValueError(
                f"counts must be [batch, heads, {self.q_blocks}] for {self.q_length} queries in "
                f"blocks of {self.block[0]}, got {tuple(self.counts.shape)}"
            )
        if self.indices.ndim != 4 or self.indices.shape[:3] != self.counts.shape:
            raise ValueError(
                f"indices must be {[*self.counts.shape, 'max_count']}, "
                f"got {tuple(self.indices.shape)}"
            )
        if self.indices.device != self.counts.device:
            raise ValueError(
                f"counts are on {self.counts.device} but indices on {self.indices.device}; "
                "move them to one device"
            )
        # a compiler that traces the call has no values to look at
        on_cpu = self.counts.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_cpu and self.counts.numel():
            self._check_values()
        object.__setattr__(self, "longest_first", _longest_first(self.counts))

    def _check_values(self):
        low, high = (int(x) for x in torch.aminmax(self.counts))
        if low < 0 or high > self.indices.shape[3]:
            raise ValueError(
                f"counts must lie in 0..{self.indices.shape[3]} (the width of indices), "
                f"got {low}..{high}"
            )
        if not self.indices.numel():
            return
        low, high = (int(x) for x in torch.aminmax(self.indices))
        if low < 0 or high >= self.kv_blocks:
            raise ValueError(
                f"indices must lie in 0..{self.kv_blocks - 1} ({self.kv_length} keys in blocks of "
                f"{self.block[1]}), padding included, got {low}..{high}"
            )
        listed = torch.arange(1, self.indices.shape[3], device=self.device) < self.counts[..., None]
        if (listed & (self.indices[..., 1:] <= self.indices[..., :-1])).any():
            raise ValueError(
                "the listed indices of a row must strictly ascend; sort them, or build the mask "
                "with BlockMask.from_dense"
            )

    @classmethod
    def from_dense(
        cls,
        keep: Bool[Tensor, "*batch heads q_blocks kv_blocks"],
        *,
        block: tuple[int, int],
        q_length: int,
        kv_length: int,
    ) -> "BlockMask":
        """The mask that keeps block ``(i, j)`` of head ``h`` where ``keep[..., h, i, j]``.

        On an accelerator the lists have full width, so that nothing waits for the device (see
        `trimmed`); on the CPU they are as wide as the longest.
        """
        _check_geometry(block, q_length, kv_length)
        blocks = (ceil(q_length / block[0]), ceil(kv_length / block[1]))
        if keep.dtype != torch.bool or keep.ndim not in (3, 4) or keep.shape[-2:] != blocks:
            raise ValueError(
                f"keep must be bool [heads, {blocks[0]}, {blocks[1]}], or batched, for "
                f"{q_length} queries and {kv_length} keys in blocks of {block}, "
                f"got {keep.dtype} {tuple(keep.shape)}"
            )
        keep = keep if keep.ndim == 4 else keep[None]
        counts = keep.sum(-1, dtype=torch.int32)
        indices = torch.sort(~keep, dim=-1, stable=True).indices.to(torch.int32)
        if keep.device.type == "cpu":
            indices = indices[..., : int(counts.max()) if counts.numel() else 0]
        return cls(
            counts=counts,
            indices=indices.contiguous(),
            block=block,
            q_length=q_length,
            kv_length=kv_length,
        )

    @classmethod
    def full(
        cls,
        heads: int,
        *,
        block: tuple[int, int],
        q_length: int,
        kv_length: int,
        device: torch.device | str = "cpu",
    ) -> "BlockMask":
        """The mask that keeps everything: dense attention."""
        _check_geometry(block, q_length, kv_length)
        shape = (heads, ceil(q_length / block[0]), ceil(kv_length / block[1]))
        keep = torch.ones(shape, dtype=torch.bool, device=device)
        return cls.from_dense(keep, block=block, q_length=q_length, kv_length=kv_length)

    def trimmed(self, width: int) -> "BlockMask":
        """The same mask with lists of `width`, the largest count or more; frees what was padding.

        The width is taken at its word on an accelerator, where a check would wait for the device.
        """
        if width >= self.indices.shape[3]:
            return self
        # a copy, since a view would keep the whole lists alive
        return replace(self, indices=self.indices[..., :width].clone())

    @property
    def batch(self) -> int:
        return self.counts.shape[0]

    @property
    def heads(self) -> int:
        return self.counts.shape[1]

    @property
    def q_blocks(self) -> int:
        return ceil(self.q_length / self.block[0])

    @property
    def kv_blocks(self) -> int:
        return ceil(self.kv_length / self.block[1])

    @property
    def device(self) -> torch.device:
        return self.counts.device

    @property
    def keep(self) -> float:
        """Blocks computed over all blocks. Waits for the device."""
        return float(self.keep_per_head().mean())

    def keep_per_head(self) -> Float[Tensor, " heads"]:
        """Blocks computed over all blocks, for each head."""
        return self.counts.float().mean((0, 2)) / self.kv_blocks

    def to(self, device: torch.device | str) -> "BlockMask":
        """The same mask on another device; itself where it is there already."""
        if self.counts.device == torch.device(device):
            return self
        return BlockMask(
            counts=self.counts.to(device),
            indices=self.indices.to(device),
            block=self.block,
            q_length=self.q_length,
            kv_length=self.kv_length,
        )

    def to_dense(self) -> Bool[Tensor, "batch heads q_blocks kv_blocks"]:
        """``keep[b, h, i, j]``: whether block ``(i, j)`` is computed."""
        return dense_rows(self.counts, self.indices, self.kv_blocks)

    def to_flex(self):
        """The same mask for ``torch.nn.attention.flex_attention``.

        Every kept block is a full block, so the compiled kernel never evaluates ``mask_mod``;
        eager FlexAttention evaluates nothing else, so ``mask_mod`` looks the block up.
        """
        from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

        keep, (q_block, kv_block), batched = self.to_dense(), self.block, self.batch > 1
        # FlexAttention wants lists of full width
        indices = torch.sort(~keep, dim=-1, stable=True).indices.to(torch.int32)

        @no_type_check  # FlexAttention traces it
        def block_is_kept(b, h, q, kv):
            return keep[b if batched else b * 0, h, q // q_block, kv // kv_block]

        return FlexBlockMask.from_kv_blocks(
            torch.zeros_like(self.counts),
            torch.zeros_like(indices),
            self.counts,
            indices,
            BLOCK_SIZE=self.block,
            mask_mod=block_is_kept,
            seq_lengths=(self.q_length, self.kv_length),
        )


def dense_rows(
    counts: Int32[Tensor, "batch heads q_blocks"],
    indices: Int32[Tensor, "batch heads q_blocks max_count"],
    kv_blocks: int,
) -> Bool[Tensor, "batch heads q_blocks kv_blocks"]:
    """Whether each key block is listed; the plain-tensor form of ``BlockMask.to_dense``."""
    listed = torch.arange(indices.shape[3], device=counts.device) < counts[..., None]
    # padding goes to one column more, cut off at the end
    columns = torch.where(listed, indices, kv_blocks).long()
    keep = torch.zeros(*counts.shape, kv_blocks + 1, dtype=torch.bool, device=counts.device)
    return keep.scatter_(3, columns, True)[..., :-1].contiguous()


def _longest_first(counts: Int32[Tensor, "batch heads q_blocks"]) -> Int32[Tensor, " rows"]:
    """The rows of ``BlockMask.longest_first``."""
    heads = counts.flatten(0, 1)
    rows = torch.arange(heads.numel(), device=counts.device, dtype=torch.int32).view(heads.shape)
    rows = rows.gather(1, heads.sort(dim=1, stable=True, descending=True).indices)
    return rows[heads.sum(1).sort(stable=True, descending=True).indices].flatten()


def _check_geometry(block: tuple[int, int], q_length: int, kv_length: int) -> None:
    check_block(block)
    if q_length < 1 or kv_length < 1:
        raise ValueError(
            f"q_length and kv_length must be at least 1 token, got {q_length} and {kv_length}"
        )
