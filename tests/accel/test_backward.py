"""What torch tells of a backward pass, which it keeps private: the call, and its second run."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from accel.backward import in_backward


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_block_that_is_run_again_is_told_from_the_call(reentrant):
    seen = []

    def block(x):
        seen.append(in_backward())
        return x.sin()

    x = torch.randn(5, requires_grad=True)
    for _ in range(2):
        checkpoint(block, x, use_reentrant=reentrant).sum().backward()
        block(x).sum().backward()
    assert seen == [False, True, False] * 2
    assert not in_backward()


def test_it_ends_with_an_error():
    x = torch.randn(5, requires_grad=True)
    y = x.sin()
    y.register_hook(lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        y.sum().backward()
    assert not in_backward()
