"""How much attention each token of an image gets: what fusion and selection rank tokens by."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from accel.errors import AccelError
from accel.kernels.column_sums import column_sums

__all__ = ["class_scores", "mass_scores"]

MOST_CHANNELS = 256  # of the kernel, one of which a bias takes

Heads = Float[Tensor, "batch heads tokens dim"]
Scores = Float[Tensor, "batch tokens"]
# as masks of `scaled_dot_product_attention` are: added to logits, or False where a key is hidden
Bias = Float[Tensor, "*any tokens"] | Bool[Tensor, "*any tokens"]


def class_scores(q: Heads, k: Heads, *, scale: float, bias: Bias | None = None) -> Scores:
    """What the first token, the class, gives each: ``mean_h softmax(scale q₀ kᵀ + bias)``.

    One row of the attention map, in fp32 (EViT, arXiv 2202.07800). Gradients flow.
    """
    logits = (q[:, :, :1].float() @ k.float().mT) * scale
    if bias is not None:
        logits = logits + _additive(bias)[..., :1, :]
    return logits.softmax(-1).mean(1)[:, 0]


def mass_scores(
    q: Heads,
    k: Heads,
    *,
    scale: float,
    bias: Bias | None = None,
    weights: Float[Tensor, "batch tokens"] | None = None,
) -> Scores:
    """What all queries give each: ``mean_h Σ_t w_t softmax(scale q_t kᵀ + bias) / Σ_t w_t``.

    By the column sums of a fused kernel, never the map; no gradients. A bias of keys (the same for
    all heads and queries) rides as one more channel of the keys, against one of ones.

    weights: how many times a query counts, 1 unless given.
    Raises AccelError for a bias that differs between queries or heads.
    """
    q, k = q.detach(), k.detach()
    if bias is not None:
        bias = bias.reshape(*(1,) * (4 - bias.ndim), *bias.shape)
        if bias.shape[-2] != 1 or bias.shape[1] != 1:
            raise AccelError(
                "tokens.score 'mass' sums over all queries, and this call has an attention mask"
                " that differs between them; use tokens.score 'class', or a mask of keys"
            )
        if q.shape[3] >= MOST_CHANNELS:
            raise AccelError(
                f"tokens.score 'mass' with sizes or masks takes heads of less than {MOST_CHANNELS}"
                f" channels, and these have {q.shape[3]}; use tokens.score 'class'"
            )
        bias = _additive(bias).detach().reshape(-1, 1, bias.shape[-1], 1) / scale
        bias = bias.clamp_min(torch.finfo(torch.float32).min / 4)
        q = torch.cat([q.float(), torch.ones_like(q[..., :1], dtype=torch.float32)], -1)
        k = torch.cat([k.float(), bias.expand(k.shape[0], k.shape[1], -1, -1)], -1)
    sums = column_sums(q, k, weights=weights, scale=scale).mean(1)
    total = q.shape[2] if weights is None else weights.sum(1, keepdim=True)
    return sums / total


def _additive(mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -torch.inf)
    return mask.float()
