"""Train a connectivity predictor for a vision transformer of timm: which blocks will hold the mass?

    python samples/train_connectivity.py --model vit_small_patch16_224 --pretrained --size 1024

Distils the block mass of the model's own dense attention; the model is not changed. Writes a plan
(`--out`), and prints which share of the mass the kept blocks hold on images that were not trained
on, beside the product of block means, which is not trained, and the best that can be kept. Images
are those of a folder, or frames of moving digits.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from moving_digits import make_video
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from accel.estimators import BlockMassTopK, Estimator, Pooled
from accel.kernels.block_mass import block_mass
from accel.pipelines.connectivity_training import calls_of, train_connectivity
from accel.plan import Plan
from accel.ranking import recall_of

__all__ = ["batches_of", "recalls"]

HELD_OUT = 4  # batches


def batches_of(
    model: nn.Module, folder: Path | None, size: int, batch: int, first: int, count: int
) -> Iterator[Tensor]:
    """`count` batches of images as the model takes them, from image `first` on."""
    settings = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(settings[name]).view(3, 1, 1) for name in ("mean", "std"))
    files = [] if folder is None else sorted(p for p in folder.rglob("*.*") if p.is_file())
    transform = timm.data.create_transform(**{**settings, "input_size": (3, size, size)})
    for number in range(count):
        images = []
        for index in range(first + number * batch, first + (number + 1) * batch):
            if files:
                images.append(transform(Image.open(files[index % len(files)]).convert("RGB")))
            else:
                video, _ = make_video(0, index)
                frame = (video[:, index % video.shape[1]] + 1) / 2
                frame = F.interpolate(frame[None], (size, size), mode="bicubic")[0]
                images.append((frame.clamp(0, 1) - mean) / std)
        yield torch.stack(images)


def recalls(model: nn.Module, batches: list[Tensor], plan: Plan, keep: float) -> dict[str, float]:
    """Share of the mass in kept blocks, in the mean over sites, heads and images."""
    order = next(iter(plan.sites.values()))[0][0].order
    found: dict[str, list[float]] = {"connectivity": [], "means": [], "best": []}
    for images in batches:
        calls = calls_of(model, images, order, plan.block)
        for call, bands in zip(calls, plan.sites.values(), strict=True):
            mass, _ = block_mass(
                call.q, call.k, block=plan.block, scale=call.scale, order=call.order
            )
            trained = bands[0][0].select
            assert isinstance(trained, Estimator)
            for name, estimator in (
                ("connectivity", trained),
                ("means", Pooled(keep=keep, value_bias=False)),
                ("best", BlockMassTopK(keep=keep)),
            ):
                selection = estimator.select_in(call)
                found[name].append(float(recall_of(mass, selection.keep).mean()))
    return {name: sum(values) / len(values) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a name of timm, or local-dir:FOLDER")
    parser.add_argument("--pretrained", action="store_true", help="with its weights")
    parser.add_argument("--size", type=int, default=1024, help="side of the images, pixels")
    parser.add_argument("--images", type=Path, help="folder; moving digits without it")
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--batch", type=int, default=2, help="images of one")
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--block", type=int, nargs=2, default=(64, 64))
    parser.add_argument("--rank", type=int, help="as many as channels without it")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("connectivity.json"))
    asked = parser.parse_args()
    torch.manual_seed(asked.seed)
    model = timm.create_model(asked.model, pretrained=asked.pretrained, img_size=asked.size).eval()
    source = (model, asked.images, asked.size, asked.batch)
    batches = tqdm(batches_of(*source, 0, asked.batches), total=asked.batches)
    made = train_connectivity(
        model,
        iter(batches),
        keep=asked.keep,
        block=tuple(asked.block),
        rank=asked.rank,
        lr=asked.lr,
        seed=asked.seed,
    )
    held_out = list(batches_of(*source, asked.batches * asked.batch, HELD_OUT))
    for name, share in recalls(model, held_out, made.plan, asked.keep).items():
        print(f"{name:14}{share:.4f} of the mass in {asked.keep} of the blocks")
    print(f"divergence {made.losses[0]:.4f} -> {made.losses[-1]:.4f} nats; {asked.out}")
    made.plan.save(asked.out)


if __name__ == "__main__":
    main()
