"""Training of vit-digits: which digit stands on a small canvas.

The model has learned places: a window of patches that keep theirs teaches what the whole canvas
does, at a quarter of the cost. So most steps see only the patches around the digit, of every image
its own, and the last ones all of them. The windows are cut behind the position embedding, where
timm has a module for patches that are dropped (arXiv 2212.00794); in the exported model it is
timm's own again.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from denoising import optimisers, rate_at
from digit_canvases import render_canvas
from digit_crops import CROP, draw_crop
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from training import Average
from vit_digits_model import PATCH

from accel.pipelines.vision import VisionPipeline

__all__ = [
    "ClassifierPhase",
    "ClassifierSettings",
    "PatchWindow",
    "classifier_step",
    "crops",
    "window_around",
]


@dataclass(frozen=True, slots=True)
class ClassifierPhase:
    """Up to `until` (fraction of the stage) train on `batch` crops, of each a window of patches
    `side` high and wide; None: all of them.
    """

    until: float
    batch: int
    side: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifierSettings:
    """Numbers of the stage."""

    phases: tuple[ClassifierPhase, ...] = (
        ClassifierPhase(0.5, 48, 8),
        ClassifierPhase(0.7, 32, 10),
        ClassifierPhase(1.0, 24),
    )
    crop: int = CROP
    muon_rate: float = 3e-3
    adam_rate: float = 1.5e-3
    smoothing: float = 0.05  # of the labels
    average_decay: float = 0.995
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


def crops(
    phase: ClassifierPhase, seed: int, index: int, side: int
) -> tuple[UInt8[Tensor, "batch 3 side side"], Int[Tensor, " batch"], Float[Tensor, "batch 2"]]:
    """Pixels, digits and their centres (h, w, pixels) of a step: a function of `(seed, index)` and
    the phase alone.
    """
    scenes = [draw_crop(seed, index * 256 + i, side=side) for i in range(phase.batch)]
    pixels = torch.stack([render_canvas(scene)[0] for scene in scenes])
    digits = torch.tensor([scene.digits[0].digit for scene in scenes])
    return pixels, digits, torch.tensor([scene.digits[0].centre for scene in scenes])


def classifier_step(
    pipe: VisionPipeline, settings: ClassifierSettings, seed: int, patch: int = PATCH
) -> tuple[Callable[[int, float], dict[str, float]], Mapping[str, object]]:
    """The step function of the stage, and the parts of its checkpoint."""
    model = pipe.model.train()
    windows = PatchWindow(model.num_prefix_tokens)
    model.patch_drop = windows
    muon, adam = optimisers(model.blocks, [model], settings.muon_rate, settings.adam_rate)
    average = Average({"model": model}, settings.average_decay)
    forward = torch.compile(model, dynamic=False) if settings.compiled else model
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (pipe.config.mean, pipe.config.std))
    rows = settings.crop // patch

    def step(index: int, progress: float) -> dict[str, float]:
        phase = next(p for p in settings.phases if progress < p.until or p is settings.phases[-1])
        rate = rate_at(index, progress)
        muon.param_groups[0]["lr"] = settings.muon_rate * rate
        adam.param_groups[0]["lr"] = settings.adam_rate * rate
        pixels, digits, centres = crops(phase, seed, index, settings.crop)
        random = torch.Generator().manual_seed(seed * 1_000_003 + index)
        windows.kept = None
        if phase.side is not None:
            windows.kept = window_around(centres / patch, phase.side, rows, random)
        logits = forward((pixels / 255 - mean) / std)
        loss = F.cross_entropy(logits, digits, label_smoothing=settings.smoothing)
        loss.backward()
        nn.utils.clip_grad_norm_(adam.param_groups[0]["params"], 1.0)
        for optimiser in (muon, adam):
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        average.update(index)
        right = (logits.detach().argmax(1) == digits).float().mean().item()
        return {"loss": loss.item(), "right": right, f"right_{phase.side or rows}": right}

    return step, {"model": model, "muon": muon, "adam": adam, "average": average}
