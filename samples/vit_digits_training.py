"""Training of vit-digits: which digit stands on a small canvas.

The model has learned places: a window of patches that keep theirs teaches what the whole canvas
does, at a quarter of the cost. So most steps see only the patches around the digit, of every image
its own, and the last ones all of them. The windows are cut behind the position embedding, where
timm has a module for patches that are dropped (arXiv 2212.00794); in the exported model it is
timm's own again.

What the class token has to find is told to the patches as well: a head that is thrown away reads
from a block above the middle whether the digit's square covers a patch, which digit it is, and
where in the square the patch lies (`MeaningHead`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from denoising import BACKGROUND, MeaningHead, optimisers, rate_at
from digit_canvases import Canvas, render_canvas
from digit_crops import CROP, CROP_SIZES, draw_crop
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from training import Average
from vit_digits_model import PATCH

from accel.pipelines.vision import VisionPipeline

__all__ = [
    "ClassifierPhase",
    "ClassifierSettings",
    "Crops",
    "PatchWindow",
    "classifier_step",
    "crops",
    "window_around",
]


@dataclass(frozen=True, slots=True)
class ClassifierPhase:
    """Up to `until` (fraction of the stage) train on `batch` crops, of each a window of patches
    `side` high and wide; None: all of them. sizes: of digits, pixels of a crop of 112.
    """

    until: float
    batch: int
    side: int | None = None
    sizes: tuple[float, float] = CROP_SIZES


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifierSettings:
    """Numbers of the stage."""

    phases: tuple[ClassifierPhase, ...] = (
        ClassifierPhase(0.3, 48, 8, (34.0, 56.0)),
        ClassifierPhase(0.5, 48, 8),
        ClassifierPhase(0.7, 32, 10),
        ClassifierPhase(1.0, 24),
    )
    crop: int = CROP
    muon_rate: float = 4e-3
    adam_rate: float = 2e-3
    head_block: float = 0.6  # of the depth
    head_weight: float = 1.0
    smoothing: float = 0.05  # of the labels
    average_decay: float = 0.995
    bfloat16: bool = False
    compiled: bool = False


class PatchWindow(nn.Module):
    """Keeps, of every image, the prefix tokens and those patches whose numbers `kept` holds
    `[batch, patches left]`; None: all.
    """

    def __init__(self, prefix: int) -> None:
        super().__init__()
        self.prefix = prefix
        self.kept: Tensor | None = None

    def forward(self, x: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch left width"]:
        if self.kept is None:
            return x
        patches = self.kept[..., None].expand(-1, -1, x.shape[2])
        return torch.cat([x[:, : self.prefix], x[:, self.prefix :].gather(1, patches)], 1)


def window_around(
    centres: Float[Tensor, "batch 2"], side: int, rows: int, random: torch.Generator
) -> Int[Tensor, "batch left"]:
    """Numbers of the patches of one window per image, `side` of `rows` high and wide, around a
    centre (h, w) in patches, up to a patch off it, and inside the map.
    """
    off = torch.rand(centres.shape, generator=random) * 2 - 1
    first = (centres + off - side / 2).round().long().clamp(0, rows - side)
    along = first[:, :, None] + torch.arange(side)
    return (along[:, 0, :, None] * rows + along[:, 1, None, :]).flatten(1)


@dataclass(frozen=True, slots=True)
class Crops:
    """What a step sees: pixels, digits, their centres (h, w) in pixels; and of every patch which
    digit's square covers it (`BACKGROUND` where none does) and where in the square it lies, (h, w)
    from -1 to 1, 0 outside.
    """

    pixels: UInt8[Tensor, "batch 3 side side"]
    digits: Int[Tensor, " batch"]
    centres: Float[Tensor, "batch 2"]
    covered: Int[Tensor, "batch patches"]
    inside: Float[Tensor, "batch patches 2"]


def _in_patches(scene: Canvas, patch: int) -> tuple[Tensor, Tensor]:
    """`covered` and `inside` of one crop."""
    digit = scene.digits[0]
    along = torch.arange(scene.height // patch) * patch + patch / 2
    h, w = ((along - centre) / (digit.size / 2) for centre in digit.centre)
    inside = torch.stack(torch.broadcast_tensors(h[:, None], w[None]), -1).flatten(0, 1)
    outside = inside.abs().amax(1) >= 1
    inside[outside] = 0
    return torch.full((len(inside),), digit.digit).masked_fill(outside, BACKGROUND), inside


def crops(phase: ClassifierPhase, seed: int, index: int, side: int, patch: int) -> Crops:
    """A function of `(seed, index)` and the phase alone."""
    numbers = range(index * 256, index * 256 + phase.batch)
    scenes = [draw_crop(seed, i, side=side, sizes=phase.sizes) for i in numbers]
    covered, inside = zip(*(_in_patches(scene, patch) for scene in scenes), strict=True)
    return Crops(
        torch.stack([render_canvas(scene)[0] for scene in scenes]),
        torch.tensor([scene.digits[0].digit for scene in scenes]),
        torch.tensor([scene.digits[0].centre for scene in scenes]),
        torch.stack(covered),
        torch.stack(inside),
    )


def classifier_step(
    pipe: VisionPipeline, settings: ClassifierSettings, seed: int, patch: int = PATCH
) -> tuple[Callable[[int, float], dict[str, float]], Mapping[str, object]]:
    """The step function of the stage, and the parts of its checkpoint."""
    model = pipe.model.train()
    windows = PatchWindow(model.num_prefix_tokens)
    model.patch_drop = windows
    head = MeaningHead(
        model.blocks[int(len(model.blocks) * settings.head_block)],
        model.embed_dim,
        read=lambda states: states[:, model.num_prefix_tokens :],
    )
    muon, adam = optimisers(model.blocks, [model, head], settings.muon_rate, settings.adam_rate)
    average = Average({"model": model}, settings.average_decay)
    forward = torch.compile(model, dynamic=False) if settings.compiled else model
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (pipe.config.mean, pipe.config.std))
    rows = settings.crop // patch

    def step(index: int, progress: float) -> dict[str, float]:
        phase = next(p for p in settings.phases if progress < p.until or p is settings.phases[-1])
        rate = rate_at(index, progress)
        muon.param_groups[0]["lr"] = settings.muon_rate * rate
        adam.param_groups[0]["lr"] = settings.adam_rate * rate
        seen = crops(phase, seed, index, settings.crop, patch)
        covered, inside = seen.covered, seen.inside
        random = torch.Generator().manual_seed(seed * 1_000_003 + index)
        windows.kept = None
        if phase.side is not None:
            kept = window_around(seen.centres / patch, phase.side, rows, random)
            windows.kept, covered = kept, covered.gather(1, kept)
            inside = inside.gather(1, kept[..., None].expand(-1, -1, 2))
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.bfloat16):
            logits = forward((seen.pixels / 255 - mean) / std).float()
            meant = head(covered, inside)
        loss = F.cross_entropy(logits, seen.digits, label_smoothing=settings.smoothing)
        (loss + settings.head_weight * meant).backward()
        nn.utils.clip_grad_norm_(adam.param_groups[0]["params"], 1.0)
        for optimiser in (muon, adam):
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        average.update(index)
        right = (logits.detach().argmax(1) == seen.digits).float().mean().item()
        shown = {"loss": loss.item(), "meaning": meant.item(), "right": right}
        return {**shown, f"right_{phase.side or rows}": right}

    parts = {"model": model, "head": head, "muon": muon, "adam": adam, "average": average}
    return step, parts
