"""Masks of keys stay vectors where a model would make matrices of them (HunyuanVideo 1.5)."""

import pytest
import torch
from cases import HUNYUAN15, HUNYUAN15_I2V
from test_contract import plan_of, run
from torch.utils._python_dispatch import TorchDispatchMode

import accel
from accel.schedule import Schedule


class _Largest(TorchDispatchMode):
    """The largest boolean tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.bool:
            self.elements = max(self.elements, out.numel())
        return out


def _largest(model, inputs, step=None):
    with _Largest() as mode:
        run(model, inputs, step)
    return mode.elements


@pytest.mark.parametrize("case", [HUNYUAN15, HUNYUAN15_I2V], ids=str)
@pytest.mark.parametrize("dense_start", [0.0, 1.0], ids=["sparse", "dense"])
def test_no_matrix_is_made(case, dense_start):
    model, inputs = case.model(), case.inputs()
    tokens = case.expected()[case.sites[0]][0].length
    batch = len(inputs["hidden_states"])
    assert _largest(model, inputs) >= batch * tokens**2
    plan = plan_of(model, schedule=Schedule(dense_start=dense_start))
    accel.enable(model, plan, strict=dense_start == 0, guard=False)
    # the first call makes the masks of blocks, at the size of tokens
    run(model, inputs, 0)
    assert _largest(model, inputs, 1) < batch * 8 * tokens
