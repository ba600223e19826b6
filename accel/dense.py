"""Dense attention as others have it: what a device offers, and which is expected to be fastest."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from accel.kernels.attention_cpu import has_bf16

__all__ = ["SDPA", "dense_attentions", "usual_dense"]

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

# of F.scaled_dot_product_attention on CUDA; its own choice on Hopper is flash, not cuDNN
SDPA = {
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
# query rows whose logits stay in a processor's cache
CHUNK_ROWS = 256


def dense_attentions(device: torch.device, dtype: torch.dtype) -> dict[str, Attention]:
    """Everything that may be the fastest dense attention of a device in a dtype, by name.

    On a GPU PyTorch's cuDNN, flash and memory-efficient attention, and FlashAttention-3 and
    xFormers where they are installed; each may refuse a shape or a dtype. Elsewhere PyTorch's
    attention; and in bf16, on processors that multiply it, plain products of 256 query rows at a
    time, for PyTorch's attention computes bf16 in fp32 unless there are AMX tiles.
    """
    if device.type != "cuda":
        found: dict[str, Attention] = {"sdpa": F.scaled_dot_product_attention}
        if dtype == torch.bfloat16 and has_bf16(device):
            found["matmul"] = _by_rows
        return found
    found = {name: partial(_sdpa, name) for name in SDPA}
    if find_spec("flash_attn_interface"):
        found["flash-attn-3"] = _flash3
    if find_spec("xformers"):
        found["xformers"] = _xformers
    return found


def usual_dense(
    q: Float[Tensor, "batch heads tokens dim"],
    k: Float[Tensor, "batch kv_heads kv_tokens dim"],
    v: Float[Tensor, "batch kv_heads kv_tokens dim"],
) -> Float[Tensor, "batch heads tokens dim"]:
    """The dense attention to expect from a host that has torch and no more: cuDNN's before flash on
    Hopper, else torch's choice.
    """
    if q.is_cuda and torch.cuda.get_device_capability(q.device)[0] == 9:
        # the last two take what the first refuse: fp32, and any shape
        backends = [*SDPA.values(), SDPBackend.MATH]
        with sdpa_kernel(backends, set_priority=True):
            return F.scaled_dot_product_attention(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def _sdpa(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPA[name]):
        return F.scaled_dot_product_attention(q, k, v)


def _by_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scale, parts = q.shape[3] ** -0.5, q.split(CHUNK_ROWS, dim=2)
    return torch.cat([torch.softmax(scale * part @ k.mT, -1) @ v for part in parts], dim=2)


def _flash3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn_interface import flash_attn_func

    out = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)))
    # its first versions give the log-sum-exp too
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


def _xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
