"""Where the operations around attention run: as Triton kernels on CUDA, else on torch."""

from importlib.util import find_spec

import torch
from torch import Tensor

__all__ = ["refuse_gradients", "runs_triton"]


def runs_triton(x: Tensor) -> bool:
    """Whether operations on this tensor run as Triton kernels: it is on CUDA, Triton installed."""
    return x.is_cuda and find_spec("triton") is not None


def refuse_gradients(*tensors: Tensor) -> None:
    """NotImplementedError where a tensor asks for a gradient: the operations give none."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise NotImplementedError("the sparse kernels give no gradients: use torch.no_grad()")
