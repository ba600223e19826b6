"""Diffusers' caches on a pipeline: enabled, disabled, reset between generations, calibrated."""

import io
import json
from collections.abc import Mapping
from contextlib import redirect_stdout
from statistics import mean
from typing import Any

import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks.hooks import HookRegistry, StateManager
from torch import nn

from accel.context import locate
from accel.errors import AccelError
from accel.pipelines.adapters import denoisers_of
from accel.pipelines.caches import CacheSpec
from accel.pipelines.host import Host

# attention and feed-forward of a block, by the names that diffusers' transformers have for them
PARTS_OF_BLOCKS = r".*blocks\.\d+\.(attn\w*|ffn|ff)"
TIMESTEPS = 1000.0


def enable_cache(
    pipe: Any, spec: CacheSpec, *, steps: int, ratios: list[float] | None = None
) -> None:
    """Enable a cache on every denoiser of a pipeline, in place of the one that is enabled.

    steps: of the generations to come; ratios: of `magcache`, see `magnitude_ratios`.
    Raises AccelError for a model that has no caches, or on which this one does nothing.
    """
    disable_cache(pipe)
    models: list[Any] = list(denoisers_of(pipe))
    if spec.kind == "magcache" and len(models) > 1:
        raise AccelError("magcache counts the steps of one denoiser, and this pipeline has two")
    for model in models:
        if not hasattr(model, "enable_cache"):
            raise AccelError(f"a {type(model).__name__} has none of diffusers' caches")
        model.enable_cache(_config(pipe, spec, steps, ratios))
        if not _keep_branches_apart(model):
            model.disable_cache()
            raise AccelError(f"cache {spec.kind!r} finds nothing in a {type(model).__name__}")


def disable_cache(pipe: Any) -> None:
    """Take the cache away; nothing happens where none is enabled."""
    model: Any
    for model in denoisers_of(pipe):
        if getattr(model, "is_cache_enabled", False):
            model.disable_cache()


def reset_cache(pipe: Any) -> None:
    """Forget what earlier generations left behind: one that was interrupted leaves its state."""
    model: Any
    for model in denoisers_of(pipe):
        if getattr(model, "is_cache_enabled", False):
            model._reset_stateful_cache()


def magnitude_ratios(host: Host, prompt: str, seed: int) -> list[float]:
    """MagCache's ratios of every step, from one generation: the mean over the guidance branches.

    Diffusers prints them for the user to copy, one list for every branch.
    """
    model: Any
    (model,) = denoisers_of(host.pipe)
    model.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=host.steps))
    try:
        with redirect_stdout(io.StringIO()) as said:
            host.generate(prompt, seed)
    finally:
        model.disable_cache()
    lines = [line for line in said.getvalue().splitlines() if line.startswith("[") and "," in line]
    lists = [json.loads(line) for line in lines]
    if not lists or any(len(one) != host.steps for one in lists):
        raise AccelError(f"MagCache's calibration gave no {host.steps} ratios: {said.getvalue()!r}")
    return [round(mean(step), 5) for step in zip(*lists, strict=True)]


def left(pipe: Any) -> float:
    """The part of the run that is left, in thousandths: 1000 at its first step, then down to 0.

    It stands for the timestep, in whose terms caches are told where to begin and to end: that is
    unknown outside of a run, and depends on how a scheduler spaces its steps.
    """
    where = locate(None, pipe.scheduler, getattr(pipe, "current_timestep", None))
    return TIMESTEPS * (1 - where.step / where.total) if where is not None else TIMESTEPS


def _config(pipe: Any, spec: CacheSpec, steps: int, ratios: list[float] | None) -> Any:
    options: Mapping[str, Any] = spec.options
    if spec.kind == "pab":
        return PyramidAttentionBroadcastConfig(
            **options, current_timestep_callback=lambda: left(pipe)
        )
    if spec.kind == "faster_cache":
        return FasterCacheConfig(
            **options,
            # branches that are calls of their own cannot be left out; then this is what is left
            is_guidance_distilled=True,
            attention_weight_callback=lambda _: 1 - left(pipe) / TIMESTEPS,
            current_timestep_callback=lambda: left(pipe),
        )
    if spec.kind == "fbcache":
        return FirstBlockCacheConfig(**options)
    if spec.kind == "magcache":
        return MagCacheConfig(**options, num_inference_steps=steps, mag_ratios=ratios)
    more = {k: v for k, v in options.items() if k != "lite"}
    return TaylorSeerCacheConfig(
        **more,
        use_lite_mode=options["lite"],
        cache_identifiers=None if options["lite"] else [PARTS_OF_BLOCKS],
        taylor_factors_dtype=torch.float32,
    )


def _of_branch(name: str) -> property:
    return property(
        lambda self: getattr(self.get_state(), name),
        lambda self, value: setattr(self.get_state(), name, value),
    )


class BranchState(StateManager):
    """The state of one hook, apart for each guidance branch.

    PAB and FasterCache keep one counter and one output per module, for pipelines whose branches
    are one batch. Where they are two calls, as in Wan, the unconditional branch would be given the
    attention of the conditional one. The caches' context says which branch a call is of.
    """

    iteration = _of_branch("iteration")
    cache = _of_branch("cache")
    batch_size = _of_branch("batch_size")


def _keep_branches_apart(model: nn.Module) -> int:
    """Give every hook with one state for all branches a `BranchState`; returns how many hooks
    with a state there are.
    """
    stateful = 0
    for module in model.modules():
        registry = getattr(module, "_diffusers_hook", None)
        if not isinstance(registry, HookRegistry):
            continue
        hook: Any
        for hook in registry.hooks.values():
            if hasattr(getattr(hook, "state", None), "cache"):
                hook.state = BranchState(type(hook.state))  # type: ignore[arg-type]
            stateful += hook._is_stateful and registry is not model._diffusers_hook
    return stateful
