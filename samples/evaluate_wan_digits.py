"""Measure samples/models/wan-digits: are the prompted digits there, do they move as told, is
attention block-sparse?

    python samples/evaluate_wan_digits.py --videos 40 --guidance 3 5 8

Writes `evaluation.json` and `samples.png` into the model folder. All videos are dense runs. Given
several guidance scales, the best on ten other videos is taken. Finished videos are kept in a work
folder, so that the same command goes on where a killed one stopped.
"""

import argparse
import json
import statistics
from pathlib import Path

import numpy as np
import torch
from attention_recall import measured_recall
from diffusers import WanPipeline
from evaluating import kept_frames, median_seconds, weights_digest
from moving_digits import DIGIT_WORDS, MOTIONS, draw_scene, make_video, prompt_of
from torch import Tensor
from tqdm import tqdm
from wan_digits_model import build_scheduler

from accel.context import step
from accel.metrics import Classifier
from accel.pipelines.provenance import device_name

HERE = Path(__file__).parent
FIRST_EVALUATION_VIDEO = 1_000_000

__all__ = ["evaluation_prompts", "generate", "kept_video", "moves_as_told", "parse_prompt"]


def evaluation_prompts(count: int, two: float = 0.3) -> list[str]:
    """Prompts that go through the digits and motions in turn; a share `two` of them asks for two
    digits.
    """
    motions = [m for m in MOTIONS if m != "standing still"]
    prompts = []
    for i in range(count):
        first = f"{'an' if i % 10 == 8 else 'a'} {DIGIT_WORDS[i % 10]} {motions[(i + i // 10) % 4]}"
        other = (i + 3 + i // 10) % 10
        second = f"{'an' if other == 8 else 'a'} {DIGIT_WORDS[other]} {motions[(i + 1) % 4]}"
        prompts.append(f"{first} and {second}" if (i * two) % 1 + two >= 1 - 1e-9 else first)
    return prompts


def parse_prompt(prompt: str) -> list[tuple[int, str]]:
    """`a two moving right and a nine moving down` gives `[(2, "moving right"), (9, "moving
    down")]`.
    """
    parts = [part.split(" ", 2) for part in prompt.split(" and ")]
    return [(DIGIT_WORDS.index(word), motion) for _, word, motion in parts]


def generate(pipe: WanPipeline, prompt: str, seed: int, guidance: float, steps: int = 30) -> Tensor:
    """One dense video `[33, 3, 64, 64]` in [0, 1]."""
    frames = pipe(
        prompt,
        height=64,
        width=64,
        num_frames=33,
        num_inference_steps=steps,
        guidance_scale=guidance,
        max_sequence_length=64,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).frames[0]
    return torch.from_numpy(np.asarray(frames)).float().permute(0, 3, 1, 2)


def kept_video(
    pipe: WanPipeline, prompt: str, seed: int, guidance: float, steps: int, folder: Path
) -> Tensor:
    """`generate`, or the file that an earlier call with equal arguments kept in `folder`.

    The video has 8 bits per channel either way, so that a resumed evaluation equals a whole one.
    """

    def make() -> np.ndarray:
        return generate(pipe, prompt, seed, guidance, steps).permute(0, 2, 3, 1).numpy()

    found = kept_frames(folder, [prompt, seed, guidance, steps], make)
    return torch.from_numpy(found).permute(0, 3, 1, 2)


def moves_as_told(video: Tensor, motions: list[str]) -> tuple[bool, list[float]]:
    """Whether the bright pixels' centre moves within 45 degrees of the sum of the prompted
    directions.

    Digits are the only pixels bright in all three colours. Where the directions cancel, or the
    digit should stand still, the centre must stay within 5 pixels. Also returns the displacement
    (h, w) in pixels.
    """
    ink = (video.amin(1) - 0.66).clamp(min=0)  # [frames, h, w]
    place = torch.arange(64.0)
    weight = ink.sum((1, 2)).clamp(min=1e-6)
    centre = (
        torch.stack([(ink.sum(2) * place).sum(1), (ink.sum(1) * place).sum(1)], 1) / weight[:, None]
    )
    moved = centre[-5:].mean(0) - centre[:5].mean(0)
    told = torch.tensor([MOTIONS[m] for m in motions]).float().sum(0)
    if told.norm() == 0:
        return bool(moved.norm() < 5), moved.tolist()
    return bool(
        torch.cosine_similarity(moved, told, dim=0) > 0.7 and moved.norm() > 2
    ), moved.tolist()


def judge(
    pipe: WanPipeline,
    classifier: Classifier,
    prompts: list[str],
    guidance: float,
    steps: int,
    seed: int,
    folder: Path,
) -> dict:
    """Generate one video per prompt, or take it from `folder`, and judge it."""
    rows, shown = [], []
    for index, prompt in enumerate(tqdm(prompts, desc="videos", mininterval=10)):
        video = kept_video(pipe, prompt, seed + index, guidance, steps, folder)
        parsed = parse_prompt(prompt)
        agrees, moved = moves_as_told(video, [motion for _, motion in parsed])
        rows.append(
            {
                "prompt": prompt,
                "seed": seed + index,
                "digits": classifier.reads(video.permute(0, 2, 3, 1).numpy(), prompt),
                "motion": agrees,
                "moved_pixels": [round(m, 1) for m in moved],
            }
        )
        shown.append(video)
    return {"rows": rows, "videos": shown}


def best_guidance(
    pipe: WanPipeline,
    classifier: Classifier,
    scales: list[float],
    steps: int,
    seed: int,
    folder: Path,
) -> tuple[float, dict[str, float]]:
    """The scale with most digits and motions right on ten prompts, and the share of each scale."""
    trials = {}
    if len(scales) > 1:
        for scale in scales:
            judged = judge(
                pipe, classifier, evaluation_prompts(10), scale, steps, seed + 10_000, folder
            )
            shares = rates(judged["rows"])
            trials[f"{scale:g}"] = (2 * shares["all_digits_right"] + shares["all_motion_right"]) / 3
        return max(scales, key=lambda scale: trials[f"{scale:g}"]), trials
    return scales[0], trials


def rates(rows: list[dict]) -> dict[str, float]:
    """Shares of right digits and motions over all rows, and for one and two digits apart."""
    result = {}
    for name, chosen in (
        ("all", rows),
        ("one", [r for r in rows if " and " not in r["prompt"]]),
        ("two", [r for r in rows if " and " in r["prompt"]]),
    ):
        if chosen:
            result[f"{name}_videos"] = len(chosen)
            result[f"{name}_digits_right"] = round(statistics.fmean(r["digits"] for r in chosen), 4)
            result[f"{name}_motion_right"] = round(statistics.fmean(r["motion"] for r in chosen), 4)
    return result


def draw(videos: list[Tensor], prompts: list[str], path: Path) -> None:
    """A grid of prompts (rows) and frames (columns)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    times = [0, 6, 12, 18, 25, 32]
    figure, axes = plt.subplots(
        len(videos), len(times), figsize=(1.5 * len(times), 1.68 * len(videos)), squeeze=False
    )
    for row, video, prompt in zip(axes, videos, prompts, strict=True):
        for axis, t in zip(row, times, strict=True):
            axis.imshow(video[t].permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
            axis.axis("off")
        row[0].set_title(prompt, fontsize=8, loc="left")
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=80)
    plt.close(figure)


@torch.no_grad()
def vae_psnr(pipe: WanPipeline, seed: int, videos: int = 8) -> float:
    """Reconstruction PSNR in dB over videos that no stage was trained on (held-out scans, new
    textures).
    """
    pixels = torch.stack(
        [make_video(seed, FIRST_EVALUATION_VIDEO + i, split="held-out")[0] for i in range(videos)]
    )
    restored = pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mode()).sample
    return float(10 * torch.log10(4 / (restored - pixels).square().mean((1, 2, 3, 4))).mean())


@torch.no_grad()
def recall_on_real(
    pipe: WanPipeline, seed: int, sigmas: tuple[float, ...] = (0.8, 0.6), videos: int = 1
) -> list:
    """Recall per layer and head on noised latents of real held-out videos."""
    mean, std = (
        torch.tensor(v).view(1, -1, 1, 1, 1)
        for v in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
    )
    with measured_recall(pipe.transformer) as recalls:
        for index in range(FIRST_EVALUATION_VIDEO, FIRST_EVALUATION_VIDEO + videos):
            scene = draw_scene(seed, index, split="held-out")
            pixels = make_video(seed, index, split="held-out")[0][None]
            clean = (pipe.vae.encode(pixels).latent_dist.mode() - mean) / std
            embeds, _ = pipe.encode_prompt(
                prompt_of(scene), do_classifier_free_guidance=False, max_sequence_length=64
            )
            noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(index))
            for number, sigma in enumerate(sigmas):
                with step(number, len(sigmas)):
                    pipe.transformer(
                        (1 - sigma) * clean + sigma * noise, torch.tensor([1000 * sigma]), embeds
                    )
    return recalls.best()


def recall_on_generated(
    pipe: WanPipeline, prompt: str, seed: int, guidance: float, steps: int = 30
) -> list:
    """Recall per layer and head at the middle denoising step of a generation, both branches."""
    with measured_recall(pipe) as recalls:
        recalls.record = False

        def switch(_pipe: WanPipeline, step: int, _timestep: Tensor, kwargs: dict) -> dict:
            recalls.record = step + 1 == steps // 2
            return kwargs

        pipe(
            prompt,
            height=64,
            width=64,
            num_frames=33,
            num_inference_steps=steps,
            guidance_scale=guidance,
            max_sequence_length=64,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
            callback_on_step_end=switch,
        )
    return recalls.best()


@torch.no_grad()
def timings(pipe: WanPipeline) -> dict[str, float]:
    """Median seconds of one dense forward, of decoding a video and of embedding prompts."""
    latents = torch.randn(1, 8, 17, 16, 16)
    embeds, _ = pipe.encode_prompt("a seven moving left", max_sequence_length=64)
    forward = median_seconds(lambda: pipe.transformer(latents, torch.tensor([500.0]), embeds))
    decode = median_seconds(lambda: pipe.vae.decode(latents))
    text = median_seconds(lambda: pipe.encode_prompt("a seven moving left", max_sequence_length=64))
    return {
        "forward_seconds": round(forward, 3),
        "decode_seconds": round(decode, 3),
        "text_seconds": round(text, 4),
        "vae_and_text_share_of_run": round((decode + text) / (60 * forward + decode + text), 4),
    }


def main(
    model: Path,
    classifier: Path,
    videos: int,
    guidance: list[float],
    scheduler: str | None,
    steps: int,
    seed: int,
    out: Path,
    work: Path,
) -> None:
    torch.set_num_threads(min(2, torch.get_num_threads()))
    pipe = WanPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    if scheduler:
        pipe.scheduler = build_scheduler(scheduler)
    out.mkdir(parents=True, exist_ok=True)
    kept = work / weights_digest(pipe, ("text_encoder", "transformer", "vae"))
    judges = Classifier.load(classifier)
    guidance, trials = best_guidance(pipe, judges, guidance, steps, seed, kept)
    result = {
        "guidance": guidance,
        "guidance_trials": trials,
        "scheduler": type(pipe.scheduler).__name__,
        "device": device_name(torch.device("cpu")),
        "steps": steps,
        "vae_psnr_db": round(vae_psnr(pipe, seed), 2),
        **timings(pipe),
        "recall_real": recall_on_real(pipe, seed),
        "recall_generated": recall_on_generated(pipe, "a seven moving left", seed, guidance, steps),
    }
    for key in ("recall_real", "recall_generated"):
        result[f"{key}_mean"] = round(
            statistics.fmean(value for layer in result[key] for value, _ in layer), 4
        )
    print(json.dumps(result))
    prompts = evaluation_prompts(videos)
    judged = judge(pipe, judges, prompts, guidance, steps, seed, kept)
    result |= {"rates": rates(judged["rows"]), "rows": judged["rows"]}
    print(json.dumps(result["rates"]))
    (out / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(judged["videos"][:12], prompts[:12], out / "samples.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=HERE / "models" / "wan-digits")
    parser.add_argument("--classifier", type=Path, default=HERE / "models" / "digit-classifier")
    parser.add_argument("--videos", type=int, default=40)
    parser.add_argument("--guidance", type=float, nargs="+", default=[4.0])
    parser.add_argument(
        "--scheduler", choices=("euler", "unipc"), default=None, help="instead of the saved one"
    )
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "models" / "wan-digits")
    parser.add_argument("--work", type=Path, default=HERE / ".work" / "evaluation")
    main(**vars(parser.parse_args()))
