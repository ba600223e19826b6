"""Train `samples/models/digit-classifier`: which digits are visible in a 64x64 frame.

    python samples/train_digit_classifier.py --minutes 6 --seed 0

It judges the videos of wan-digits and takes no part in making them. Scans are split: the accuracy
in its config is measured on scans that it never saw.
"""

import argparse
import json
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from moving_digits import DIGIT_WORDS, draw_scene, prompt_of, render
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from training import Length, Run

from accel.metrics import Classifier

HERE = Path(__file__).parent
ARCHITECTURE = "test_resnet"
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
FRAMES_PER_VIDEO = 3


def _logits(model: nn.Module, frames: Tensor) -> Tensor:
    """Logits `[n, 10]` of frames `[n, 3, h, w]` in [0, 1]."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    return model((frames - mean) / std)


def _frames(seed: int, first: int, videos: int, split: str) -> tuple[Tensor, Tensor]:
    """Frames `[videos * 3, 3, 64, 64]` as bytes and multi-label targets `[videos * 3, 10]`."""
    pictures, targets = [], []
    for index in tqdm(range(first, first + videos), desc=f"render {split}", mininterval=10):
        scene = draw_scene(seed, index, split=split)
        times = torch.randperm(33, generator=torch.Generator().manual_seed(index))[
            :FRAMES_PER_VIDEO
        ]
        pictures.append(
            ((render(scene, split=split)[:, times].transpose(0, 1) + 1) * 127.5)
            .round()
            .to(torch.uint8)
        )
        target = torch.zeros(10)
        target[[actor.digit for actor in scene.actors]] = 1
        targets += [target] * FRAMES_PER_VIDEO
    return torch.cat(pictures), torch.stack(targets)


def _disturbed(frames: Tensor, random: torch.Generator) -> Tensor:
    """Brightness, blur and noise, so that decoded and generated frames are no surprise."""
    frames = frames * (0.85 + 0.3 * torch.rand(len(frames), 1, 1, 1, generator=random))
    blurred = F.interpolate(F.avg_pool2d(frames, 2), scale_factor=2, mode="bilinear")
    amount = torch.rand(len(frames), 1, 1, 1, generator=random)
    frames = frames.lerp(blurred, amount)
    return (frames + 0.05 * amount * torch.randn(frames.shape, generator=random)).clamp(0, 1)


@torch.no_grad()
def _accuracy(model: nn.Module, frames: Tensor, targets: Tensor) -> float:
    """Share of frames whose highest logits are exactly the digits that are shown."""
    model.eval()
    logits = torch.cat([_logits(model, part.float() / 255) for part in frames.split(256)])
    hits = [
        set(l.topk(int(t.sum())).indices.tolist()) == set(t.nonzero()[:, 0].tolist())
        for l, t in zip(logits, targets, strict=True)
    ]
    model.train()
    return sum(hits) / len(hits)


def _video_accuracy(judge: Classifier, seed: int, videos: int) -> float:
    """Share of held-out videos of which every prompted digit is read: what this judge gives real
    videos, and so the most that generated ones can be expected to get.
    """
    hits = []
    for index in tqdm(range(4_000_000, 4_000_000 + videos), desc="videos", mininterval=10):
        scene = draw_scene(seed, index, split="held-out")
        video = render(scene, split="held-out").permute(1, 2, 3, 0) / 2 + 0.5
        hits.append(judge.reads(video.numpy(), prompt_of(scene)))
    return sum(hits) / len(hits)


def main(minutes: float, seed: int, out: Path, work: Path, videos: int) -> None:
    """Train, measure on held-out scans, save."""
    torch.set_num_threads(min(2, torch.get_num_threads()))
    torch.manual_seed(seed)
    work.mkdir(parents=True, exist_ok=True)
    model = timm.create_model(ARCHITECTURE, num_classes=10, in_chans=3)
    frames, targets = _frames(seed, 3_000_000, videos, "train")
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.02)

    def step(index: int, progress: float) -> dict[str, float]:
        optimiser.param_groups[0]["lr"] = 3e-3 * min(
            1.0, (index + 1) / 50, 1.5 * (1 - progress) + 0.01
        )
        random = torch.Generator().manual_seed(seed * 1_000_003 + index)
        pick = torch.randint(len(frames), (64,), generator=random)
        logits = _logits(model, _disturbed(frames[pick].float() / 255, random))
        loss = F.binary_cross_entropy_with_logits(logits, targets[pick])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        return {"loss": loss.item()}

    done = Run(work, seed).stage(
        "classifier", Length(minutes), {"model": model, "optimiser": optimiser}, step
    )
    held_out = _frames(seed, 4_000_000, 200, "held-out")
    accuracy = _accuracy(model, *held_out)
    judge = Classifier(model.eval(), DIGIT_WORDS, (3, 64, 64), MEAN, STD)
    of_videos = _video_accuracy(judge, seed, 200)
    print(f"{done}, held-out accuracy: frames {accuracy:.3f}, videos {of_videos:.3f}")
    out.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), out / "model.safetensors")
    config = {
        "architecture": ARCHITECTURE,
        "num_classes": 10,
        "in_chans": 3,
        "input_size": [3, 64, 64],
        "labels": list(DIGIT_WORDS),
        "mean": list(MEAN),
        "std": list(STD),
        "kind": "multilabel",
        "held_out_frame_accuracy": round(accuracy, 4),
        "held_out_video_accuracy": round(of_videos, 4),
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "models" / "digit-classifier")
    parser.add_argument("--work", type=Path, default=HERE / ".work" / "digit-classifier")
    parser.add_argument("--videos", type=int, default=6000)
    main(**vars(parser.parse_args()))
