"""Quality of a video against the dense run of the same seed, and by what the video is for.

Frames are float32 `[frames, height, width, 3]` in [0, 1]; an image is a video of one frame.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf, log10
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from accel.errors import AccelError

__all__ = ["PSNR_CAP_DB", "Classifier", "capped", "flicker", "import_cv2", "psnr", "ssim"]

Frames = Float[np.ndarray, "_frames _height _width 3"]

PSNR_CAP_DB = 100.0
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5


def psnr(a: Frames, b: Frames) -> float:
    """`-10 log10(mean (a - b)²)` in dB, over all pixels of all frames; +inf where equal."""
    _check_pair(a, b)
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return inf if error == 0 else -10 * log10(error)


def capped(value_db: float) -> float:
    """A PSNR that JSON can hold and a mean can digest: at most 100 dB."""
    return min(value_db, PSNR_CAP_DB)


def ssim(a: Frames, b: Frames) -> float:
    """Structural similarity (Wang et al. 2004), mean over pixels, channels and frames; at most 1.

    `(2 μa μb + c1)(2 σab + c2) / ((μa² + μb² + c1)(σa² + σb² + c2))`, c1 = 0.01², c2 = 0.03², with
    moments under a Gaussian window of 11 x 11 and σ 1.5 that stays inside the frame.
    """
    _check_pair(a, b)
    if min(a.shape[1:3]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs frames of at least 11 x 11 pixels, got {a.shape[1:3]}")
    x, y = (torch.from_numpy(np.ascontiguousarray(v)).double().permute(0, 3, 1, 2) for v in (a, b))
    mean_x, mean_y = _windowed(x), _windowed(y)
    var_x = _windowed(x * x) - mean_x**2
    var_y = _windowed(y * y) - mean_y**2
    cov = _windowed(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * cov + c2) / (var_x + var_y + c2)
    return float((luminance * structure).mean())


def _windowed(x: Tensor) -> Tensor:
    """Gaussian means of `[frames, channels, height, width]`, without padding."""
    place = torch.arange(SSIM_WINDOW, dtype=x.dtype) - SSIM_WINDOW // 2
    weight = torch.exp(-(place**2) / (2 * SSIM_SIGMA**2))
    weight = (weight / weight.sum()).expand(x.shape[1], 1, 1, -1)
    rows = nn.functional.conv2d(x, weight, groups=x.shape[1])
    return nn.functional.conv2d(rows, weight.transpose(2, 3), groups=x.shape[1])


def flicker(video: Frames) -> float:
    """What motion does not explain: mean `|frame t+1 - frame t moved along the optical flow|`.

    The flow is Farneback's, from t+1 back to t, of the video itself. Lower is steadier; a cut or a
    noisy original flickers too, so compare with the dense run. 0 for a single frame.
    """
    if len(video) < 2:
        return 0.0
    cv2 = import_cv2()
    height, width = video.shape[1:3]
    grey = (video.mean(3) * 255).round().clip(0, 255).astype(np.uint8)
    columns, rows = np.meshgrid(
        np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)
    )
    total = 0.0
    for before, after, grey_before, grey_after in zip(
        video, video[1:], grey, grey[1:], strict=False
    ):
        flow = cv2.calcOpticalFlowFarneback(grey_after, grey_before, None, 0.5, 3, 15, 3, 5, 1.2, 0)
        moved = cv2.remap(
            np.ascontiguousarray(before, dtype=np.float32),
            columns + flow[..., 0],
            rows + flow[..., 1],
            cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_REPLICATE,
        )
        total += float(np.abs(after - moved).mean())
    return total / (len(video) - 1)


@dataclass(frozen=True, slots=True, eq=False)
class Classifier:
    """Reads from the frames what a prompt asked for: labels are words, one output each.

    places: where the frame shows what a prompt puts `top left`, say: first and last row and column,
    in pixels, as (top, left, bottom, right). With places a label is looked for in its place only.
    """

    model: nn.Module
    labels: tuple[str, ...]
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    places: Mapping[str, tuple[int, int, int, int]] = field(default_factory=dict)

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        places: Mapping[str, tuple[int, int, int, int]] | None = None,
    ) -> "Classifier":
        """From `config.json` and `model.safetensors`; a timm architecture, nothing downloaded."""
        import timm
        from safetensors.torch import load_file

        folder = Path(folder)
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            if config["kind"] != "multilabel":
                raise AccelError(f"{folder}: kind is {config['kind']!r}; only 'multilabel' is read")
            model = timm.create_model(
                config["architecture"],
                pretrained=False,
                num_classes=config["num_classes"],
                in_chans=config["in_chans"],
            )
            model.load_state_dict(load_file(folder / "model.safetensors"))
            fields = {name: tuple(config[name]) for name in ("labels", "input_size", "mean", "std")}
        except (OSError, KeyError, ValueError, RuntimeError) as error:
            raise AccelError(f"classifier {str(folder)!r} cannot be loaded: {error!r}") from error
        return cls(model.eval(), **fields, places=places or {})

    @torch.inference_mode()
    def logits(self, video: Frames) -> Float[Tensor, "frames labels"]:
        frames = torch.from_numpy(np.ascontiguousarray(video)).float().permute(0, 3, 1, 2)
        size = self.input_size[1:]
        if frames.shape[2:] != size:
            frames = nn.functional.interpolate(frames, size, mode="bilinear", antialias=True)
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (self.mean, self.std))
        return self.model((frames - mean) / std)

    def named_in(self, prompt: str) -> set[str]:
        """The labels that occur in `prompt` as words."""
        return set(re.findall(r"\w+", prompt.lower())) & set(self.labels)

    def placed_in(self, prompt: str) -> list[tuple[str, str]]:
        """The labels that occur in `prompt` as words, each with the longest name of a place between
        it and the next label: `[("seven", "top left"), ("two", "right")]`. Labels without a place
        are left out.
        """
        labels = "|".join(self.labels)
        found = []
        for label, rest in re.findall(
            rf"\b({labels})\b(.*?)(?=\b(?:{labels})\b|$)", prompt.lower()
        ):
            named = [place for place in self.places if re.search(rf"\b{place}\b", rest)]
            if named:
                found.append((label, max(named, key=len)))
        return found

    def reads(self, video: Frames, prompt: str) -> float | None:
        """The share of what `prompt` asks for that is seen, by mean logits over the frames.

        With places: of the labels in their places, those that have the highest logit there. Else
        all or nothing: whether the k labels that the prompt names have the k highest logits. None
        where the prompt names no label.
        """
        if self.places:
            placed = self.placed_in(prompt)
            hits = [self._best(video, self.places[place], 1) == {label} for label, place in placed]
            return sum(hits) / len(hits) if hits else None
        named = self.named_in(prompt)
        if not named:
            return None
        return float(self._best(video, (0, 0, *video.shape[1:3]), len(named)) == named)

    def _best(self, video: Frames, place: tuple[int, int, int, int], count: int) -> set[str]:
        """The `count` labels with the highest mean logits in a part of the frames."""
        top, left, bottom, right = place
        logits = self.logits(video[:, top:bottom, left:right]).mean(0)
        return {self.labels[i] for i in logits.topk(count).indices.tolist()}


def _check_pair(a: Frames, b: Frames) -> None:
    if a.shape != b.shape:
        raise ValueError(f"the two videos differ in shape: {a.shape} and {b.shape}")


def import_cv2() -> ModuleType:
    """OpenCV, or the error that says how to get it."""
    try:
        import cv2
    except ImportError as error:
        raise AccelError(
            f"OpenCV is needed here, but cannot be imported ({error}); on a bare server"
            " install libgl1, or use the package opencv-python-headless"
        ) from error
    return cv2
