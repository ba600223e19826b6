"""`accel.enable`, `disable`, `enabled` and `summary`: what a user calls."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial, wraps
from inspect import signature
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from accel.context import Where, locate
from accel.entry import Entry
from accel.errors import AccelError, MissedSiteError, PlanError
from accel.geometry import Geometry
from accel.intercept import REDUCE, copy_plainly
from accel.layouts import Layouts, LayoutsLike
from accel.obstacles import GRADIENTS
from accel.pipelines.adapters import (
    adapter_of,
    denoisers_of,
    named_denoisers,
    self_check_inputs,
    sites_of,
)
from accel.pipelines.announce import announce
from accel.pipelines.call_reader import CallReader
from accel.pipelines.clocks import Clocks
from accel.pipelines.context_parallel import alone, check_parallel, streams_reader
from accel.pipelines.plan_like import resolved
from accel.pipelines.prefix_feed import PrefixFeed, has_prefix
from accel.pipelines.window_feed import WindowFeed, feeds_windows
from accel.plan import Plan
from accel.plan_hub import HUB_FILE
from accel.router import Session
from accel.run_summary import Summary, summarise
from accel.text_step import current
from accel.timesteps import StepCounter

logger = logging.getLogger("accel")

__all__ = ["HUB_FILE", "disable", "enable", "enabled", "session_of", "summary"]

T = TypeVar("T")
PlanLike = Plan | str | os.PathLike[str] | Mapping[str, Any]
LayoutLike = LayoutsLike | Callable[[nn.Module, Mapping[str, Any]], LayoutsLike] | None

HANDLE = "_accel"
CONTEXT = "cache_context"
# pipelines whose loop is theirs, and what feeds their model by a plan's cache
FEEDS: tuple[tuple[Callable[[Any], bool], Callable[..., WindowFeed | PrefixFeed]], ...] = (
    (feeds_windows, WindowFeed),
    (has_prefix, PrefixFeed),
)
TIMESTEPS = ("timestep", "timesteps", "t")  # what models call the argument


def enable(
    target: T,
    plan: PlanLike,
    *,
    strict: bool = False,
    layout: LayoutLike = None,
    check: bool = True,
    guard: bool = True,
) -> T:
    """Accelerate a pipeline or a bare model by a plan; returns `target` itself.

    plan: a `Plan`, the path of a plan file, the name of a recipe ("sparsed"), or a hub repository
        ("owner/name") or folder that holds `accel_plan.json` (`Plan.from_pretrained`). For a
        pipeline with two denoisers a mapping {"transformer": plan, "transformer_2": plan} gives
        each its own; one plan serves both.
    strict: whatever would run dense with a notice is an error instead.
    layout: for a model whose tokens accel does not know or would misread: the layout of a call, a
        list with one for each sample, a mapping from sites to theirs, or a function (model,
        arguments of the call by name) that gives one of these.
    check: run one small forward and see that every site is taken exactly once; of a model that
        accel does not know, the first call of a run is looked at instead.
    guard: a site whose sparse calls are measured to be slower than its dense ones runs dense for
        the rest of the run, with a notice (`accel.guard`). In a run without dense steps three dense
        calls are timed beside the first sparse ones to judge by. What is turned off depends on the
        machine of the moment; False gives the same output always. Where ranks share the calls no
        site is turned off.

    The speed-up that the plan promises is logged, with a warning where it is below 1, or was found
    on another device or in another precision.

    Only this instance changes; `disable` puts it back bit for bit. Enabling again replaces the
    plan. Two pipelines that share a model share its plan; enable both, so that the steps of either
    are known.
    Raises PlanError (plan does not fit), UnsupportedModelError, MissedSiteError.
    """
    named = named_denoisers(target)
    models = list(named.values())
    if layout is not None and not callable(layout):
        _layouts(layout)
    if isinstance(plan, Mapping) and sorted(plan) != sorted(named):
        raise PlanError(f"plans must be given for {sorted(named)}, got {sorted(plan)}")
    chosen = [
        resolved(plan[name] if isinstance(plan, Mapping) else plan, model)
        for name, model in named.items()
    ]
    undo: list[Callable[[], None]] = []
    try:
        for model, one in zip(models, chosen, strict=True):
            announce(one, target, model)
            geometry = Geometry(type(model).__name__, tuple(sites_of(model)))
            # a run of one call has none to time others by
            guarded = guard and not adapter_of(model).single
            session = Session(one, geometry, strict=strict, guard=guarded)
            check_parallel(model)
            session.shared.by_streams = streams_reader(model)
            handle: Handle | None = getattr(model, HANDLE, None)
            clocks = Clocks() if handle is None else handle.settings.clocks
            settings = Settings(session, clocks.with_pipeline(target), layout)
            if handle is None:
                handle = Handle(model, settings)
                undo.append(handle.remove)
            else:
                before = handle.session.plan.name
                logger.warning("accel was enabled with plan %r; now it is %r", before, one.name)
                undo.append(partial(handle.use, handle.settings))
                handle.use(settings)
            handle.follow(target)
            if check:
                _self_check(handle, model)
    except BaseException:
        for step in reversed(undo):
            step()
        raise
    return target


def disable(target: T) -> T:
    """Undo `enable`, bit for bit; nothing happens where accel is not enabled."""
    for model in denoisers_of(target):
        handle = getattr(model, HANDLE, None)
        if handle is not None:
            handle.remove()
    return target


@contextmanager
def enabled(target: T, plan: PlanLike, **settings: Any) -> Iterator[T]:
    """`enable` for the length of a `with` block; what was enabled before comes back after it."""
    handles = [(model, getattr(model, HANDLE, None)) for model in denoisers_of(target)]
    before = [(model, handle and handle.settings) for model, handle in handles]
    enable(target, plan, **settings)
    try:
        yield target
    finally:
        for model, asked in before:
            handle = getattr(model, HANDLE, None)
            if asked is None:
                disable(model)
            elif handle is None:
                Handle(model, asked)
            else:
                handle.use(asked)


def summary(target: Any) -> Summary:
    """What the last run did: sites, kept blocks, recall, kernels, time against prediction."""
    handles = [getattr(model, HANDLE, None) for model in denoisers_of(target)]
    sessions = [h.session for h in handles if h is not None]
    if not sessions:
        raise AccelError("accel is not enabled here; call accel.enable(pipe, plan) first")
    return summarise(sessions)


def plan_of(model: nn.Module) -> Plan | None:
    """The plan of an enabled model; None where accel is not enabled."""
    handle = getattr(getattr(model, "_orig_mod", model), HANDLE, None)
    return None if handle is None else handle.session.plan


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """While the context is open a model runs as it would without accel; no run sees its calls."""
    handle = getattr(getattr(model, "_orig_mod", model), HANDLE, None)
    with nullcontext() if handle is None else handle.session.probing():
        yield


def session_of(model: nn.Module) -> Session:
    """The session of an enabled model."""
    handle = getattr(model, HANDLE, None)
    if handle is None:
        raise AccelError(f"accel is not enabled on this {type(model).__name__}")
    return handle.session


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
            layouts = _layouts(given(self._model, call) if callable(given) else given)
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


def _layouts(given: Any) -> Layouts:
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
    if handle is None:
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


def _self_check(handle: Handle, model: nn.Module) -> None:
    """One small dense forward must meet every site exactly once."""
    inputs = self_check_inputs(model)
    if inputs is None:
        handle.session.check_first_call = True
        return
    # a cache that is enabled on the model asks for a context
    cached = getattr(model, "is_cache_enabled", False)
    context = getattr(model, CONTEXT)("accel") if cached else nullcontext()
    try:
        with (
            handle.session.probing() as seen,
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),
            alone(model) as more,
            context,
        ):
            # offloading may not know how to rebuild a model's own kind of output
            plainly = {"return_dict": False} if "return_dict" in handle.names else {}
            model(**{**inputs, **more, **plainly})
    except Exception:
        if not cached:
            raise
        # a cache may ask its pipeline for the timestep, which there is none of outside of a run
        handle.session.check_first_call = True
        return
    finally:
        if cached:
            # it would answer the next check, or begin the next run
            model._reset_stateful_cache()  # type: ignore[operator]
    wrong = {s.name: seen[s.name] for s in handle.session.geometry.sites if seen[s.name] != 1}
    if wrong:
        calls = ", ".join(f"{name} ({count} calls)" for name, count in wrong.items())
        raise MissedSiteError(
            f"of {len(handle.session.geometry.sites)} sites these were not taken exactly once:"
            f" {calls}; their attention processor does not call diffusers' dispatcher or SDPA."
            " Reset it with model.set_default_attn_processor(), or leave the sites out of the plan"
            " and pass check=False"
        )
