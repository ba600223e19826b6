"""Taking the attention calls of a transformers model, through the interfaces it has for that.

A site's module is named to `attention` by an attribute of its own; a module without one (a vision
tower's, or of a copy of the model) goes on to the attention that was chosen before. The name that
the model's configuration then has, `accel_sdpa` for `sdpa`, is registered with transformers'
AttentionInterface and, since a name without one has its padding dropped silently, with its
AttentionMaskInterface. `tests/accel/test_intercept_interface.py` checks the conventions.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from accel.errors import UnsupportedModelError
from accel.geometry import Site
from accel.how import How
from accel.intercept import REDUCE, SITE, Taken, copy_plainly, taken_of
from accel.router import Session

__all__ = ["InterfaceInterception", "uses_interface"]

PREFIX = "accel_"


def uses_interface(module: nn.Module) -> bool:
    """Whether a module asks transformers' AttentionInterface for its attention."""
    return "ALL_ATTENTION_FUNCTIONS" in type(module).forward.__globals__ and hasattr(
        getattr(module, "config", None), "_attn_implementation"
    )


class InterfaceTaken(Taken):
    """A module whose dense attention is the one registered as `base`."""

    def __init__(self, session: Session, site: Site, module: nn.Module, base: str) -> None:
        super().__init__(session, site, module)
        self.base = base

    def own(self, q: Tensor, k: Tensor, v: Tensor, how: How, tokens_first: bool) -> Tensor:
        module = self.module()
        assert module is not None
        settings = {"dropout": how.dropout, "scaling": how.scale, "is_causal": how.causal}
        mask = how.mask
        if self.base == "eager" and mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(
                ~mask, torch.finfo(q.dtype).min
            )
        out, _ = _function(self.base, module)(module, q, k, v, mask, **settings)
        return out.transpose(1, 2)


class InterfaceInterception:
    """The sites of one model, taken. `undo` puts the model's configuration back."""

    def __init__(self, session: Session, modules: dict[Site, nn.Module]) -> None:
        self._modules = list(modules.values())
        self._configs: dict[int, Any] = {id(m.config): m.config for m in self._modules}
        self._before: dict[int, str] = {key: _base(c) for key, c in self._configs.items()}
        self._taken: list[InterfaceTaken] = []
        for site, module in modules.items():
            taken = InterfaceTaken(session, site, module, self._before[id(module.config)])
            self._taken.append(taken)
            module.__dict__[SITE] = torch.tensor(taken.number, device="cpu")
            copy_plainly(module, SITE)
        for key, config in self._configs.items():
            _register(self._before[key])
            config._attn_implementation = _Name(PREFIX + self._before[key])

    def serve(self, session: Session) -> None:
        """Hand the sites to another session."""
        for taken in self._taken:
            taken.session = session

    def undo(self) -> None:
        for key, config in self._configs.items():
            if config._attn_implementation == PREFIX + self._before[key]:
                config._attn_implementation = self._before[key]
        for module in self._modules:
            module.__dict__.pop(SITE, None)
            module.__dict__.pop(REDUCE, None)

    @property
    def intact(self) -> bool:
        """Whether nobody chose another attention since."""
        return all(
            c._attn_implementation == PREFIX + self._before[key] for key, c in self._configs.items()
        )


class _Name(str):
    """The name that a taken model's configuration has. Of a copy or a pickle, which may be read
    where accel is not, it is that of the attention below.
    """

    __slots__ = ()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return str, (self.removeprefix(PREFIX),)


def _base(config: Any) -> str:
    """The attention that a configuration names; an enabled model's copy still has our name."""
    name = config._attn_implementation
    if not isinstance(name, str):
        raise UnsupportedModelError(
            f"the model's attention implementation is {name!r}; choose one with"
            " model.set_attn_implementation('sdpa')"
        )
    return name.removeprefix(PREFIX)


def _function(base: str, module: nn.Module) -> Callable[..., tuple[Tensor, Any]]:
    from transformers import AttentionInterface

    if base == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return AttentionInterface()[base]


def _register(base: str) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    masks = AttentionMaskInterface()
    AttentionInterface.register(PREFIX + base, partial(_attention, base))
    if base in masks:
        AttentionMaskInterface.register(PREFIX + base, partial(_mask, masks[base]))


def _mask(own: Callable[..., Any], **call: Any) -> Any:
    """The mask that `own` makes; one that says the same of every query, in one row."""
    from transformers.masking_utils import bidirectional_mask_function

    made = own(**call)
    same = call.get("mask_function") is bidirectional_mask_function
    if same and isinstance(made, Tensor) and made.ndim == 4:
        return made[:, :, :1]
    return made


def _attention(
    base: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls at every attention of an enabled model; k and v are not expanded."""
    own = _function(base, module)
    settings = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
    call = partial(own, module, query, key, value, attention_mask, **settings)
    site = getattr(module, SITE, None)
    if site is None or kwargs.get("output_attentions"):
        return call()
    causal = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
    causal = causal and attention_mask is None and query.shape[2] > 1
    other = [n for n in ("softcap", "s_aux", "position_bias") if kwargs.get(n) is not None]
    # masks of eager attention are added; what they hide is far below zero
    mask = attention_mask
    if isinstance(mask, Tensor) and mask.is_floating_point():
        mask = mask == 0 if mask.shape[2] == 1 else mask
    how = How(mask, dropout, causal, scaling, query.shape[1] != key.shape[1])
    if torch.compiler.is_compiling() and not other:
        plain = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
        if plain:
            return call()
        out = torch.ops.accel.attend(query, key, value, mask, site, False, *how[1:])
        return out.transpose(1, 2), None
    taken = taken_of(site)
    if other:
        return call()
    out = taken.attend(query, key, value, how, False, lambda: call()[0].transpose(1, 2))
    return out.transpose(1, 2), None
