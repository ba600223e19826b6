"""How likely a generated text is under the model that made it, whatever plan it was made with."""

import torch
from jaxtyping import Int
from torch import Tensor

from accel.pipelines.dllm import MaskedDiffusionPipeline
from accel.pipelines.enable import untouched

__all__ = ["dense_loss"]


@torch.no_grad()
def dense_loss(
    pipe: MaskedDiffusionPipeline,
    prompt: str,
    generated: Int[Tensor, " tokens"],
    use_chat_template: bool = True,
) -> float:
    """Mean negative log-likelihood of the generated tokens, in nats, by the host's own attention.

    Two calls: the even generated places are masked in the first, the odd ones in the second, and
    every token is judged where it was masked. A mask itself is no candidate, as in generation.
    """
    model = pipe.model
    device = next(model.parameters()).device
    (ids,) = pipe.prompt_ids(prompt, use_chat_template=use_chat_template)
    start, mask = len(ids), pipe.mask_id
    tokens = torch.cat([torch.tensor(ids, dtype=torch.long), generated.long().cpu()]).to(device)
    total = 0.0
    with untouched(model):
        for parity in (0, 1):
            places = torch.arange(start + parity, len(tokens), 2, device=device)
            if not len(places):
                continue
            masked = tokens.index_fill(0, places, mask)
            back = int(pipe.config.shift_logits)
            logits = pipe.host.logits(masked[None], None, None, None)[0, places - back].float()
            if mask < logits.shape[-1]:
                logits[:, mask] = -torch.inf
            likely = logits.log_softmax(-1).gather(1, tokens[places, None])
            total -= float(likely.double().sum())
    return total / len(generated)
