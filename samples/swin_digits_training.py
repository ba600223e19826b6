"""Training of swin-digits: classes of pixels on growing canvases, then with some of the windows.

    loss = CE(weights: 1 of a digit, `background` of the ground) + dice_weight * (1 - dice)

The dice of a digit is 2 sum(p y) / (sum(p) + sum(y)) over all pixels of the batch, and counts for
the digits that are in it: pixels of a digit are few, and small ones weigh as much as large ones.

Small canvases full of digits teach most of what there is to know at a fraction of the cost, since
windows are as large on any canvas. Digits of about one size come first: a model that has to tell
them apart at all sizes from the beginning finds nothing in the time that it takes to learn one.
Whole canvases, most of them empty, come at the end. In the stages with keeps every step runs as a
plan makes it: with other keeps each time (`adapt`), or in turn with those that searches have found
and with all windows (`tune`).
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from denoising import optimisers, rate_at
from digit_canvases import CANVAS, SIZES, make_canvas
from jaxtyping import Float, Int, UInt8
from swin_digits_model import swin_of
from torch import Tensor, nn
from training import Average
from window_adaptation import SCORE, draw_keeps, keeps_plan, window_blocks

from accel.pipelines.enable import enabled
from accel.pipelines.vision import VisionPipeline
from accel.window_keeps import WindowKeeps

__all__ = [
    "ADAPT",
    "DENSE",
    "TUNE",
    "SegmentationPhase",
    "SegmentationSettings",
    "adapting",
    "canvases",
    "segmentation_loss",
    "segmentation_step",
    "tuning",
]

Around = Callable[[int], AbstractContextManager]


@dataclass(frozen=True, slots=True)
class SegmentationPhase:
    """Up to `until` (fraction of the stage) train on `batch` canvases of `size` pixels, high and
    wide, with so many `digits`; None: as many as canvases of this size have. sizes: of digits,
    pixels. background: weight of its pixels in the cross-entropy; far below 1 it hastens learning,
    and lets digits grow over their borders.
    """

    until: float
    size: int
    batch: int
    digits: tuple[int, int] | None = None
    sizes: tuple[float, float] = SIZES
    background: float = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentationSettings:
    """Numbers of a stage."""

    phases: tuple[SegmentationPhase, ...]
    muon_rate: float = 5e-3
    adam_rate: float = 2e-3
    dice_weight: float = 0.5
    average_decay: float = 0.995
    bfloat16: bool = False
    compiled: bool = False


DENSE = SegmentationSettings(
    phases=(
        SegmentationPhase(0.3, 256, 6, (6, 14), (28.0, 64.0), 0.08),
        SegmentationPhase(0.5, 256, 6, (4, 10), (20.0, 100.0), 0.1),
        SegmentationPhase(0.72, 256, 6, (1, 6), background=0.2),
        SegmentationPhase(1.0, CANVAS, 2),
    )
)
ADAPT = SegmentationSettings(
    phases=(SegmentationPhase(1.0, CANVAS, 2),), muon_rate=1.5e-3, adam_rate=6e-4
)
TUNE = SegmentationSettings(
    phases=(SegmentationPhase(1.0, CANVAS, 2),), muon_rate=1e-3, adam_rate=4e-4
)


def canvases(
    phase: SegmentationPhase, seed: int, stage: int, index: int
) -> tuple[UInt8[Tensor, "batch 3 size size"], Int[Tensor, "batch size size"]]:
    """Pixels and classes of a step: a function of `(seed, stage, index)` and the phase alone."""
    first = (stage * 10_000_000 + index) * 64
    drawn = [
        make_canvas(
            seed,
            first + i,
            height=phase.size,
            width=phase.size,
            digits=phase.digits,
            sizes=phase.sizes,
        )
        for i in range(phase.batch)
    ]
    pixels, classes = (torch.stack(values) for values in zip(*drawn, strict=True))
    return pixels, classes.long()


def segmentation_loss(
    logits: Float[Tensor, "batch classes height width"],
    classes: Int[Tensor, "batch height width"],
    background: float,
    dice_weight: float,
) -> Float[Tensor, ""]:
    """See the top of the file; without digits it is the cross-entropy alone."""
    weight = torch.ones(logits.shape[1])
    weight[0] = background
    loss = F.cross_entropy(logits, classes, weight)
    shown = F.one_hot(classes, logits.shape[1]).to(logits.dtype).flatten(0, 2)[:, 1:]
    found = logits.softmax(1).permute(0, 2, 3, 1).flatten(0, 2)[:, 1:]
    counts = shown.sum(0)
    dice = 2 * (found * shown).sum(0) / (found.sum(0) + counts).clamp(min=1e-6)
    there = counts > 0
    missed = (there * (1 - dice)).sum() / there.sum().clamp(min=1)
    return loss + dice_weight * missed


def _right(logits: Tensor, classes: Tensor) -> float:
    """The share of pixels of digits that have their class."""
    digits = classes > 0
    return (logits.detach().argmax(1) == classes)[digits].float().mean().item()


def adapting(pipe: VisionPipeline, seed: int) -> Around:
    """What surrounds a step of adaptation: keeps that are a function of `(seed, index)`."""
    sites = window_blocks(pipe.model)

    def around(index: int) -> AbstractContextManager:
        keeps = draw_keeps(sites, np.random.default_rng([seed, index, 23]))
        plan = keeps_plan(pipe.model, WindowKeeps(keeps, SCORE))
        return enabled(pipe.model, plan, check=False, guard=False)

    return around


def tuning(pipe: VisionPipeline, found: Sequence[WindowKeeps]) -> Around:
    """What surrounds a step of tuning: the keeps of each plan in turn, and then all windows, so
    that the same weights serve the plans and the dense model beside them.
    """
    plans = [keeps_plan(pipe.model, windows, "tuning") for windows in found]

    def around(index: int) -> AbstractContextManager:
        turn = index % (len(plans) + 1)
        if turn == len(plans):
            return nullcontext()
        return enabled(pipe.model, plans[turn], check=False, guard=False)

    return around


def segmentation_step(
    pipe: VisionPipeline,
    settings: SegmentationSettings,
    seed: int,
    stage: int = 0,
    around: Around = lambda index: nullcontext(),
) -> tuple[Callable[[int, float], dict[str, float]], Mapping[str, object]]:
    """The step function of a stage, and the parts of its checkpoint. stage: a number that no other
    stage of the run has, so that none sees the canvases of another.
    """
    model, swin = pipe.model.train(), swin_of(pipe)
    blocks = [block for layer in swin.layers for block in layer.blocks]
    merges = [layer.downsample for layer in swin.layers[1:]]
    muon, adam = optimisers([*blocks, *merges], [model], settings.muon_rate, settings.adam_rate)
    average = Average({"model": model}, settings.average_decay)
    forward = torch.compile(model, dynamic=False) if settings.compiled else model
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (pipe.config.mean, pipe.config.std))

    def step(index: int, progress: float) -> dict[str, float]:
        phase = next(p for p in settings.phases if progress < p.until or p is settings.phases[-1])
        if pipe.size != (phase.size, phase.size):
            pipe.set_input_size(phase.size, phase.size)
        rate = rate_at(index, progress)
        muon.param_groups[0]["lr"] = settings.muon_rate * rate
        adam.param_groups[0]["lr"] = settings.adam_rate * rate
        pixels, classes = canvases(phase, seed, stage, index)
        with around(index):
            with torch.autocast("cpu", torch.bfloat16, enabled=settings.bfloat16):
                logits = forward((pixels / 255 - mean) / std).float()
            loss = segmentation_loss(logits, classes, phase.background, settings.dice_weight)
            loss.backward()
        nn.utils.clip_grad_norm_(adam.param_groups[0]["params"], 1.0)
        for optimiser in (muon, adam):
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        average.update(index)
        right = _right(logits, classes)
        return {"loss": loss.item(), "right": right, f"right_{phase.size}": right}

    return step, {"model": model, "muon": muon, "adam": adam, "average": average}
