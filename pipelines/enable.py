"""`accel.enable`, `disable`, `enabled` and `summary`: what a user calls."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, StateManager
from torch import Tensor, nn

from accel.context import locate
from accel.errors import AccelError, MissedSiteError, PlanError, nearest
from accel.geometry import Geometry
from accel.intercept import Entry, Interception
from accel.layout import Layout
from accel.pipelines.adapters import adapter_of, denoisers_of, self_check_inputs, sites_of
from accel.plan import Plan
from accel.recipes import RECIPES, recipe
from accel.router import Session
from accel.run_summary import Summary, summarise

logger = logging.getLogger("accel")

T = TypeVar("T")
PlanLike = Plan | str | os.PathLike[str] | Mapping[str, Any]
LayoutLike = Layout | Callable[[nn.Module, Tensor], Layout] | None

HANDLE = "_accel"
HOOK = "accel_context"
HUB_FILE = "accel_plan.json"


def enable(
    target: T,
    plan: PlanLike,
    *,
    strict: bool = False,
    layout: LayoutLike = None,
    check: bool = True,
) -> T:
    """Accelerate a pipeline or a bare model by a plan; returns `target` itself.

    plan: a `Plan`, the path of a plan file, the name of a recipe ("sparsed"), or a hub repository
        ("owner/name") that holds `accel_plan.json`. For a pipeline with two denoisers a mapping
        {"transformer": plan, "transformer_2": plan} gives each its own; one plan serves both.
    strict: whatever would run dense with a notice is an error instead.
    layout: the layout of a call, or a function (model, first tensor) -> layout, for a model whose
        tokens accel would misread.
    check: run one small forward and see that every site is taken exactly once.

    Only this instance changes; `disable` puts it back bit for bit. Enabling again replaces the
    plan.
    Raises PlanError (plan does not fit), UnsupportedModelError, MissedSiteError.
    """
    models = denoisers_of(target)
    chosen = [_resolve(plan, model, index) for index, model in enumerate(models)]
    done = []
    try:
        for model, one in zip(models, chosen, strict=True):
            before = getattr(model, HANDLE, None)
            if before is not None:
                logger.warning(
                    "accel was enabled with plan %r; it is replaced by %r",
                    before.session.plan.name,
                    one.name,
                )
                before.remove()
            done.append(Handle(model, one, getattr(target, "scheduler", None), strict, layout))
            if check:
                _self_check(done[-1], model)
    except BaseException:
        for handle in done:
            handle.remove()
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
    """`enable` for the length of a `with` block."""
    enable(target, plan, **settings)
    try:
        yield target
    finally:
        disable(target)


def summary(target: Any) -> Summary:
    """What the last run did: sites, kept blocks, recall, kernels, time against prediction."""
    handles = [getattr(model, HANDLE, None) for model in denoisers_of(target)]
    sessions = [h.session for h in handles if h is not None]
    if not sessions:
        raise AccelError("accel is not enabled here; call accel.enable(pipe, plan) first")
    return summarise(sessions)


def session_of(model: nn.Module) -> Session:
    """The session of an enabled model."""
    handle = getattr(model, HANDLE, None)
    if handle is None:
        raise AccelError(f"accel is not enabled on this {type(model).__name__}")
    return handle.session


class _ContextHook(ModelHook):
    """Receives the cache context that a pipeline attaches to a denoiser call; does nothing else."""

    _is_stateful = True

    def __init__(self) -> None:
        super().__init__()
        self.manager = StateManager(BaseState)  # type: ignore[arg-type]

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.manager.reset()
        return module

    @property
    def context(self) -> Any:
        try:
            return self.manager.context
        except ValueError:
            return None


class Handle:
    """Everything that `enable` put on one denoiser, and how to take it away."""

    def __init__(
        self, model: nn.Module, plan: Plan, scheduler: Any, strict: bool, layout: LayoutLike
    ) -> None:
        self._model = model
        self._sites = sites_of(model)
        geometry = Geometry(type(model).__name__, tuple(self._sites))
        self.session = Session(plan, geometry, strict=strict)
        self._scheduler = scheduler
        self._adapter = adapter_of(model)
        self._layout = layout
        self._context = _ContextHook()
        self.first = self._adapter.first
        self.entry = Entry(self._begin)
        self._interception = Interception(self.session, self._sites)
        self._add_context_hook()
        self._pre_hook = model.register_forward_pre_hook(_on_call, with_kwargs=True)
        setattr(model, HANDLE, self)

    def __deepcopy__(self, memo: Any) -> None:
        """A copy of an enabled model is the plain model."""

    def __reduce__(self) -> Any:
        return type(None), ()

    def remove(self) -> None:
        model = self._model
        if getattr(model, HANDLE, None) is not self:
            return
        delattr(model, HANDLE)
        self._pre_hook.remove()
        forward = model.__dict__.get("forward")
        registry = HookRegistry.check_if_exists_or_initialize(model)
        registry.remove_hook(HOOK, recurse=False)
        _restore_forward(model, forward)
        self._interception.undo()

    def _add_context_hook(self) -> None:
        """Register for the cache context without the wrapper around `forward` that comes with it.

        The wrapper would serve no purpose here, and a deep copy of the model would call through it
        into the original.
        """
        forward = self._model.__dict__.get("forward")
        registry = HookRegistry.check_if_exists_or_initialize(self._model)
        registry.register_hook(self._context, HOOK)
        _restore_forward(self._model, forward)

    def _begin(self, first: Tensor) -> None:
        if not self._interception.intact:
            logger.warning(
                "attention processors were replaced after accel.enable; taking them again"
            )
            self._interception.undo()
            self._interception = Interception(self.session, self._sites)
        read = self._layout if self._layout is not None else self._adapter.layout
        layout = read if isinstance(read, Layout) else read(self._model, first)
        self.session.begin(layout, locate(self._context.context, self._scheduler))


def _restore_forward(model: nn.Module, forward: Any) -> None:
    model.__dict__.pop("forward", None)
    if forward is not None:
        model.__dict__["forward"] = forward


def _on_call(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Before every call of an enabled denoiser. One function for all, so that copies stay plain."""
    handle = getattr(module, HANDLE, None)
    if handle is None:
        return None
    if handle.first in kwargs:
        return args, {**kwargs, handle.first: handle.entry(kwargs[handle.first])}
    return (handle.entry(args[0]), *args[1:]), kwargs


def _self_check(handle: Handle, model: nn.Module) -> None:
    """One small dense forward must meet every site exactly once."""
    with (
        handle.session.probing() as seen,
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
    ):
        model(**self_check_inputs(model))
    wrong = {s.name: seen[s.name] for s in handle.session.geometry.sites if seen[s.name] != 1}
    if wrong:
        calls = ", ".join(f"{name} ({count} calls)" for name, count in wrong.items())
        raise MissedSiteError(
            f"of {len(handle.session.geometry.sites)} sites these were not taken exactly once:"
            f" {calls}; their attention processor does not call diffusers' dispatcher or SDPA."
            " Reset it with model.set_default_attn_processor(), or leave the sites out of the plan"
            " and pass check=False"
        )


def _resolve(plan: PlanLike, model: nn.Module, index: int) -> Plan:
    name = "transformer" if index == 0 else f"transformer_{index + 1}"
    if isinstance(plan, Mapping):
        if name not in plan:
            raise PlanError(f"there is no plan for {name!r} among {sorted(plan)}")
        plan = plan[name]
    if isinstance(plan, str) and plan in RECIPES:
        plan = recipe(plan, Geometry(type(model).__name__, tuple(sites_of(model))))
    elif isinstance(plan, (str, os.PathLike)):
        plan = Plan.load(_plan_file(plan))
    if not isinstance(plan, Plan):
        raise PlanError(f"a plan is a Plan, a path, a recipe or a hub name, not {plan!r:.80}")
    return plan.check(Geometry(type(model).__name__, tuple(sites_of(model))))


def _plan_file(plan: str | os.PathLike[str]) -> Path:
    path = Path(plan)
    if path.is_dir() and (path / HUB_FILE).is_file():
        return path / HUB_FILE
    text = str(plan)
    if path.exists() or path.suffix == ".json":
        return path
    if text.count("/") == 1 and not text.startswith((".", "/")):
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(text, HUB_FILE))
    raise PlanError(f"there is no recipe and no plan file {text!r}; {nearest(text, RECIPES)}")
