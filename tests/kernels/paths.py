"""The ways in which an operation around attention is computed, and how to take one of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from attention_cases import compiler_missing, interpreter_missing
from torch.utils._pytree import tree_map_only

from accel.kernels import dispatch, native


@dataclass(frozen=True)
class Path:
    """Native, torch, or Triton; on the device that Triton's kernels run on here."""

    name: str
    device: str

    def run(self, function: Callable, *args: Any, **options: Any) -> Any:
        """The function's result on the CPU; its tensors on the way there are on the device."""
        args, options = tree_map_only(
            torch.Tensor, lambda x: x.to(self.device, copy=False), (args, options)
        )
        return tree_map_only(torch.Tensor, lambda x: x.cpu(), function(*args, **options))


def take(name: str, monkeypatch) -> Path:
    """Make operations run natively, on torch, or in Triton: interpreted where there is no GPU."""
    if name == "triton":
        if torch.cuda.is_available():
            return Path(name, "cuda")
        if reason := interpreter_missing():
            pytest.skip(reason)
        monkeypatch.setattr(dispatch, "runs_triton", lambda x: True)
    elif name == "native":
        if reason := compiler_missing():
            pytest.skip(reason)
    else:
        monkeypatch.setattr(native, "available", lambda: False)
    return Path(name, "cpu")
