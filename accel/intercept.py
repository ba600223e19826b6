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
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accel.entry import UNSAFE
from accel.errors import UnsupportedModelError
from accel.geometry import Site
from accel.how import How
from accel.key_padding import KeyPadding
from accel.ranks import Ranks
from accel.router import Session

DISPATCH = "dispatch_attention_fn"
SDPA = "scaled_dot_product_attention"
SITE = "_accel_site"
REDUCE = "__reduce_ex__"
# where a module keeps them, by number
HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)

_numbers = itertools.count()
# The operations below get numbers, because an operation cannot take an object. Entries live as long
# as what they name.
_taken: "weakref.WeakValueDictionary[int, Taken]" = weakref.WeakValueDictionary()


class _Slot:
    """Names the attention module whose processor is running. One per denoiser, hence one thread."""

    site: Tensor | None = None

    @property
    def taken(self) -> "Taken":
        return _taken[int(self.site)]  # type: ignore[arg-type]


class _Kit:
    """What was generated for one denoiser: classes with the globals they were made from.

    It outlives `undo` and goes with the denoiser: graphs that were compiled with these classes
    serve again after the next `enable`, where new ones would compile anew each time, up to torch's
    limit.
    """

    def __init__(self) -> None:
        self.slot = _Slot()
        self.generated: dict[type, tuple[type, dict[str, Any]]] = {}
        self.namespaces: dict[str, types.ModuleType] = {}

    def own(self, cls: type) -> type:
        """The host's class, for a host also makes processors of the class of one that was taken."""
        generated = any(cls is one for one, _ in self.generated.values())
        return cls.__mro__[1] if generated else cls


# by a denoiser's first attention module, which dies with it
_kits: "weakref.WeakKeyDictionary[nn.Module, _Kit]" = weakref.WeakKeyDictionary()


@torch.library.custom_op("accel::attend", mutates_args=(), tags=UNSAFE)
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    site: Tensor,
    tokens_first: bool,
    dropout: float,
    causal: bool,
    scale: float | None,
    gqa: bool,
) -> Tensor:
    taken = _taken[int(site)]
    how = How(mask, dropout, causal, scale, gqa)
    own = lambda: taken.own(q, k, v, how, tokens_first)  # noqa: E731
    out = taken.attend(q, k, v, how, tokens_first, own, taken.parallel_config)
    return out.clone(memory_format=torch.contiguous_format)


@_attend.register_fake
def _(q: Tensor, *_: Any) -> Tensor:
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
        how: How,
        tokens_first: bool,
        own: Callable[[], Tensor],
        parallel_config: Any = None,
    ) -> Tensor:
        """tokens_first: [batch, tokens, heads, dim], as diffusers' dispatcher has it;
        parallel_config: diffusers', where ranks make the call together.
        """
        valid = how.valid(k, tokens_first)
        obstacle = how.obstacle(valid)
        q = how.scaled(q)
        if not tokens_first:
            return self.session.attend(self.site, q, k, v, own, obstacle, valid)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        dense = lambda: own().transpose(1, 2)  # noqa: E731
        ranks = Ranks.of(parallel_config)
        out = self.session.attend(self.site, q, k, v, dense, obstacle, valid, ranks)
        return out.transpose(1, 2)

    @property
    def parallel_config(self) -> Any:
        """diffusers' settings for this module's processor, None where it is not parallel."""
        return getattr(getattr(self.module(), "processor", None), "_parallel_config", None)

    def own(self, q: Tensor, k: Tensor, v: Tensor, how: How, tokens_first: bool) -> Tensor:
        """The dense attention the user chose for this module, for calls from a compiled graph."""
        if not tokens_first:
            return _sdpa(q, k, v, *how)
        processor = self.module().processor  # type: ignore[union-attr]
        dispatch = _original_globals(type(processor))[DISPATCH]
        return dispatch(
            q,
            k,
            v,
            *how,
            backend=getattr(processor, "_attention_backend", None),
            parallel_config=self.parallel_config,
        )


def taken_of(site: Tensor) -> Taken:
    """The module that an attribute SITE names."""
    return _taken[int(site)]


class Interception:
    """The processors of one denoiser, rebound. `undo` puts every one back as it was.

    One at a time for a denoiser.

    modules: attention module by site. A module whose processor is shared with attention that is no
    site (cross-attention) is told apart at the call, by the module.
    vector_masks: the processors get masks of keys, and would make matrices of them (`KeyPadding`).
    """

    def __init__(
        self, session: Session, modules: dict[Site, nn.Module], *, vector_masks: bool = False
    ) -> None:
        self._vector_masks = vector_masks
        self._rebound: list[tuple[Any, type]] = []
        self._modules = list(modules.values())
        self._taken: list[Taken] = []
        self._kit = _kits.setdefault(self._modules[0], _Kit())
        sys.modules.update(self._kit.namespaces)
        # a model that is dropped while enabled takes its namespaces along
        self._forget = weakref.finalize(self, _forget, self._kit.namespaces)
        try:
            for site, module in modules.items():
                taken = Taken(session, site, module)
                self._taken.append(taken)
                # on the CPU whatever the default device: reading it must not wait for one
                module.__dict__[SITE] = torch.tensor(taken.number, device="cpu")
                copy_plainly(module, SITE)
                self._rebind(site, module.processor)
        except BaseException:
            self.undo()
            raise

    def serve(self, session: Session) -> None:
        """Hand the sites to another session; nothing that a compiled graph depends on changes."""
        for taken in self._taken:
            taken.session = session

    def undo(self) -> None:
        for processor, original in self._rebound:
            if isinstance(processor, original):
                processor.__class__ = original
        for module in self._modules:
            own = self._kit.own(type(module.processor))
            if own is not type(module.processor):
                module.processor.__class__ = own
            module.__dict__.pop(SITE, None)
            module.__dict__.pop(REDUCE, None)
        self._forget()
        self._rebound.clear()

    @property
    def intact(self) -> bool:
        """Whether every site still has a processor that was rebound here."""
        classes = [generated for generated, _ in self._kit.generated.values()]
        return all(type(m.processor) in classes for m in self._modules)

    def _rebind(self, site: Site, processor: Any) -> None:
        original = self._kit.own(type(processor))
        if any(processor is p for p, _ in self._rebound):
            return
        if not isinstance(getattr(original, "__call__", None), types.FunctionType):  # noqa: B004
            raise UnsupportedModelError(
                f"the attention processor of {site.name} is a {original.__name__}, which cannot be"
                " taken; reset it with model.set_default_attn_processor()"
            )
        # one generated class for all layers: a class of its own each would recompile per layer
        generated, known = self._kit.generated.get(original, (None, {}))
        own = original.__call__.__globals__
        if generated is None or any(own.get(name) is not value for name, value in known.items()):
            generated = self._generate(original)
            # names with two underscores are the compiler's
            known = {name: value for name, value in own.items() if not name.startswith("__")}
            self._kit.generated[original] = (generated, known)
        processor.__class__ = generated
        self._rebound.append((processor, original))

    def _generate(self, original: type) -> type:
        call: types.FunctionType = original.__call__  # type: ignore[assignment]
        namespace = self._namespace(call.__globals__)
        body = types.FunctionType(
            call.__code__, namespace.__dict__, call.__name__, call.__defaults__, call.__closure__
        )
        body.__kwdefaults__ = call.__kwdefaults__
        slot, vector_masks = self._kit.slot, self._vector_masks

        @functools.wraps(call)
        def __call__(self, attn, *args, **kwargs):
            site = getattr(attn, SITE, None)
            if site is None:
                return call(self, attn, *args, **kwargs)
            slot.site = site
            if vector_masks and kwargs.get("attention_mask") is not None:
                kwargs = {**kwargs, "attention_mask": KeyPadding(kwargs["attention_mask"].bool())}
            return body(self, attn, *args, **kwargs)

        def __reduce_ex__(self, protocol):
            # a copy or a pickle of an enabled model is the plain model
            return _plain, (original, self.__dict__)

        members = {
            "__call__": __call__,
            "__reduce_ex__": __reduce_ex__,
            "__module__": __name__,
            # hosts look classes up in tables, and make processors of the class of another one
            "__class__": property(lambda self: original, _set_class),
        }
        return type(original.__name__, (original,), members)

    def _namespace(self, own: dict[str, Any]) -> types.ModuleType:
        """A copy of a processor's module whose attention functions lead to the session.

        It is registered in `sys.modules`: the compiler resolves the globals of a function there.
        """
        name = f"accel._rebound_{self._taken[0].number}_{own['__name__'].replace('.', '_')}"
        if name in self._kit.namespaces:
            return self._kit.namespaces[name]
        module = types.ModuleType(name)
        module.__dict__.update({k: v for k, v in own.items() if k not in ("__name__", "__spec__")})
        if DISPATCH in own:
            module.__dict__[DISPATCH] = _shim(own[DISPATCH], self._kit.slot, True)
        if own.get("F") is F:
            functional = types.ModuleType(f"{name}.F")
            functional.__dict__.update(
                {k: v for k, v in F.__dict__.items() if k not in ("__name__", "__spec__")}
            )
            functional.__dict__[SDPA] = _shim(_sdpa, self._kit.slot, False)
            if self._vector_masks:
                functional.__dict__["pad"] = KeyPadding.pad
            module.__dict__["F"] = functional
            sys.modules[functional.__name__] = functional
            self._kit.namespaces[functional.__name__] = functional
        sys.modules[name] = module
        self._kit.namespaces[name] = module
        return module


def _forget(namespaces: dict[str, types.ModuleType]) -> None:
    for name in namespaces:
        sys.modules.pop(name, None)


def copy_plainly(module: nn.Module, *names: str, hooks: tuple[int, ...] = ()) -> None:
    """Make copies and pickles of `module` without its attributes `names` and some forward hooks,
    nor what earlier calls named.
    """
    before = getattr(module.__dict__.get(REDUCE), "without", ((), ()))
    names, hooks = (*before[0], *names), (*before[1], *hooks)

    def reduce(protocol):
        parts = list(type(module).__reduce_ex__(module, protocol))
        parts[2] = {k: v for k, v in parts[2].items() if k not in (*names, REDUCE)}
        for kind in HOOKS:
            kept = ((k, v) for k, v in parts[2][kind].items() if k not in hooks)
            parts[2][kind] = OrderedDict(kept)
        return tuple(parts)

    reduce.without = (names, hooks)  # type: ignore[attr-defined]
    module.__dict__[REDUCE] = reduce


def _set_class(processor: Any, cls: type) -> None:
    object.__dict__["__class__"].__set__(processor, cls)


def _plain(original: type, state: dict[str, Any]) -> Any:
    processor: Any = object.__new__(original)
    processor.__dict__.update(state)
    return processor


def _sdpa(q, k, v, mask=None, dropout=0.0, causal=False, scale=None, gqa=False) -> Tensor:
    """SDPA as it is at the call, so that a user's replacement of it stays in force."""
    return F.scaled_dot_product_attention(
        q, k, v, mask, dropout, causal, scale=scale, enable_gqa=gqa
    )


def _shim(own: Callable[..., Tensor], slot: _Slot, tokens_first: bool) -> Callable[..., Tensor]:
    """What stands in for `own`, diffusers' dispatcher or SDPA: the session decides, then `own`."""

    def attention(
        query,
        key,
        value,
        attn_mask=None,
        dropout_p=0.0,
        is_causal=False,
        scale=None,
        enable_gqa=False,
        *args,
        **kwargs,
    ):
        if isinstance(attn_mask, KeyPadding):
            attn_mask = attn_mask.mask
        how = (attn_mask, dropout_p, is_causal, scale, enable_gqa)
        if torch.compiler.is_compiling():
            if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
                return own(query, key, value, *how, *args, **kwargs)  # a graph of its own
            mask, *rest = how
            return torch.ops.accel.attend(query, key, value, mask, slot.site, tokens_first, *rest)
        return slot.taken.attend(
            query,
            key,
            value,
            How(*how),
            tokens_first,
            lambda: own(query, key, value, *how, *args, **kwargs),
            kwargs.get("parallel_config"),
        )

    return attention


def _original_globals(rebound: type) -> dict[str, Any]:
    for cls in rebound.__mro__[1:]:
        if "__call__" in cls.__dict__:
            return cls.__call__.__globals__
    raise AssertionError(f"{rebound} was not rebound")
