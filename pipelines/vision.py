"""A pipeline for vision models of timm: images to classes, one for an image or one for a pixel.

`accel.enable(pipe, plan)` makes it faster; the model inside is timm's own, unchanged.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from accel.errors import AccelError, nearest
from accel.pipelines.devices import execution_device
from accel.pipelines.segmenter import Segmenter
from accel.pipelines.vision_config import CONFIG, VisionConfig
from accel.untrusted import check_whole

__all__ = ["Segmenter", "VisionConfig", "VisionOutput", "VisionPipeline", "fuse_attention"]

WEIGHTS = "model.safetensors"
MOST_BUFFERS = 2**31  # bytes
OUTPUT_TYPES = ("labels", "logits")


@dataclass
class VisionOutput:
    """labels: class numbers, [batch], or [batch, height, width] of a segmentation; logits: the same
    with an axis of classes after the batch, None for output_type "labels". Both on the CPU. calls:
    how often the model was called.
    """

    labels: Int[Tensor, "batch *pixels"]
    logits: Float[Tensor, "batch classes *pixels"] | None = None
    calls: int = 1


class VisionPipeline:
    """Images to classes.

        >>> pipe = VisionPipeline.from_pretrained("samples/models/swin-digits")
        >>> pipe(["street.png"]).labels                               # doctest: +SKIP

    model: a classifier of timm, or a `Segmenter`; config: what it is and how images are prepared.
    """

    def __init__(self, model: nn.Module, config: VisionConfig) -> None:
        if isinstance(model, Segmenter) != (config.task == "segmentation"):
            raise AccelError(
                f"a {type(model).__name__} is no model for the task {config.task!r}; a Segmenter is"
                " one for segmentation, and only that"
            )
        self.model = model.eval()
        self.config = config
        self.size = config.size

    @classmethod
    def create(cls, config: VisionConfig) -> "VisionPipeline":
        """With a new model, to be trained."""
        return cls(config.build(), config)

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], dtype: torch.dtype = torch.float32, **load: Any
    ) -> "VisionPipeline":
        """From a folder that `save_pretrained` wrote: config.json and model.safetensors; or a
        classifier of timm by its name, with timm's weights.

        load: what is to be otherwise than the configuration has it, as `size`, by the names of
        `VisionConfig`; of a name of timm also `pretrained`, False for weights as they begin.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        config, name = VisionConfig.of(folder), str(folder)
        folder = Path(folder)
        pretrained = True if folder.exists() else load.pop("pretrained", True)
        size = load.pop("size", None)
        config = _changed(config, load)
        if not folder.exists():
            import timm

            made = timm.create_model(name, pretrained=pretrained, **config.model_args)
            return cls(made.to(dtype), config)._sized(size)
        try:
            # what a configuration asks for is made only where the file has weights of these shapes
            with torch.device("meta"):
                _check(config.build(), folder / WEIGHTS)
            model = config.build()
            model.load_state_dict(load_file(folder / WEIGHTS))
        except (OSError, SafetensorError) as error:
            raise AccelError(f"no weights can be read from {folder / WEIGHTS}: {error}") from error
        return cls(model.to(dtype), config)._sized(size)

    def _sized(self, size: Any) -> "VisionPipeline":
        """Set to images of `size`, where that is given."""
        if size is not None:
            if not isinstance(size, Sequence) or len(size) != 2:
                raise AccelError(f"model.load.size is {size!r:.80}; give [height, width] in pixels")
            self.set_input_size(*size)
        return self

    def save_pretrained(
        self, folder: str | os.PathLike[str], safe_serialization: bool = True
    ) -> None:
        """Write config.json and model.safetensors, which `from_pretrained` reads bit for bit; the
        folder of a classifier is also timm's: `timm.create_model("local-dir:FOLDER",
        pretrained=True)`.
        """
        from safetensors.torch import save_file

        if not safe_serialization:
            raise AccelError("weights are written as safetensors only; leave safe_serialization on")
        if self.size != self.config.size:
            raise AccelError(
                f"this pipeline is set to images of {self.size}; save it as it was loaded, for"
                f" {self.config.size}"
            )
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {k: v.detach().cpu().contiguous() for k, v in self.model.state_dict().items()}
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
        self.config.save(folder, self.model)

    @property
    def device(self) -> torch.device:
        return execution_device(self.model)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def patch(self) -> int:
        """Pixels of the side of what the model sees as one: inputs are whole multiples of it."""
        if isinstance(self.model, Segmenter):
            return self.model.stride
        sides = getattr(getattr(self.model, "patch_embed", None), "patch_size", (1,))
        return int(max(sides))

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the logits."""
        return self.config.classes

    def to(self, *args: Any, **kwargs: Any) -> "VisionPipeline":
        """`nn.Module.to` of the model; returns the pipeline itself."""
        self.model.to(*args, **kwargs)
        return self

    def compile(self, **options: Any) -> None:
        """`torch.compile` of the model, in place; before or after `accel.enable`."""
        self.model.compile(**options)

    def set_progress_bar_config(self, **config: Any) -> None:
        """As diffusers' pipelines have it; a single call of a model has no bar."""

    def set_input_size(self, height: int, width: int) -> None:
        """Bring images to another size from now on. A model that is made for one size is resized by
        timm's own `set_input_size`, with windows as large as they are.
        """
        for side in (height, width):
            check_whole("a side of the input", side, 1)
        core: Any = next((m for m in self.model.modules() if hasattr(m, "set_input_size")), None)
        if core is not None:
            windows = getattr(core, "_ref_window_sizes", None)
            more = {} if windows is None else {"window_size": windows}
            core.set_input_size(img_size=(height, width), **more)
        else:
            self._try_size(height, width)
        self.size = (height, width)

    @torch.no_grad()
    def _try_size(self, height: int, width: int) -> None:
        """Whether a model that is not resized takes images of this size; a call tells."""
        try:
            self.model(torch.zeros(1, 3, height, width, device=self.device, dtype=self.dtype))
        except (RuntimeError, AssertionError, ValueError) as error:
            raise AccelError(
                f"this {type(self.model).__name__} takes no images of {height} x {width}, and timm"
                f" cannot resize it: {error}"
            ) from error

    @torch.no_grad()
    def __call__(
        self,
        images: Any,
        *,
        batch_size: int | None = None,
        generator: Any = None,
        output_type: str = "labels",
        return_dict: bool = True,
    ) -> VisionOutput | tuple[Tensor, Tensor | None]:
        """Classes of images, or of their pixels.

        images: PIL images or paths, one or several, or a tensor [batch, 3, height, width] or
            [3, height, width], uint8 or floating in [0, 1]. They are brought to the size that the
            model sees; a segmentation is brought back to theirs, which must be the same for all.
        batch_size: images in one call of the model; None: all of them.
        generator: taken for the sake of other pipelines' callers; nothing is drawn here.
        output_type: `labels`, or `logits` for those as well.
        """
        if output_type not in OUTPUT_TYPES:
            raise AccelError(f"output_type is 'labels' or 'logits', got {output_type!r}")
        if batch_size is not None:
            check_whole("batch_size", batch_size, 1)
        prepared, own = self._prepared(images)
        labels, logits = [], []
        for some in prepared.split(batch_size or len(prepared)):
            found = self.model(some)
            if found.ndim == 4 and found.shape[2:] != own:
                found = F.interpolate(found, size=own, mode="bilinear", align_corners=False)
            # `argmax` of a middle axis takes ten times as long on the CPU; a batch is done before
            # the next one begins
            labels.append(found.max(1).indices.cpu())
            if output_type == "logits":
                logits.append(found.float().cpu())
        whole = torch.cat(logits) if logits else None
        made = VisionOutput(torch.cat(labels), whole, len(labels))
        return made if return_dict else (made.labels, made.logits)

    def _prepared(
        self, images: Any
    ) -> tuple[Float[Tensor, "batch 3 height width"], tuple[int, int]]:
        """Images as the model sees them, and the height and width of those that were given."""
        if isinstance(images, Tensor):
            if images.ndim not in (3, 4) or images.shape[-3] != 3 or not images.numel():
                raise AccelError(f"images are [batch, 3, height, width], got {list(images.shape)}")
            given = [images if images.ndim == 4 else images[None]]
        else:
            many = images if isinstance(images, Sequence) and not isinstance(images, str) else None
            given = [_pixels(image) for image in (many if many is not None else [images])]
        sizes = {(int(g.shape[2]), int(g.shape[3])) for g in given}
        same = isinstance(self.model, Segmenter) or self.size is None
        if not given or (same and len(sizes) > 1):
            raise AccelError(f"give images of one size, at least one; these are of {sorted(sizes)}")
        normal = [self._normal(one) for one in given]
        return normal[0] if len(normal) == 1 else torch.cat(normal), next(iter(sizes))

    def _normal(self, pixels: Tensor) -> Float[Tensor, "batch 3 height width"]:
        pixels = pixels.to(self.device)
        scale = 1.0 if pixels.is_floating_point() else 1 / 255
        pixels = pixels.to(torch.float32, copy=True).mul_(scale)
        if self.size is not None:
            pixels = self._resized(pixels, self.size)
        mean, std = (
            torch.tensor(v, device=pixels.device).view(1, 3, 1, 1)
            for v in (self.config.mean, self.config.std)
        )
        return pixels.sub_(mean).div_(std).to(self.dtype)

    def _resized(self, pixels: Tensor, size: tuple[int, int]) -> Tensor:
        """Brought to a size, and cropped, as the configuration has it."""
        own = tuple(pixels.shape[2:])
        whole = tuple(int(side / self.config.crop_pct) for side in size)
        if self.config.crop_mode == "center":
            by = max(w / o for w, o in zip(whole, own, strict=True))
            whole = tuple(max(w, int(o * by + 1e-6)) for w, o in zip(whole, own, strict=True))
        if whole != own:
            mode = self.config.interpolation
            pixels = F.interpolate(pixels, size=whole, mode=mode, antialias=True).clamp(0, 1)
        top, left = (round((w - side) / 2) for w, side in zip(whole, size, strict=True))
        return pixels[:, :, top : top + size[0], left : left + size[1]]


def fuse_attention(model: nn.Module) -> None:
    """`scaled_dot_product_attention` wherever timm has it, as `TIMM_FUSED_ATTN=2` decides it for
    modules that are made; in place, for this model alone.
    """
    module: Any
    for module in model.modules():
        if getattr(module, "fused_attn", True) is False:
            module.fused_attn = True


def _changed(config: VisionConfig, changes: dict[str, Any]) -> VisionConfig:
    for name in changes:
        if name not in VisionConfig.__dataclass_fields__:
            raise AccelError(
                f"model.load.{name}: a vision model has no such setting;"
                f" {nearest(name, VisionConfig.__dataclass_fields__)}"
            )
    plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in changes.items()}
    return replace(config, **plain)


def _pixels(image: Any) -> Tensor:
    """[1, 3, height, width] in 0..255 of a PIL image or a path."""
    from PIL import Image

    if isinstance(image, str | os.PathLike):
        try:
            with Image.open(image) as file:
                image = file.convert("RGB")
        except OSError as error:
            raise AccelError(f"image {str(image)!r} cannot be read: {error}") from error
    if not isinstance(image, Image.Image):
        raise AccelError(f"an image is a PIL image, a path or a tensor, got {type(image).__name__}")
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None]


def _check(model: nn.Module, path: Path) -> None:
    """Whether a file has the weights of a model, by names and shapes, before any is made; and
    whether what the model has besides, as masks and tables, is of a reasonable size.
    """
    from safetensors import safe_open

    beside = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    if beside > MOST_BUFFERS:
        raise AccelError(
            f"{path.with_name(CONFIG)} asks for a model with {beside / 2**30:.0f} GiB of masks and"
            f" tables, {MOST_BUFFERS / 2**30:.0f} GiB at most; take smaller images or windows"
        )
    wanted = {name: list(weight.shape) for name, weight in model.state_dict().items()}
    with safe_open(path, framework="pt") as file:
        found = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise AccelError(
                f"{path} has {name} as {found.get(name, 'nothing')}, but config.json asks for"
                f" {wanted.get(name, 'nothing')}"
            )
