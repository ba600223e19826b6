"""What a benchmark measures: its cases, the parts of a case, and how they are taken."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

Block = tuple[int, int]

CONDITIONS = (
    "backends", "precisions", "blocks", "keeps", "rows", "order", "rest", "stride",
    "rounds", "warm_up_ms", "sample_ms", "limit_s", "checked_rows",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One self-attention call: `[batch, heads, tokens, dim]` in `dtype`. shape: what it is of."""

    shape: str
    batch: int
    heads: int
    tokens: int
    dim: int
    dtype: str


class Part(NamedTuple):
    """What is contested at once: a mask of attention, or a block size of another kernel."""

    block: Block | None = None
    keep: float = 1.0
    rows: str = "uniform"


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSettings:
    """What is measured, and how; see `configs/bench.yaml`."""

    device: torch.device
    kernels: tuple[str, ...]
    cases: tuple[Case, ...]
    backends: tuple[str, ...]
    precisions: tuple[str, ...]
    blocks: tuple[Block, ...]
    keeps: tuple[float, ...]
    rows: tuple[str, ...]
    order: str
    rest: str
    stride: int
    rounds: int
    warm_up_ms: float
    sample_ms: float
    limit_s: float
    checked_rows: int

    @property
    def masks(self) -> list[tuple[float, str]]:
        """Every keep with every kind of rows; those of a full mask are even."""
        return [(k, r) for k in self.keeps for r in self.rows if k < 1 or r == self.rows[0]]

    @property
    def conditions(self) -> dict[str, Any]:
        """What a measured row depends on besides its own fields: how it was taken."""
        return {name: getattr(self, name) for name in CONDITIONS}
