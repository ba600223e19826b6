"""What accel has to know of a kind of model: about ten lines each, found by the model's class."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from accel.errors import UnsupportedModelError, nearest
from accel.geometry import Geometry, Site
from accel.layout import Layout

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Adapter:
    """A kind of denoiser.

    classes: class names it serves. is_site: whether a module (by name) is a self- or
    joint-attention of a block. heads: (heads, head dim) of such a module. first: name of the
    argument that holds the visual tokens. layout: the layout of a call, from the model and that
    tensor. projection: weight of a site's output projection, [features, heads * dim].
    probe: small inputs for one forward, for the self-check.
    """

    classes: tuple[str, ...]
    is_site: Callable[[str, nn.Module], bool]
    heads: Callable[[nn.Module], tuple[int, int]]
    first: str
    layout: Callable[[nn.Module, Tensor], Layout]
    projection: Callable[[nn.Module], Tensor]
    probe: Callable[[nn.Module], dict[str, Any]]


_ADAPTERS: list[Adapter] = []


def register(adapter: Adapter) -> Adapter:
    for name in adapter.classes:
        if any(name in known.classes for known in _ADAPTERS):
            raise ValueError(f"a model class {name!r} has an adapter already")
    _ADAPTERS.append(adapter)
    return adapter


def adapter_of(model: nn.Module) -> Adapter:
    """The adapter of a model, by its class or one of its bases."""
    import accel.pipelines.video_dit  # noqa: F401  registers its adapters

    names = [cls.__name__ for cls in type(model).__mro__]
    for name in names:
        for adapter in _ADAPTERS:
            if name in adapter.classes:
                return adapter
    known = [name for adapter in _ADAPTERS for name in adapter.classes]
    raise UnsupportedModelError(
        f"accel has no attention sites in a {names[0]}; {nearest(names[0], known)}"
    )


def denoisers_of(target: Any) -> list[nn.Module]:
    """The denoisers of a pipeline (`transformer`, `transformer_2`), or the model itself."""
    return list(named_denoisers(target).values())


def named_denoisers(target: Any) -> dict[str, nn.Module]:
    """`denoisers_of` by the pipeline's names for them; a model itself is the `transformer`."""
    found = {name: getattr(target, name, None) for name in ("transformer", "transformer_2")}
    if isinstance(target, nn.Module):
        found = {"transformer": target}
    models = {n: getattr(m, "_orig_mod", m) for n, m in found.items() if isinstance(m, nn.Module)}
    if not models:
        raise UnsupportedModelError(
            f"a {type(target).__name__} has no denoiser that accel knows; give a diffusers"
            " pipeline with a `transformer`, or the model itself"
        )
    return models


def by_denoiser(target: Any, values: Sequence[T]) -> dict[str, T]:
    """One value for each of `denoisers_of`, by the names that `enable` takes."""
    return dict(zip(named_denoisers(target), values, strict=True))


def sites_of(model: nn.Module) -> dict[Site, nn.Module]:
    """The attention module of every site, in the order of the model."""
    adapter = adapter_of(model)
    sites = {
        Site(name, *adapter.heads(module)): module
        for name, module in model.named_modules()
        if adapter.is_site(name, module)
    }
    if not sites:
        raise UnsupportedModelError(f"this {type(model).__name__} has no block with self-attention")
    return sites


def geometry_of(target: Any, layout: Layout | None = None) -> Geometry:
    """The geometry of a model, or of the first denoiser of a pipeline."""
    model = denoisers_of(target)[0]
    return Geometry(type(model).__name__, tuple(sites_of(model)), layout)


def self_check_inputs(model: nn.Module) -> dict[str, Any]:
    """Small inputs of the model's own dtype and device, for one forward."""
    weight = next(model.parameters())
    # diffusers keeps some parameters in float32; the model says what it takes
    dtype = getattr(model, "dtype", weight.dtype)
    return {
        name: value.to(weight.device, dtype if value.is_floating_point() else value.dtype)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in adapter_of(model).probe(model).items()
    }
