"""diffusers' context parallelism of a model, as far as `enable` has to know of it.

`model.enable_parallelism` leaves three traces: `_parallel_config` on the model and on its attention
processors, and hooks that split and gather tokens at the places of a `_cp_plan`. The hooks are
known by their classes. `tests/pipelines/test_context_parallel.py` checks all of this against the
installed version.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from accel.errors import AccelError
from accel.ranks import Ranks

__all__ = ["alone", "check_parallel", "streams_reader"]

CONFIG = "_parallel_config"
TEXT = "encoder_hidden_states"


def check_parallel(model: nn.Module) -> None:
    """Raises AccelError where ranks pass a model's keys round in a ring, or share its weights."""
    config = getattr(model, CONFIG, None)
    if getattr(config, "tensor_parallel_config", None) is not None:
        raise AccelError(
            "tensor parallelism gives every rank some of the heads, whose choices in a plan are"
            " those of other heads; share tokens instead: ContextParallelConfig(ulysses_degree=...)"
        )
    Ranks.of(config)


@contextmanager
def alone(model: nn.Module) -> Iterator[dict[str, Any]]:
    """While the context is open every rank computes the whole call by itself, and waits for none.

    So that small inputs, whose tokens the ranks may not divide, can be tried on any of them. Gives
    the arguments that a call needs besides: the hooks refuse outputs that are no tuples.
    """
    hooks = list(_hooks(model))
    processors = list(_processors(model))
    before = [hook.metadata for hook in hooks]
    configs = [processor.__dict__[CONFIG] for processor in processors]
    try:
        for hook in hooks:
            # a hook that splits does what its table says; one that gathers goes by a list
            hook.metadata = {} if isinstance(hook.metadata, dict) else [None] * len(hook.metadata)
        for processor in processors:
            processor.__dict__[CONFIG] = None
        yield {"return_dict": False} if hooks else {}
    finally:
        for hook, metadata in zip(hooks, before, strict=True):
            hook.metadata = metadata
        for processor, config in zip(processors, configs, strict=True):
            processor.__dict__[CONFIG] = config


def streams_reader(model: nn.Module) -> Callable[[], bool]:
    """A function that tells whether ranks split a model's text and images apart, before attention
    joins them. Otherwise they split the joint sequence. It does not keep the model alive.
    """
    held = weakref.ref(model)
    known: dict[int, bool] = {}

    def by_streams() -> bool:
        model = held()
        config = getattr(model, CONFIG, None)
        if model is None or config is None:
            return True
        if id(config) not in known:
            known.clear()
            known[id(config)] = any(TEXT in hook.metadata for hook in _hooks(model))
        return known[id(config)]

    return by_streams


def _hooks(model: nn.Module) -> Iterator[Any]:
    """The hooks that split and gather tokens."""
    if getattr(model, CONFIG, None) is None:
        return
    from diffusers.hooks.context_parallel import ContextParallelGatherHook, ContextParallelSplitHook

    kinds = (ContextParallelSplitHook, ContextParallelGatherHook)
    for module in model.modules():
        registry = getattr(module, "_diffusers_hook", None)
        for hook in registry.hooks.values() if registry is not None else ():
            if isinstance(hook, kinds):
                yield hook


def _processors(model: nn.Module) -> Iterator[Any]:
    """Every processor that has settings of its own, once."""
    found = {}
    for module in model.modules():
        processor = getattr(module, "processor", None)
        if CONFIG in getattr(processor, "__dict__", {}):
            found[id(processor)] = processor
    yield from found.values()
