"""Measure samples/models/flux-digits: is every prompted digit in its place, and nothing elsewhere?

    python samples/evaluate_flux_digits.py --images 64
    python samples/evaluate_flux_digits.py --images 64 --plan samples/plans/flux-digits.json

Writes `evaluation.json` and `samples.png` into the model folder; with a plan, what images lose by
it goes into the work folder. Given several guidance scales, the best on eight other prompts is
taken. Finished images are kept in the work folder, so that the same command goes on where a killed
one stopped.
"""

import argparse
import io
import json
import statistics
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxPipeline
from evaluating import kept_frames, median_seconds, weights_digest
from flux_digits_model import TEXT_TOKENS
from moving_digits import DIGIT_WORDS
from PIL import Image
from placed_digits import (
    CANVAS,
    PLACES,
    draw_placed_scene,
    make_image,
    parse_placed_prompt,
    placed_prompt,
    prompt_of_placed,
    render_placed,
    window_of,
)
from tqdm import tqdm

from accel.metrics import Classifier, capped, psnr
from accel.pipelines.enable import enabled
from accel.pipelines.provenance import device_name
from accel.plan import Plan

HERE = Path(__file__).parent
FIRST_EVALUATION_IMAGE = 1_000_000
COUNTS = (2, 3, 4, 3, 4)  # digits of the prompts, in turn

__all__ = ["digits_read", "generate", "placed_evaluation_prompts", "rates"]


def placed_evaluation_prompts(count: int, seed: int = 0) -> list[str]:
    """Prompts of two to four digits at random places, in reading order."""
    prompts = []
    for index in range(count):
        rng = np.random.default_rng([seed, FIRST_EVALUATION_IMAGE + index])
        places = sorted(rng.choice(len(PLACES), COUNTS[index % len(COUNTS)], replace=False))
        prompts.append(placed_prompt([(int(rng.integers(10)), [*PLACES][p]) for p in places]))
    return prompts


def generate(pipe: FluxPipeline, prompt: str, seed: int, guidance: float, steps: int) -> np.ndarray:
    """One dense image `[1, 256, 256, 3]` in [0, 1]."""
    return pipe(
        prompt,
        height=CANVAS,
        width=CANVAS,
        num_inference_steps=steps,
        true_cfg_scale=guidance,
        negative_prompt="",
        max_sequence_length=TEXT_TOKENS,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).images


def digits_read(judge: Classifier, image: np.ndarray, prompt: str) -> list[dict]:
    """Of every place: the digit asked for or None, the one that reads best, and the share that it
    has by its logit.
    """
    asked = {place: digit for digit, place in parse_placed_prompt(prompt)}
    rows = []
    for place in PLACES:
        top, left, bottom, right = window_of(place)
        logits = judge.logits(image[:, top:bottom, left:right])[0]
        sure = round(logits.max().sigmoid().item(), 3)
        rows.append(
            {"place": place, "asked": asked.get(place), "read": int(logits.argmax()), "sure": sure}
        )
    return rows


def rates(rows: list[dict]) -> dict[str, float]:
    """Over all images: the share of asked digits that are read, of images with all of them right,
    and of places left empty that show no digit (no logit above zero).
    """
    asked = [[p for p in row["places"] if p["asked"] is not None] for row in rows]
    empty = [p for row in rows for p in row["places"] if p["asked"] is None]
    right = [[p["read"] == p["asked"] for p in places] for places in asked]
    return {
        "images": len(rows),
        "digits": sum(map(len, right)),
        "digits_right": round(statistics.fmean(hit for hits in right for hit in hits), 4),
        "images_all_right": round(statistics.fmean(all(hits) for hits in right), 4),
        "empty_places": len(empty),
        "empty_places_right": round(statistics.fmean(p["sure"] < 0.5 for p in empty), 4),
    }


def judge_generated(
    pipe: FluxPipeline,
    judge: Classifier,
    prompts: list[str],
    guidance: float,
    steps: int,
    seed: int,
    folder: Path,
) -> tuple[list[dict], list[np.ndarray]]:
    """Generate one image per prompt, or take it from `folder`, and read it."""
    rows, images = [], []
    for index, prompt in enumerate(tqdm(prompts, desc="images", mininterval=10)):
        words = (prompt, seed + index, guidance, steps)
        image = kept_frames(folder, words, lambda words=words: generate(pipe, *words))
        rows.append(
            {"prompt": prompt, "seed": seed + index, "places": digits_read(judge, image, prompt)}
        )
        images.append(image)
    return rows, images


def judge_real(judge: Classifier, seed: int, images: int) -> dict[str, float]:
    """What the same judge gives real images with held-out scans: the most to be expected."""
    rows = []
    for index in range(FIRST_EVALUATION_IMAGE, FIRST_EVALUATION_IMAGE + images):
        scene = draw_placed_scene(seed, index, split="held-out")
        image = render_placed(scene, split="held-out").permute(1, 2, 0)[None] / 2 + 0.5
        rows.append({"places": digits_read(judge, image.numpy(), prompt_of_placed(scene))})
    return rates(rows)


def compare_with_dense(
    pipe: FluxPipeline,
    judge: Classifier,
    plan: Path,
    images: int,
    guidance: float,
    steps: int,
    seed: int,
    kept: Path,
) -> None:
    """The rates of dense images and of those with a plan, and the PSNR between them in dB."""
    prompts = placed_evaluation_prompts(images, seed)
    arms: dict[str, tuple[list[dict], list[np.ndarray]]] = {}
    arms["dense"] = judge_generated(pipe, judge, prompts, guidance, steps, seed, kept)
    loaded = Plan.load(plan)
    folder = kept / loaded.digest[:16]
    with enabled(pipe, loaded):
        arms["plan"] = judge_generated(pipe, judge, prompts, guidance, steps, seed, folder)
    errors = [capped(psnr(a, b)) for a, b in zip(arms["dense"][1], arms["plan"][1], strict=True)]
    result = {
        "plan": loaded.name,
        "digest": loaded.digest,
        "device": device_name(torch.device("cpu")),
        "psnr_db": {"mean": round(statistics.fmean(errors), 2), "worst": round(min(errors), 2)},
        **{name: rates(rows) for name, (rows, _) in arms.items()},
    }
    print(json.dumps(result, indent=1))
    (kept / f"{loaded.name}.json").write_text(json.dumps(result, indent=1) + "\n")


@torch.no_grad()
def vae_psnr(pipe: FluxPipeline, seed: int, images: int = 8) -> float:
    """Reconstruction PSNR in dB over images that no stage was trained on (held-out scans, new
    textures).
    """
    pixels = torch.stack(
        [make_image(seed, FIRST_EVALUATION_IMAGE + i, split="held-out")[0] for i in range(images)]
    )
    restored = pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mode()).sample
    return float(10 * torch.log10(4 / (restored - pixels).square().mean((1, 2, 3))).mean())


def timings(pipe: FluxPipeline, steps: int) -> dict[str, float]:
    """Median seconds of one dense forward, of decoding an image and of embedding prompts."""
    embeds, pooled, text_ids = pipe.encode_prompt("a seven top", max_sequence_length=TEXT_TOKENS)
    side = CANVAS // 4
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1).float()

    @torch.no_grad()
    def forward() -> None:
        pipe.transformer(
            torch.randn(1, side * side, pipe.transformer.config.in_channels),
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            timestep=torch.tensor([0.5]),
            img_ids=places,
            txt_ids=text_ids,
        )

    @torch.no_grad()
    def decode() -> None:
        pipe.vae.decode(torch.randn(1, 3, CANVAS // 2, CANVAS // 2))

    one, decoded = median_seconds(forward), median_seconds(decode)
    text = median_seconds(lambda: pipe.encode_prompt("a seven", max_sequence_length=TEXT_TOKENS))
    rest = decoded + 2 * text
    return {
        "forward_seconds": round(one, 3),
        "decode_seconds": round(decoded, 3),
        "text_seconds": round(text, 4),
        "vae_and_text_share_of_run": round(rest / (2 * steps * one + rest), 4),
    }


def draw(images: list[np.ndarray], prompts: list[str], path: Path) -> None:
    """Three rows of four images under their prompts, in 128 colours: noise makes large files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(3, 4, figsize=(13, 10.6))
    for axis, image, prompt in zip(axes.flat, images, prompts, strict=False):
        axis.imshow(image[0].clip(0, 1), interpolation="nearest")
        words = prompt.split(" and ")
        lines = [" and ".join(words[i : i + 2]) for i in range(0, len(words), 2)]
        axis.set_title(" and\n".join(lines), fontsize=8, loc="left")
    for axis in axes.flat:
        axis.axis("off")
    figure.tight_layout(pad=0.4)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=75)
    plt.close(figure)
    Image.open(picture).convert("RGB").quantize(128).save(path, optimize=True)


def main(
    model: Path,
    classifier: Path,
    images: int,
    guidance: list[float],
    steps: int,
    seed: int,
    out: Path,
    work: Path,
    plan: Path | None,
) -> None:
    torch.set_num_threads(min(2, torch.get_num_threads()))
    pipe = FluxPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    out.mkdir(parents=True, exist_ok=True)
    kept = work / weights_digest(pipe, ("text_encoder", "text_encoder_2", "transformer", "vae"))
    judge = Classifier.load(classifier)
    if plan is not None:
        compare_with_dense(pipe, judge, plan, images, guidance[0], steps, seed, kept)
        return
    trials: dict[str, float] = {}
    for scale in guidance if len(guidance) > 1 else ():
        prompts = placed_evaluation_prompts(8, seed + 1)
        rows, _ = judge_generated(pipe, judge, prompts, scale, steps, seed + 10_000, kept)
        trials[f"{scale:g}"] = rates(rows)["digits_right"]
        print(f"guidance {scale:g}: {rates(rows)}")
    chosen = max(guidance, key=lambda scale: trials.get(f"{scale:g}", 0.0))
    prompts = placed_evaluation_prompts(images, seed)
    rows, made = judge_generated(pipe, judge, prompts, chosen, steps, seed, kept)
    result = {
        "guidance": chosen,
        "guidance_trials": trials,
        "scheduler": type(pipe.scheduler).__name__,
        "device": device_name(torch.device("cpu")),
        "steps": steps,
        "vae_psnr_db": round(vae_psnr(pipe, seed), 2),
        **timings(pipe, steps),
        "rates": rates(rows),
        "real_rates": judge_real(judge, seed, 100),
        "rows": [
            {**row, "places": [p for p in row["places"] if p["asked"] is not None]} for row in rows
        ],
    }
    wrong = {f"{a}": 0 for a in DIGIT_WORDS}
    for row in rows:
        for place in row["places"]:
            if place["asked"] is not None and place["asked"] != place["read"]:
                wrong[DIGIT_WORDS[place["asked"]]] += 1
    result["wrong_by_digit"] = wrong
    print(json.dumps({k: v for k, v in result.items() if k != "rows"}))
    (out / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(made[:12], prompts[:12], out / "samples.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=HERE / "models" / "flux-digits")
    parser.add_argument("--classifier", type=Path, default=HERE / "models" / "digit-classifier")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--guidance", type=float, nargs="+", default=[3.0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "models" / "flux-digits")
    parser.add_argument("--work", type=Path, default=HERE / ".work" / "flux-evaluation")
    parser.add_argument("--plan", type=Path, help="compare images with this plan with dense ones")
    main(**vars(parser.parse_args()))
