"""What accel has to know of a kind of model: about ten lines each, found by the model's class."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from accel.errors import UnsupportedModelError, nearest
from accel.geometry import Geometry, Site
from accel.intercept import Interception
from accel.layout import Layout
from accel.layouts import Layouts, LayoutsLike
from accel.pipelines.devices import execution_device

DENOISERS = ("transformer", "transformer_2", "model")  # what pipelines call them
T = TypeVar("T")
Call = Mapping[str, Any]


def heads_of(module: Any) -> tuple[int, int]:
    """(heads, head dim) of an attention module, as diffusers' classes have them."""
    dim = getattr(module, "head_dim", None) or module.inner_dim // module.heads
    return module.heads, dim


def output_projection(model: nn.Module, name: str) -> Tensor:
    """The weight that follows a site's heads, [features, heads * dim].

    Blocks that compute attention and feed-forward side by side (Flux's single blocks) have one for
    both, whose first columns are attention's.
    """
    module = model.get_submodule(name)
    out = getattr(module, "to_out", None)
    if out is None:
        out = getattr(model.get_submodule(name.rpartition(".")[0]), "proj_out", None)
    weight = getattr(
        out[0] if isinstance(out, nn.ModuleList | nn.Sequential) else out, "weight", None
    )
    if weight is None:
        raise UnsupportedModelError(f"the output projection of {name} was not found")
    heads, dim = heads_of(module)
    return weight[:, : heads * dim]


@dataclass(frozen=True, slots=True)
class Adapter:
    """A kind of denoiser.

    classes: class names it serves.
    sites: a regular expression that the name of every self- or joint-attention of a block matches
        in full, and no other module's.
    layout: the layout of a call, from the model and the arguments that it reads: one for all, one
        for each sample of the batch, or by site (`accel.layouts`); or why it is unknown, as a text.
    first: the argument that holds the visual tokens. reads: others that the layout depends on by
        their shape (tensors) or value (whole numbers, and lists of them); contents: those whose
        elements it looks at, masks and positions. A layout is read anew when one of these changes.
    probe: small inputs for one forward, for the self-check; None: the first call is the check.
    heads, projection: (heads, head dim) of a site's module, and the weight that follows it.
    vector_masks: its processors make matrices of masks of keys (`accel.key_padding`).
    intercept: how its sites are taken, from a session and the sites' modules.
    package: the classes are those of this package alone, where others have some of the same name.
    entry: the module of a model whose call begins a run; the model's own unless given.
    single: a call is a whole run of one step; `intercept` also gets the `model`, whose blocks may
        compute less.
    """

    classes: tuple[str, ...]
    sites: str
    layout: Callable[[Any, Call], Layouts | LayoutsLike | str]
    probe: Callable[[Any], dict[str, Any]] | None
    first: str = "hidden_states"
    reads: tuple[str, ...] = ()
    contents: tuple[str, ...] = ()
    heads: Callable[[Any], tuple[int, int]] = heads_of
    projection: Callable[[nn.Module, str], Tensor] = output_projection
    vector_masks: bool = False
    intercept: Callable[..., Any] = Interception
    package: str = ""
    entry: Callable[[nn.Module], nn.Module] = lambda model: model
    single: bool = False

    @property
    def arguments(self) -> tuple[str, ...]:
        """Every argument that the layout depends on."""
        return (self.first, *self.reads, *self.contents)


_ADAPTERS: list[Adapter] = []
_REFUSED: dict[tuple[str, str], str] = {}  # by package ("" any) and class


def register(adapter: Adapter) -> Adapter:
    for name in adapter.classes:
        if any(name in known.classes and known.package == adapter.package for known in _ADAPTERS):
            raise ValueError(f"a model class {name!r} has an adapter already")
    _ADAPTERS.append(adapter)
    return adapter


def refuse(reason: str, *classes: str, package: str = "") -> None:
    """Name classes of models (of one package) that accel has nothing for, and why."""
    _REFUSED.update({(package, name): reason for name in classes})


def known_classes() -> tuple[str, ...]:
    """The class names that have an adapter."""
    _register_all()
    return tuple(name for adapter in _ADAPTERS for name in adapter.classes)


def adapter_of(model: nn.Module) -> Adapter:
    """The adapter of a model, by its class or one of its bases, else a guess (`generic`).

    Raises UnsupportedModelError for what accel has nothing for.
    """
    from accel.pipelines.generic import guess
    from accel.pipelines.text_models import guess_text

    found = _by_class(model)
    if found is not None:
        return found
    known, names = known_classes(), [type(model).__name__]
    guessed = guess_text(model) or guess(model)
    if guessed is None:
        raise UnsupportedModelError(
            f"accel has no attention sites in a {names[0]}; {nearest(names[0], known)}"
        )
    return guessed


def _by_class(model: nn.Module) -> Adapter | None:
    _register_all()
    name = type(model).__name__
    for cls in type(model).__mro__:
        package = cls.__module__.partition(".")[0]
        for where in ("", package):
            if (where, cls.__name__) in _REFUSED:
                reason = _REFUSED[where, cls.__name__]
                raise UnsupportedModelError(f"accel does nothing for a {name}: {reason}")
            for adapter in _ADAPTERS:
                if cls.__name__ in adapter.classes and adapter.package == where:
                    return adapter
    return None


def _register_all() -> None:
    import accel.pipelines.dit
    import accel.pipelines.image_models
    import accel.pipelines.text_models
    import accel.pipelines.video_dit  # noqa: F401  all register their adapters


def denoisers_of(target: Any) -> list[nn.Module]:
    """The denoisers of a pipeline (`transformer`, `transformer_2`, `model`), or a model itself."""
    return list(named_denoisers(target).values())


def named_denoisers(target: Any) -> dict[str, nn.Module]:
    """`denoisers_of` by the pipeline's names for them; a model itself is the `transformer`."""
    found = {name: getattr(target, name, None) for name in DENOISERS}
    if isinstance(target, nn.Module):
        found = {"transformer": target}
    models = {
        n: _core(getattr(m, "_orig_mod", m)) for n, m in found.items() if isinstance(m, nn.Module)
    }
    if not models:
        raise UnsupportedModelError(
            f"a {type(target).__name__} has no denoiser that accel knows; give a diffusers"
            " pipeline with a `transformer` or a `model`, or the model itself"
        )
    return models


def _core(model: nn.Module) -> nn.Module:
    """The model of timm in a wrapper (`features_only`, a segmenter), or the model itself."""
    from accel.pipelines.image_models import put_together

    if not type(model).__module__.startswith(("timm.", "accel.")):
        return model
    found = [whole for m in model.modules() if (whole := put_together(m)) is not None]
    if not found and _by_class(model) is not None:
        return model
    found = found or [m for m in model.modules() if (a := _by_class(m)) and a.package == "timm"]
    return found[0] if len(found) == 1 else model


def by_denoiser(target: Any, values: Sequence[T]) -> dict[str, T]:
    """One value for each of `denoisers_of`, by the names that `enable` takes."""
    return dict(zip(named_denoisers(target), values, strict=True))


def sites_of(model: nn.Module) -> dict[Site, nn.Module]:
    """The attention module of every site, in the order of the model."""
    adapter = adapter_of(model)
    sites = {
        Site(name, *adapter.heads(module)): module
        for name, module in model.named_modules()
        if re.fullmatch(adapter.sites, name)
    }
    if not sites:
        raise UnsupportedModelError(f"this {type(model).__name__} has no block with self-attention")
    return sites


def geometry_of(target: Any, layout: Layout | None = None) -> Geometry:
    """The geometry of a model, or of the first denoiser of a pipeline."""
    model = denoisers_of(target)[0]
    return Geometry(type(model).__name__, tuple(sites_of(model)), layout)


def self_check_inputs(model: nn.Module) -> dict[str, Any] | None:
    """Small inputs of the model's own dtype, where it computes, for one forward; None where there
    are none.
    """
    probe = adapter_of(model).probe
    if probe is None:
        return None
    weight = next(model.parameters())
    # diffusers keeps some parameters in float32; the model says what it takes
    dtype = getattr(model, "dtype", weight.dtype)
    device = execution_device(model)

    def placed(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(placed(item) for item in value)
        if isinstance(value, dict):
            return {name: placed(item) for name, item in value.items()}
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(device, dtype if value.is_floating_point() else value.dtype)

    return {name: placed(value) for name, value in probe(model).items()}
