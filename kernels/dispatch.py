"""Where the operations around attention run, and what they refuse.

As Triton kernels on CUDA; on the CPU some in C++, where it can be compiled; else on torch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import Tensor

__all__ = ["beside", "refuse_gradients", "runs_triton"]


def runs_triton(x: Tensor) -> bool:
    """Whether operations on this tensor run as Triton kernels: it is on CUDA, Triton installed."""
    return x.is_cuda and find_spec("triton") is not None


@contextmanager
def beside(x: Tensor) -> Iterator[None]:
    """Launch kernels, and make new tensors, where x lies: whatever torch's own choices are."""
    with torch.cuda.device_of(x), x.device:
        yield


def refuse_gradients(*tensors: Tensor) -> None:
    """NotImplementedError where a tensor asks for a gradient: the operations give none."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise NotImplementedError("the sparse kernels give no gradients: use torch.no_grad()")
