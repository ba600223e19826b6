"""Prompts as token ids, together in one batch with padding on the left."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from accel.errors import AccelError

__all__ = ["encoded", "left_padded", "together"]

Tokens = Int[Tensor, "batch tokens"]


def encoded(
    tokenizer: Any, prompt: str | Sequence[str] | None, messages: Any, use_chat_template: bool
) -> list[list[int]]:
    """Token ids of every prompt or conversation; of texts in the tokenizer's chat template where it
    has one and that is wanted.
    """
    if messages is not None:
        if not isinstance(messages, Sequence) or not messages:
            raise AccelError(f"messages is a conversation, or a list of them, got {messages!r}")
        several = bool(messages) and not isinstance(messages[0], Mapping)
        talks = list(messages) if several else [messages]
    else:
        texts = [prompt] if isinstance(prompt, str) else prompt
        listed = isinstance(texts, Sequence) and all(isinstance(text, str) for text in texts)
        if not listed or not texts:
            raise AccelError(f"prompt is a text, or a list of texts, got {prompt!r:.80}")
        if not (use_chat_template and getattr(tokenizer, "chat_template", None)):
            return [tokenizer(text).input_ids for text in texts]
        talks = [[{"role": "user", "content": text}] for text in texts]
    return [
        tokenizer.apply_chat_template(
            talk, add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
        for talk in talks
    ]


def together(
    rows: Sequence[Sequence[int]], device: torch.device
) -> tuple[Tokens, Bool[Tensor, "batch tokens"] | None]:
    """Rows of ids as one tensor, and which of it is real; None where all is."""
    longest = max(map(len, rows), default=0)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    real = torch.zeros(len(rows), longest, dtype=torch.bool)
    for row, to, on in zip(rows, ids, real, strict=True):
        to[longest - len(row) :] = torch.tensor(row, dtype=torch.long)
        on[longest - len(row) :] = True
    return left_padded(ids.to(device), real)


def left_padded(
    ids: Tensor, mask: Tensor | None
) -> tuple[Tokens, Bool[Tensor, "batch tokens"] | None]:
    """The ids with what is real at the right end, cut to the longest."""
    if ids.ndim == 1:
        ids = ids[None]
    if ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise AccelError(
            f"input_ids are whole numbers [batch, tokens], got {ids.dtype} {tuple(ids.shape)}"
        )
    if len(ids) == 0:
        raise AccelError("there is no prompt")
    if mask is None:
        return ids.long(), None
    mask = mask[None] if mask.ndim == 1 else mask
    if mask.shape != ids.shape:
        raise AccelError(f"attention_mask is {tuple(mask.shape)}, input_ids are {tuple(ids.shape)}")
    real = mask.to(ids.device) != 0
    if bool(real.all()):
        return ids.long(), None
    place = torch.sort(real.long(), dim=1, stable=True).indices
    longest = int(real.sum(1).max())
    ids, real = (x.gather(1, place)[:, x.shape[1] - longest :] for x in (ids, real))
    return ids.long(), None if bool(real.all()) else real
