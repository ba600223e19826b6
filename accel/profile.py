"""A profile: how much every candidate harms every head of a model, as it was calibrated."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from accel.choice import Choice

Key = tuple[str, int]  # site, band


@dataclass(slots=True)
class Profile:
    """Mean errors [candidates, heads] of every site and band."""

    candidates: tuple[Choice, ...]
    errors: dict[Key, Tensor] = field(default_factory=dict)
    counts: dict[Key, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, key: Key, errors: Tensor) -> None:
        self.counts[key] += 1
        before = self.errors.get(key, torch.zeros_like(errors))
        self.errors[key] = before + (errors - before) / self.counts[key]

    def to_dict(self) -> dict[str, Any]:
        return {
            "candidates": [c.to_dict() for c in self.candidates],
            "errors": [
                {"site": s, "band": b, "count": self.counts[s, b], "errors": e.tolist()}
                for (s, b), e in self.errors.items()
            ],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Profile":
        profile = cls(tuple(Choice.from_dict(c) for c in data["candidates"]))
        for entry in data["errors"]:
            profile.errors[entry["site"], entry["band"]] = torch.tensor(entry["errors"])
            profile.counts[entry["site"], entry["band"]] = entry["count"]
        return profile
