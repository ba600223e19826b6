"""What `accel.enable` puts on one denoiser: hooks around its calls, and its attention taken."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from inspect import signature
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from accel.context import Where, locate
from accel.entry import Entry
from accel.errors import AccelError
from accel.intercept import REDUCE, copy_plainly
from accel.layouts import Layouts, LayoutsLike
from accel.obstacles import GRADIENTS
from accel.pipelines.adapters import adapter_of, sites_of
from accel.pipelines.call_reader import CallReader
from accel.pipelines.clocks import Clocks
from accel.pipelines.prefix_feed import PrefixFeed, has_prefix
from accel.pipelines.window_feed import WindowFeed, feeds_windows
from accel.router import Session
from accel.text_step import current
from accel.timesteps import StepCounter

logger = logging.getLogger("accel")

__all__ = ["CONTEXT", "HANDLE", "Handle", "LayoutLike", "Settings", "layouts_of"]

LayoutLike = LayoutsLike | Callable[[nn.Module, Mapping[str, Any]], LayoutsLike] | None

HANDLE = "_accel"
CONTEXT = "cache_context"
# pipelines whose loop is theirs, and what feeds their model by a plan's cache
FEEDS: tuple[tuple[Callable[[Any], bool], Callable[..., WindowFeed | PrefixFeed]], ...] = (
    (feeds_windows, WindowFeed),
    (has_prefix, PrefixFeed),
)
TIMESTEPS = ("timestep", "timesteps", "t")  # what models call the argument


@dataclass(frozen=True, slots=True, eq=False)
class Settings:
    """What one call of `enable` asked for.

    clocks: the schedulers of the pipelines that `enable` was called with.
    """

    session: Session
    clocks: Clocks
    layout: LayoutLike


class Handle:
    """Everything that `enable` put on one denoiser, and how to take it away.

    On the model itself these are attributes of the instance: the handle, a forward pre-hook, a
    `cache_context` that also tells the handle, and a `__reduce_ex__` that leaves them all out.
    """

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self._model = model
        self._sites = sites_of(model)
        self._adapter = adapter_of(model)
        self._context: Any = None
        self._feed: WindowFeed | PrefixFeed | None = None
        self._counter = StepCounter()
        self.resting = False
        self.first = self._adapter.first
        self._root = self._adapter.entry(model)
        self.names = tuple(n for n in signature(type(self._root).forward).parameters if n != "self")
        self._timestep = next((n for n in TIMESTEPS if n in self.names), "")
        self._settings(settings)
        self._reader = CallReader(self._adapter)
        self.entry = Entry(self._begin)
        self._interception = self._intercept()
        self._pre_hook = self._root.register_forward_pre_hook(_on_call, with_kwargs=True)
        if hasattr(model, CONTEXT):
            model.__dict__[CONTEXT] = self._listening(getattr(model, CONTEXT))
        for module in dict.fromkeys((self._root, model)):
            module.__dict__[HANDLE] = self
            copy_plainly(module, HANDLE, CONTEXT, hooks=(self._pre_hook.id,))

    @property
    def session(self) -> Session:
        return self.settings.session

    def _intercept(self) -> Any:
        more: dict[str, Any] = {"vector_masks": True} if self._adapter.vector_masks else {}
        more |= {"model": self._model} if self._adapter.single else {}
        return self._adapter.intercept(self.session, self._sites, **more)

    def _settings(self, settings: Settings) -> None:
        self.settings = settings
        # the arguments of a call that its layout is read from; a function may want any of them
        own = (*self._adapter.arguments, *([self._timestep] if self._timestep else []))
        self.reads = self.names if callable(settings.layout) else own

    def use(self, settings: Settings) -> None:
        """Go on with another plan; compiled graphs stay valid."""
        self._settings(settings)
        self._interception.serve(settings.session)

    @contextmanager
    def rest(self) -> Iterator[None]:
        """While the context is open the model's attention is its own, and its calls are not seen:
        what runs dense from end to end then costs nothing.
        """
        self.resting = True
        self._interception.undo()
        try:
            yield
        finally:
            self.resting = False
            if getattr(self._model, HANDLE, None) is self:  # nobody disabled it meanwhile
                self._interception = self._intercept()

    def follow(self, pipeline: Any) -> None:
        """Feed the model of a pipeline that has a loop of its own by the plan's cache."""
        feed = next((feed for known, feed in FEEDS if known(pipeline)), None)
        if self._feed is None and feed is not None:
            self._feed = feed(self._model, pipeline, lambda: self.session.plan.cache)
            hooks = (self._pre_hook.id, *self._feed.hook_ids)
            copy_plainly(self._model, HANDLE, CONTEXT, hooks=hooks)

    def remove(self) -> None:
        if self._feed is not None:
            self._feed.undo()
        for module in (self._root, self._model):
            for name in (HANDLE, CONTEXT, REDUCE):
                module.__dict__.pop(name, None)
        self._pre_hook.remove()
        self._interception.undo()

    def _listening(self, own: Callable[..., Any]) -> Callable[..., Any]:
        """`cache_context` as the model has it, which pipelines open around every call."""

        @wraps(own)
        @contextmanager
        def cache_context(name: str, **where: Any) -> Iterator[None]:
            with own(name, **where):
                self._context = SimpleNamespace(name=name, **where)
                try:
                    yield
                finally:
                    self._context = None

        return cache_context

    def _begin(self, values: Sequence[Any]) -> None:
        if not self._interception.intact:
            logger.warning("attention was replaced after accel.enable; taking it again")
            self._interception.undo()
            self._interception = self._intercept()
        given, call = self.settings.layout, dict(zip(self.reads, values, strict=True))
        layouts: Layouts | str
        said = current()
        if said is not None:
            layouts = Layouts.of(said.layouts)
        elif given is None:
            layouts = self._reader.layouts(self._model, call)
        else:
            layouts = layouts_of(given(self._model, call) if callable(given) else given)
        timestep = call.get(self._timestep)
        where: Where | None
        if self._adapter.single:
            where = Where(0, 1, run=object())
        else:
            clock = self.settings.clocks.running()
            where = locate(self._context, clock, timestep, self._counter)
        if torch.is_grad_enabled() and _checkpoints(self._model):
            # a checkpoint may run its part without gradients first, and again with them
            layouts = GRADIENTS
        why = (layouts,) if isinstance(layouts, str) else ()
        self.session.begin(None if isinstance(layouts, str) else layouts, where, *why)
        if hasattr(self._interception, "begun"):
            self._interception.begun()


def _checkpoints(model: nn.Module) -> bool:
    """Whether parts of the model are computed again for gradients, by the names that hosts have."""
    hosts = ("is_activation_checkpointing", "is_gradient_checkpointing", "grad_checkpointing")
    return next((x for n in hosts if (x := getattr(model, n, None)) is not None), False)


def layouts_of(given: Any) -> Layouts:
    try:
        return Layouts.of(given)
    except TypeError:
        raise AccelError(
            "layout= is an accel.Layout, a list of them, a mapping from sites to them, or a"
            f" function that gives one of these, not {given!r:.80}"
        ) from None


def _on_call(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Before every call of an enabled denoiser. One function for all, so that copies stay plain."""
    handle = getattr(module, HANDLE, None)
    if handle is None or handle.resting:
        return None
    call = {**dict(zip(handle.names, args, strict=False)), **kwargs}
    first = call.get(handle.first)
    if first is None:
        return None  # the model says itself what it lacks
    values = [call.get(name) for name in handle.reads]
    # a list of tensors, one for each sample, is entered by its first
    passed: Any = _passed(handle.entry, first, values)
    if handle.first in kwargs:
        return args, {**kwargs, handle.first: passed}
    place = handle.names.index(handle.first)
    return (*args[:place], passed, *args[place + 1 :]), kwargs


def _passed(entry: Entry, first: Any, values: Sequence[Any]) -> Any:
    if isinstance(first, Tensor):
        return entry(first, values)
    return [_passed(entry, first[0], values), *first[1:]]
