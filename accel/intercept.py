"""Taking an attention call without a fork of the model that makes it.

A processor instance gets a generated subclass whose `__call__` is the same code, run in a
namespace in which `dispatch_attention_fn` and `F.scaled_dot_product_attention` lead to the
session. Everything else (projections, norms, rotary tables) stays the host's own code,
`isinstance` and the signature hold, and nothing outside the instance changes.

Two conventions of diffusers are relied upon: that a processor reaches attention through one of
these two global names of its module, and that it gets the attention module first.
`tests/accel/test_intercept.py` checks them against the installed version.

Compiled models go through one opaque operation per site (`accel::attend`) and one at the root
(`accel::enter`): what they do depends on step, plan and layer, and none of that is seen by the
compiler, so nothing recompiles. A site is named to it by a tensor, because an integer attribute
would specialise and recompile per layer.
"""

import functools
import itertools
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accel.geometry import Site
from accel.router import Session

DISPATCH = "dispatch_attention_fn"
SDPA = "scaled_dot_product_attention"


_numbers = itertools.count()
# The operations below get numbers, because an operation cannot take an object. Entries live as long
# as what they name.
_taken: "weakref.WeakValueDictionary[int, Taken]" = weakref.WeakValueDictionary()
_entries: "weakref.WeakValueDictionary[int, Entry]" = weakref.WeakValueDictionary()


class Entry:
    """The start of a denoiser call: `begin(first)` tells the session where it stands."""

    def __init__(self, begin: Callable[[Tensor], None]) -> None:
        self._begin = begin
        self.number = next(_numbers)
        _entries[self.number] = self

    def __call__(self, first: Tensor) -> Tensor:
        """Pass the first tensor of the call through; it comes back unchanged."""
        if torch.compiler.is_compiling():
            return torch.ops.accel.enter(first, self.number)
        self._begin(first)
        return first


@torch.library.custom_op("accel::enter", mutates_args=())
def _enter(first: Tensor, entry: int) -> Tensor:
    _entries[entry]._begin(first)
    return first.clone()


@_enter.register_fake
def _(first: Tensor, entry: int) -> Tensor:
    return torch.empty_like(first)


@torch.library.custom_op("accel::attend", mutates_args=())
def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, site: Tensor, tokens_first: bool
) -> Tensor:
    taken = _taken[int(site)]
    out = taken.attend(q, k, v, mask, tokens_first, lambda: taken.own(q, k, v, mask, tokens_first))
    return out.clone(memory_format=torch.contiguous_format)


@_attend.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, site: Tensor, tokens_first: bool
) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


class Taken:
    """One intercepted attention module: its session, its site, and its own dense attention."""

    def __init__(self, session: Session, site: Site, module: nn.Module) -> None:
        self.session = session
        self.site = site
        self.module = weakref.ref(module)
        self.number = next(_numbers)
        _taken[self.number] = self

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        tokens_first: bool,
        own: Callable[[], Tensor],
    ) -> Tensor:
        """tokens_first: [batch, tokens, heads, dim], as diffusers' dispatcher has it."""
        masked = mask is not None
        if not tokens_first:
            return self.session.attend(self.site, q, k, v, own, masked)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = self.session.attend(self.site, q, k, v, lambda: own().transpose(1, 2), masked)
        return out.transpose(1, 2)

    def own(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, tokens_first: bool
    ) -> Tensor:
        """The dense attention the user chose for this module, for calls from a compiled graph."""
        if not tokens_first:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        processor = self.module().processor  # type: ignore[union-attr]
        dispatch = _original_globals(type(processor))[DISPATCH]
        return dispatch(
            q,
            k,
            v,
            attn_mask=mask,
            backend=getattr(processor, "_attention_backend", None),
            parallel_config=getattr(processor, "_parallel_config", None),
        )


class Interception:
    """The processors of one denoiser, rebound. `undo` puts every one back as it was.

    modules: attention module by site. A module whose processor is shared with attention that is no
    site (cross-attention) is told apart at the call, by the module.
    """

    def __init__(self, session: Session, modules: dict[Site, nn.Module]) -> None:
        self._rebound: list[tuple[Any, type]] = []
        self._modules = list(modules.values())
        self._generated: dict[type, type] = {}
        self._namespaces: dict[str, types.ModuleType] = {}
        self._taken: list[Taken] = []
        self._slot = _Slot()
        for site, module in modules.items():
            taken = Taken(session, site, module)
            self._taken.append(taken)
            module._accel_site = torch.tensor(taken.number)
            self._rebind(module.processor)

    def undo(self) -> None:
        for processor, original in self._rebound:
            if isinstance(processor, original):
                processor.__class__ = original
        for module in self._modules:
            module.__dict__.pop("_accel_site", None)
        for name in self._namespaces:
            sys.modules.pop(name, None)
        self._rebound.clear()

    @property
    def intact(self) -> bool:
        """Whether every site still has the processor that was rebound here."""
        ours = {id(p) for p, _ in self._rebound}
        return all(id(m.processor) in ours for m in self._modules)

    def _rebind(self, processor: Any) -> None:
        original = type(processor)
        if any(processor is p for p, _ in self._rebound):
            return
        # one generated class for all layers: a class of its own each would recompile per layer
        if original not in self._generated:
            self._generated[original] = self._generate(original)
        processor.__class__ = self._generated[original]
        self._rebound.append((processor, original))

    def _generate(self, original: type) -> type:
        call: types.FunctionType = original.__call__  # type: ignore[assignment]
        namespace = self._namespace(call.__globals__)
        body = types.FunctionType(
            call.__code__, namespace.__dict__, call.__name__, call.__defaults__, call.__closure__
        )
        body.__kwdefaults__ = call.__kwdefaults__
        slot = self._slot

        @functools.wraps(call)
        def __call__(self, attn, *args, **kwargs):
            site = getattr(attn, "_accel_site", None)
            if site is None:
                return call(self, attn, *args, **kwargs)
            slot.site = site
            return body(self, attn, *args, **kwargs)

        def __reduce_ex__(self, protocol):
            # a copy or a pickle of an enabled model is the plain model
            return _plain, (original, self.__dict__)

        members = {"__call__": __call__, "__reduce_ex__": __reduce_ex__, "__module__": __name__}
        return type(original.__name__, (original,), members)

    def _namespace(self, own: dict[str, Any]) -> types.ModuleType:
        """A copy of a processor's module whose attention functions lead to the session.

        It is registered in `sys.modules`: the compiler resolves the globals of a function there.
        """
        name = f"accel._rebound_{self._taken[0].number}_{own['__name__'].replace('.', '_')}"
        if name in self._namespaces:
            return self._namespaces[name]
        module = types.ModuleType(name)
        module.__dict__.update({k: v for k, v in own.items() if k not in ("__name__", "__spec__")})
        if DISPATCH in own:
            module.__dict__[DISPATCH] = _dispatch_shim(own, self._slot)
        if own.get("F") is F:
            functional = types.ModuleType(f"{name}.F")
            functional.__dict__.update(
                {k: v for k, v in F.__dict__.items() if k not in ("__name__", "__spec__")}
            )
            functional.__dict__[SDPA] = _sdpa_shim(self._slot)
            module.__dict__["F"] = functional
            sys.modules[functional.__name__] = functional
            self._namespaces[functional.__name__] = functional
        sys.modules[name] = module
        self._namespaces[name] = module
        return module


def _plain(original: type, state: dict[str, Any]) -> Any:
    processor: Any = object.__new__(original)
    processor.__dict__.update(state)
    return processor


class _Slot:
    """Names the attention module whose processor is running. One per denoiser, hence one thread."""

    site: Tensor | None = None


def _dispatch_shim(own: dict[str, Any], slot: _Slot) -> Callable[..., Tensor]:
    original = own[DISPATCH]

    @functools.wraps(original)
    def dispatch_attention_fn(query, key, value, attn_mask=None, **kwargs):
        if torch.compiler.is_compiling():
            return torch.ops.accel.attend(query, key, value, attn_mask, slot.site, True)
        return _taken[int(slot.site)].attend(  # type: ignore[arg-type]
            query,
            key,
            value,
            attn_mask,
            True,
            lambda: original(query, key, value, attn_mask=attn_mask, **kwargs),
        )

    return dispatch_attention_fn


def _sdpa_shim(slot: _Slot) -> Callable[..., Tensor]:
    def scaled_dot_product_attention(query, key, value, attn_mask=None, **kwargs):
        if torch.compiler.is_compiling():
            return torch.ops.accel.attend(query, key, value, attn_mask, slot.site, False)
        return _taken[int(slot.site)].attend(  # type: ignore[arg-type]
            query,
            key,
            value,
            attn_mask,
            False,
            # resolved at the call, so that a user's replacement of SDPA stays in force
            lambda: F.scaled_dot_product_attention(
                query, key, value, attn_mask=attn_mask, **kwargs
            ),
        )

    return scaled_dot_product_attention


def _original_globals(rebound: type) -> dict[str, Any]:
    for cls in rebound.__mro__[1:]:
        if "__call__" in cls.__dict__:
            return cls.__call__.__globals__
    raise AssertionError(f"{rebound} was not rebound")
