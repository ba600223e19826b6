"""Whether gradients are being computed right now, and in which pass.

A block under activation checkpointing runs twice: in the call, and again inside of the backward
pass, later and block by block. Which of the two it is says nothing but autograd's own state, which
torch keeps private (`torch.utils.checkpoint` goes by it too): this is the one place that asks.
"""

import torch

__all__ = ["current_pass", "in_backward"]


def in_backward() -> bool:
    """True inside of a backward pass of this thread, in hooks and in what checkpoints run again."""
    return torch._C._current_graph_task_id() != -1


def current_pass() -> int:
    """The number of the backward pass of this thread; -1 outside of any, and for compilers, which
    see a call alone.
    """
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()
