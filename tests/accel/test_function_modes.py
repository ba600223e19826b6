import torch
from torch.overrides import TorchFunctionMode

from accel.function_modes import in_force


class _Mode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_modes_are_seen_by_this_torch():
    assert not in_force()
    with _Mode():
        assert in_force()
    assert not in_force()


def test_a_default_device_is_no_such_mode():
    with torch.device("cpu"):
        assert not in_force()
        with _Mode():
            assert in_force()
