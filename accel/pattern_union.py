"""Unions of patterns."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool
from torch import Tensor

from accel.blocking import Blocking
from accel.kind import each, register
from accel.pattern import PATTERNS, Pattern, Skip, pattern_from_dict

__all__ = ["Union"]

MAX_PARTS = 64


@register(PATTERNS, "union")
@dataclass(frozen=True, slots=True)
class Union(Pattern):
    """What any of `parts` keeps."""

    parts: tuple[Pattern, ...]
    readers: ClassVar = {"parts": lambda parts: each(pattern_from_dict, parts)}

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))
        if not self.parts or any(not isinstance(part, Pattern) for part in self.parts):
            raise ValueError(f"a union needs patterns, at least one, got {self.parts!r}")
        if any(isinstance(part, Skip) for part in self.parts):
            raise ValueError("a union with skip is the union of the other parts: leave skip out")
        if self.size > MAX_PARTS:
            raise ValueError(
                f"a union has at most {MAX_PARTS} parts, nested ones included, got {self.size};"
                " leave out those that others hold"
            )

    @property
    def size(self) -> int:
        """Parts that are no unions themselves, over all levels."""
        return sum(part.size if isinstance(part, Union) else 1 for part in self.parts)

    def mask(
        self, blocking: Blocking, device: torch.device | str | None = None
    ) -> Bool[Tensor, "q_blocks kv_blocks"]:
        return torch.stack([part.mask(blocking, device) for part in self.parts]).any(0)

    def to_dict(self) -> dict:
        return {"kind": self.kind, "parts": [part.to_dict() for part in self.parts]}

    @property
    def name(self) -> str:
        return f"{self.kind}({','.join(part.name for part in self.parts)})"
