"""A masked diffusion language model as the pipeline calls it, whatever its class takes."""

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import Parameter, signature
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from accel.errors import AccelError, UnsupportedModelError
from accel.pipelines.enable import untouched
from accel.pipelines.rotary import can_place, placed

__all__ = ["TextHost"]

_TRIED = 6  # tokens of the calls that tell what a model sees


class TextHost:
    """Calls of one model. Arguments that its `forward` does not take are left out."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        own = getattr(model, "_orig_mod", model)
        taken = signature(type(own).forward).parameters
        self._any = any(p.kind is Parameter.VAR_KEYWORD for p in taken.values())
        self._names = set(taken)
        self._own: nn.Module = own
        self._sees_ahead = False
        self._mask_rank = 0  # 2: [batch, tokens], 4: [batch, 1, 1, tokens]; 0: not known yet

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
            call["attention_mask"] = real[:, None, None] if self._mask_rank == 4 else real.long()
        if "use_cache" in self._names or (self._any and hasattr(self.config, "use_cache")):
            call["use_cache"] = False
        if self._any:
            call["is_causal"] = False
        counted: Any = None
        if positions is not None:
            if "position_ids" in self._names:
                call["position_ids"] = positions
            elif can_place(self._own):
                counted = positions
            else:
                raise UnsupportedModelError(
                    f"a {type(self._own).__name__} takes no position_ids, so it can neither be"
                    " padded nor be fed some of its tokens; give prompts of one length, and a plan"
                    " without a cache"
                )
        with placed(self._own, counted), self._only(rows, tokens.shape[1]):
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

    def check(self, padded: bool) -> None:
        """Refuse a model whose tokens do not see those after them, or that sees its padding; small
        calls tell, once.
        """
        if not self._sees_ahead:
            if not self._tried(None)[0]:
                raise AccelError(f"this {self._name} is causal: {_AHEAD}")
            self._sees_ahead = True
        if not padded or self._mask_rank:
            return
        seen = []
        for rank in (2, 4):
            self._mask_rank = rank
            try:
                ahead, honoured = self._tried(torch.arange(_TRIED) > 0)
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                if isinstance(error, AccelError):
                    raise
                continue
            if ahead and honoured:
                return
            seen.append(ahead)
        self._mask_rank = 0
        if False in seen:
            raise AccelError(f"this {self._name} is causal where there is padding: {_AHEAD}")
        raise AccelError(
            f"this {self._name} does not heed a mask of padding; give prompts of one length"
        )

    @property
    def _name(self) -> str:
        return type(self._own).__name__

    def _tried(self, real: Bool[Tensor, " tokens"] | None) -> tuple[bool, bool]:
        """Whether a token sees the last one, and does not see the first, which may be padding.

        By the gradient of its logits, which is zero for what it does not see; what it does see may
        change them by less than they are rounded. Tokens are from all over the vocabulary, whose
        first are often special ones that a trained model pays no heed to.
        """
        embeddings = next((m for m in self._own.modules() if isinstance(m, nn.Embedding)), None)
        if embeddings is None:
            raise UnsupportedModelError(
                f"a {self._name} has no embeddings of tokens that are known"
            )
        device = next(self._own.parameters()).device
        words = torch.arange(1, _TRIED + 1, device=device) * embeddings.num_embeddings
        tokens = (words // (_TRIED + 1))[None]
        positions = None
        if real is not None:
            real = real.to(device)[None]
            positions = (real.cumsum(1) - 1).clamp(min=0)
        read: list[Tensor] = []

        def kept(module: nn.Module, args: tuple[Any, ...], embedded: Tensor) -> Tensor:
            read.append(embedded.detach().requires_grad_(True))
            return read[0]

        hook = embeddings.register_forward_hook(kept)
        try:
            with (
                untouched(self._own),
                torch.enable_grad(),
                torch.compiler.set_stance("force_eager"),
            ):
                found = self.logits(tokens, positions, real, None)[0, 1]
                (seen,) = torch.autograd.grad(found.float().square().sum(), read)
        finally:
            hook.remove()
        first, last = seen[0, 0], seen[0, -1]
        return bool(last.any()), not bool(first.any())


_AHEAD = (
    "a token does not see those after it, so it cannot be a masked diffusion model. If it was"
    " trained as one, load it with is_causal=False in its configuration"
)
