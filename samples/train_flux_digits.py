"""Train `samples/models/flux-digits`: a small text-to-image pipeline that
`FluxPipeline.from_pretrained` loads.

    python samples/train_flux_digits.py --minutes 62 --seed 0 --bfloat16

A length in minutes suits any machine; `--steps` gives the same weights again on the same one.

Two stages, each resumed where it stopped when the command is given again with --resume: the
autoencoder, and the denoiser with its text encoders. Two CPU cores are enough.
"""

import argparse
import copy
from pathlib import Path

import torch
from flux_digits_denoiser import (
    Canvases,
    FluxDenoiserSettings,
    draw_canvases,
    flux_denoiser_step,
    places_of_tokens,
)
from flux_digits_model import (
    TEXT_TOKENS,
    build_clip,
    build_clip_tokenizer,
    build_t5,
    build_t5_tokenizer,
    build_transformer,
    build_vae,
    export,
)
from flux_digits_vae import FluxVaeSettings, train_flux_vae
from training import Length, Run, save_atomically

HERE = Path(__file__).parent
FIRST_TRAINING_IMAGE = (
    10_000  # indices below are the autoencoder's, those above a million are for evaluation
)


def training_canvases(run: Run, images: int) -> Canvases:
    """Draw the training images once; their prompts as token ids of both text encoders."""
    path = run.folder / f"canvases-{run.seed}-{images}.pt"
    if not path.exists():
        save_atomically(draw_canvases(run.seed, FIRST_TRAINING_IMAGE, images), path)
    drawn = torch.load(path, weights_only=True)
    prompts = [*drawn.pop("prompts"), ""]
    t5_ids, clip_ids = (
        tokenizer(
            prompts,
            padding="max_length",
            max_length=TEXT_TOKENS,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        for tokenizer in (build_t5_tokenizer(), build_clip_tokenizer())
    )
    t5_places = places_of_tokens(prompts, TEXT_TOKENS)
    return Canvases(**drawn, t5_ids=t5_ids, clip_ids=clip_ids, t5_places=t5_places)


def main(
    minutes: float,
    steps: list[int] | None,
    seed: int,
    out: Path,
    work: Path,
    images: int,
    bfloat16: bool,
    resume: bool,
) -> None:
    """Run the stages: 5% of the time for the autoencoder, the rest for the denoiser."""
    torch.set_num_threads(min(2, torch.get_num_threads()))
    work.mkdir(parents=True, exist_ok=True)
    if not resume and any(work.glob("*.pt")):
        raise SystemExit(
            f"{work} holds an earlier run: give --resume to go on with it, or another --work"
        )
    run = Run(work, seed)
    vae_length, denoiser_length = (
        Length(minutes * share, count)
        for share, count in zip((0.05, 0.95), steps or (None, None), strict=True)
    )
    torch.manual_seed(seed)
    vae = build_vae()
    print("autoencoder:", train_flux_vae(run, vae, FluxVaeSettings(length=vae_length)))
    cache = training_canvases(run, images)
    torch.manual_seed(seed + 1)
    models = {
        "transformer": build_transformer(),
        "t5": build_t5(build_t5_tokenizer()),
        "clip": build_clip(build_clip_tokenizer()),
    }
    kept = {name: copy.deepcopy(model) for name, model in models.items()}
    settings = FluxDenoiserSettings(bfloat16=bfloat16)
    step, parts = flux_denoiser_step(**models, cache=cache, settings=settings, seed=seed)

    def after_checkpoint(progress: float) -> None:
        for name, weights in parts["average"].weights.items():
            kept[name].load_state_dict(weights)
        export(out, vae, **kept)
        run.log(stage="export", progress=progress)

    print(
        "denoiser:",
        run.stage("denoiser", denoiser_length, parts, step, after_checkpoint=after_checkpoint),
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--minutes", type=float, default=62.0, help="training time, shared out among the stages"
    )
    parser.add_argument(
        "--steps",
        type=int,
        nargs=2,
        metavar=("VAE", "DENOISER"),
        help="steps of the stages, instead of minutes",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "models" / "flux-digits")
    parser.add_argument("--work", type=Path, default=HERE / ".work" / "flux-digits")
    parser.add_argument("--images", type=int, default=8000, help="images drawn for training")
    parser.add_argument(
        "--bfloat16", action="store_true", help="autocast: faster where the CPU has AMX"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the checkpoints in --work"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main(**vars(_arguments()))
