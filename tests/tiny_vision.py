"""Tiny vision models and images, with classes that colours tell."""

import json

import numpy as np
import torch
from PIL import Image

from accel.pipelines.vision import VisionConfig, VisionPipeline

SWIN = "swin_tiny_patch4_window7_224"
VIT = "vit_tiny_patch16_224"
CLASSES = ("nothing", "red", "green", "blue", "grey")
SWIN_ARGS = {
    "img_size": (32, 48),
    "window_size": 4,
    "embed_dim": 8,
    "depths": (2, 1, 1, 1),
    "num_heads": (1, 2, 2, 4),
}
VIT_ARGS = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


def swin(*, task="segmentation", size=(32, 48), **changes):
    torch.manual_seed(5)
    args = {**SWIN_ARGS, **changes}
    config = VisionConfig(SWIN, CLASSES, task, args, size=size, head_width=12)
    return _spread(VisionPipeline.create(config))


def vit(*, size=(32, 48), **changes):
    torch.manual_seed(6)
    config = VisionConfig(VIT, CLASSES, "classification", {**VIT_ARGS, **changes}, size=size)
    return _spread(VisionPipeline.create(config))


def _spread(pipe):
    """Weights with which images differ in their classes."""
    for name, weight in pipe.model.named_parameters():
        if weight.ndim > 1 and "token" not in name:
            torch.nn.init.normal_(weight, std=0.1)
    last = pipe.model.classify if hasattr(pipe.model, "classify") else pipe.model.head
    logits = pipe(images(8, *pipe.size), output_type="logits").logits
    with torch.no_grad():  # no class is the most likely one everywhere
        last.bias -= logits.transpose(0, 1).flatten(1).mean(1)
    return pipe


def images(count, height=32, width=48, seed=0):
    """[count, 3, height, width], uint8: coarse coloured patches."""
    drawn = np.random.default_rng(seed).integers(0, 256, (count, 3, height // 8, width // 8))
    return torch.from_numpy(drawn.astype(np.uint8).repeat(8, 2).repeat(8, 3))


def tiny_vision_path(folder, name="swin", **changes):
    """The folder of a tiny model with test and calibration images of what it nearly finds."""
    pipe = {"swin": swin, "vit": vit}[name](**changes)
    pipe.save_pretrained(folder)
    for part, count, seed in (("test", 6, 1), ("calibration", 2, 2)):
        pixels = images(count, seed=seed)
        labels = pipe(pixels).labels.numpy().astype(np.uint8)
        (folder / part).mkdir()
        for number, one in enumerate(pixels):
            picture = Image.fromarray(one.permute(1, 2, 0).numpy())
            picture.save(folder / part / f"{number:03d}.png")
        if name == "vit":
            words = {f"{n:03d}": CLASSES[(label + (n == 1)) % 5] for n, label in enumerate(labels)}
            (folder / part / "labels.json").write_text(json.dumps(words))
            continue
        labels[:, :8] = 255  # which nobody asks for
        labels[:, 8:12] = (labels[:, 8:12] + 1) % 5
        for number, one in enumerate(labels):
            Image.fromarray(one).save(folder / part / f"{number:03d}-classes.png")
    return str(folder)


def tiny_vision_config(path, batch_size=2):
    return {
        "name": "tiny-vision",
        "pipeline": "accel.pipelines.vision.VisionPipeline",
        "path": path,
        "output": "vision",
        "call": {"batch_size": batch_size},
        "device": "cpu",
        "images": f"{path}/test",
        "calibration_images": f"{path}/calibration",
    }
