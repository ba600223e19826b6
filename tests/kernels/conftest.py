"""Fresh buffers of the kernels hold NaN."""

import sys

import pytest
import torch


@pytest.fixture(autouse=True)
def _poison_empty_buffers(monkeypatch):
    """``torch.empty`` and its kin, called from our kernels, return NaN, so that reading shows."""
    # torch keeps the set of functions that `with torch.device(...)` heeds from its first use on:
    # with ours in it, later tests would allocate what they mean to have on "meta"
    with torch.device("meta"):
        torch.empty(0)

    def poisoned(allocate):
        def wrapper(*args, **kwargs):
            x = allocate(*args, **kwargs)
            ours = sys._getframe(1).f_globals.get("__name__", "").startswith("accel.kernels")
            return x.fill_(torch.nan) if ours and x.is_floating_point() else x

        return wrapper

    for owner, names in ((torch, ("empty", "empty_like")), (torch.Tensor, ("new_empty",))):
        for name in names:
            monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20)
