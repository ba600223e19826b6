"""`accel.enable`, `disable`, `enabled` and `summary`: what a user calls."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from accel.errors import AccelError, MissedSiteError, PlanError
from accel.geometry import Geometry
from accel.pipelines.adapters import (
    adapter_of,
    denoisers_of,
    named_denoisers,
    self_check_inputs,
    sites_of,
)
from accel.pipelines.announce import announce
from accel.pipelines.clocks import Clocks
from accel.pipelines.context_parallel import alone, check_parallel, streams_reader
from accel.pipelines.handle import CONTEXT, HANDLE, Handle, LayoutLike, Settings, layouts_of
from accel.pipelines.plan_like import resolved
from accel.plan import Plan
from accel.plan_hub import HUB_FILE
from accel.router import Session
from accel.run_summary import Summary, summarise

logger = logging.getLogger("accel")

__all__ = ["HUB_FILE", "disable", "enable", "enabled", "session_of", "summary"]

T = TypeVar("T")
PlanLike = Plan | str | os.PathLike[str] | Mapping[str, Any]


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
        layouts_of(layout)
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


@contextmanager
def resting(model: nn.Module, tokens: int) -> Iterator[None]:
    """For a run of a text model: while the context is open it runs as it would without accel where
    so many tokens are below the plan's crossover, since nothing is gained from the first call to
    the last. Of a compiled model attention stays taken: its graphs would be made again.
    """
    handle = getattr(model, HANDLE, None)
    compiled = hasattr(model, "_orig_mod") or any(
        getattr(m, "_compiled_call_impl", None) is not None for m in model.modules()
    )
    if handle is None or compiled:
        yield
        return
    weight = next(model.parameters())
    cast = torch.is_autocast_enabled(weight.device.type)
    rests = not cast and handle.session.rests(tokens, weight.device, weight.dtype)
    with handle.rest() if rests else nullcontext():
        yield


def session_of(model: nn.Module) -> Session:
    """The session of an enabled model."""
    handle = getattr(model, HANDLE, None)
    if handle is None:
        raise AccelError(f"accel is not enabled on this {type(model).__name__}")
    return handle.session


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
