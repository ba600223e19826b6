"""Whether gradients are being computed right now.

A block under activation checkpointing runs twice: in the call, and again inside of the backward
pass, later and block by block. Which of the two it is says nothing but autograd's own state, which
torch keeps private (`torch.utils.checkpoint` goes by it too): this is the one place that asks.
"""

import torch

__all__ = ["in_backward"]


def in_backward() -> bool:
    """True inside of a backward pass of this thread, in hooks and in what checkpoints run again."""
    return torch._C._current_graph_task_id() != -1
