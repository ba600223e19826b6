"""A masked diffusion language model as the pipeline calls it, whatever its class takes."""

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import Parameter, signature
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from accel.errors import AccelError, UnsupportedModelError
from accel.pipelines.rotary import can_place, placed

__all__ = ["TextHost"]

_CHECKED = 6  # tokens of the call that tells whether a model sees what follows


class TextHost:
    """Calls of one model. Arguments that its `forward` does not take are left out."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        own = getattr(model, "_orig_mod", model)
        taken = signature(type(own).forward).parameters
        self._any = any(p.kind is Parameter.VAR_KEYWORD for p in taken.values())
        self._names = set(taken)
        self._own = own
        self._seen: set[bool] = set()

    @property
    def config(self) -> Any:
        return getattr(self._own, "config", None)

    @property
    def longest(self) -> int | None:
        """How many tokens the model was made for, where its configuration says."""
        for name in ("max_position_embeddings", "max_sequence_length", "n_positions"):
            found = getattr(self.config, name, None)
            if isinstance(found, int) and found > 0:
                return found
        return None

    @property
    def takes_positions(self) -> bool:
        """Whether tokens can be fed with positions of their own."""
        return "position_ids" in self._names or can_place(self._own)

    def logits(
        self,
        tokens: Int[Tensor, "batch fed"],
        positions: Int[Tensor, "batch fed"] | None,
        real: Bool[Tensor, "batch fed"] | None,
        rows: tuple[int, int] | None,
    ) -> Float[Tensor, "batch rows vocabulary"]:
        """Logits of the tokens of `rows`, of all where that is None.

        positions: None where they count from 0; real: which tokens are no padding, None for all.
        """
        call: dict[str, Any] = {}
        if real is not None:
            call["attention_mask"] = real.long()
        if "use_cache" in self._names or (self._any and hasattr(self.config, "use_cache")):
            call["use_cache"] = False
        if self._any:
            call["is_causal"] = False
        place: Any = None
        if positions is not None:
            if "position_ids" in self._names:
                call["position_ids"] = positions
            elif can_place(self._own):
                place = positions
            else:
                raise UnsupportedModelError(
                    f"a {type(self._own).__name__} takes no position_ids, so it can neither be"
                    " padded nor be fed some of its tokens; give prompts of one length, and a plan"
                    " without a cache"
                )
        with placed(self._own, place), self._only(rows, tokens.shape[1]):
            out = self.model(tokens, **call)
        logits = getattr(out, "logits", None)
        if logits is None:
            logits = out[0]
        if rows is not None and logits.shape[1] == tokens.shape[1]:
            logits = logits[:, slice(*rows)]
        return logits

    @contextmanager
    def _only(self, rows: tuple[int, int] | None, fed: int) -> Iterator[None]:
        """Logits of these rows alone: those of a long prompt would take more than its keys."""
        find = getattr(self._own, "get_output_embeddings", None)
        try:
            head = find() if find is not None and rows is not None else None
        except NotImplementedError:
            head = None
        if not isinstance(head, nn.Module) or rows is None or rows == (0, fed):
            yield
            return

        def cut(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            hidden = args[0] if args else None
            if not isinstance(hidden, Tensor) or hidden.ndim != 3 or hidden.shape[1] != fed:
                return None
            return (hidden[:, slice(*rows)], *args[1:])

        hook = head.register_forward_pre_hook(cut)
        try:
            yield
        finally:
            hook.remove()

    def check_sees_ahead(self, padded: bool) -> None:
        """Refuse a model whose tokens do not see those after them, by a call that shows it.

        Once for calls with padding and once for those without.
        """
        if padded in self._seen:
            return
        device = next(self._own.parameters()).device
        tokens = torch.zeros(2, _CHECKED, dtype=torch.long, device=device)
        tokens[1, -1] = 1
        real, positions = None, None
        if padded:
            real = torch.ones_like(tokens, dtype=torch.bool)
            real[:, 0] = False
            positions = (real.cumsum(1) - 1).clamp(min=0)
        found = self.logits(tokens, positions, real, None)
        if torch.equal(found[0, 1], found[1, 1]):
            name = type(self._own).__name__
            raise AccelError(
                f"this {name} is causal{' where there is padding' if padded else ''}: a token does"
                " not see those after it, so it cannot be a masked diffusion model. If it was"
                " trained as one, load it with is_causal=False in its configuration"
            )
        self._seen.add(padded)
