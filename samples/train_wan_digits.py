"""Train `samples/models/wan-digits`: a small text-to-video pipeline that
`WanPipeline.from_pretrained` loads.

    python samples/train_wan_digits.py --minutes 85 --seed 0

A length in minutes suits any machine; `--steps` gives the same weights again on the same one.
`--start FOLDER --begin 0.3` goes on from a pipeline that was trained before: its autoencoder is
taken as it is, and its denoiser skips that part of its stage: single frames, for example.

Four stages, each resumed where it stopped when the command is given again with --resume: the
autoencoder, the cache of encoded videos, the denoiser with its text encoder, and the decoder once
more on whole videos. Two CPU cores are enough.
"""

import argparse
import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from training import Length, Run, save_atomically
from transformers import UMT5EncoderModel
from wan_digits_denoiser import DenoiserSettings, Latents, denoiser_step
from wan_digits_model import build_text_encoder, build_tokenizer, build_transformer, export
from wan_digits_vae import VaeSettings, build_vae, encode_videos, refine_decoder, train_vae

from accel.files import write_atomically

HERE = Path(__file__).parent
FIRST_TRAINING_VIDEO = (
    10_000  # indices below are the autoencoder's, those above a million are for evaluation
)


def trained_vae(run: Run, length: Length, start: Path | None) -> AutoencoderKLWan:
    """The autoencoder with the mean and deviation of its latents in the config; that of `start` as
    it is.

    Once these are measured it is settled: cached latents depend on it, so a resumed run does not
    train it further.
    """
    if start is not None:
        given = AutoencoderKLWan.from_pretrained(start, subfolder="vae")
        vae = build_vae(given.config.latents_mean, given.config.latents_std)
        vae.load_state_dict(given.state_dict())
        return vae.eval()  # a new one: `given` would write into its config where it came from
    torch.manual_seed(run.seed)
    vae = build_vae()
    path = run.folder / "latent-statistics.json"
    if not path.exists():
        print("autoencoder:", train_vae(run, vae, VaeSettings(length=length)))
        sample = encode_videos(vae.eval(), run.seed, FIRST_TRAINING_VIDEO, 64)["latents"].float()
        mean, std = sample.mean((0, 2, 3, 4)), sample.std((0, 2, 3, 4))
        write_atomically(path, json.dumps({"mean": mean.tolist(), "std": std.tolist()}))
    result = build_vae(**json.loads(path.read_text()))
    result.load_state_dict(torch.load(run.folder / "vae.pt", weights_only=True)["vae"])
    return result.eval()


def cached_latents(run: Run, vae: AutoencoderKLWan, videos: int, two: float) -> Latents:
    """Encode the training videos once; normalised as the pipeline normalises them."""
    weights = b"".join(w.numpy().tobytes() for w in vae.encoder.state_dict().values())
    by = hashlib.sha256(weights).hexdigest()[:8]
    path = run.folder / f"latents-{run.seed}-{videos}-{two:g}-{by}.pt"
    if not path.exists():
        encoded = encode_videos(vae, run.seed, FIRST_TRAINING_VIDEO, videos, two=two)
        save_atomically(encoded, path)
    cache = torch.load(path, weights_only=True)
    mean, std = (
        torch.tensor(v).view(1, -1, 1, 1, 1)
        for v in (vae.config.latents_mean, vae.config.latents_std)
    )
    tokenizer = build_tokenizer()
    tokens = tokenizer(cache["prompts"], padding=True, return_tensors="pt")
    return Latents(
        latents=((cache["latents"].float() - mean) / std).half(),
        digits=cache["digits"],
        inside=cache["inside"],
        ids=tokens.input_ids,
        lengths=tokens.attention_mask.sum(1),
        empty_id=tokenizer("").input_ids[0],
    )


def export_average(out: Path, vae: AutoencoderKLWan, weights: dict, scheduler: str) -> None:
    """Write the pipeline with the averaged denoiser and text encoder."""
    transformer, encoder = build_transformer(), build_text_encoder(build_tokenizer())
    transformer.load_state_dict(weights["transformer"])
    encoder.load_state_dict(weights["text_encoder"])
    export(out, vae, encoder, transformer, scheduler)


def train_denoiser(
    rank: int,
    processes: int,
    run: Run,
    vae: AutoencoderKLWan,
    cache: Latents,
    length: Length,
    out: Path,
    scheduler: str,
    start: Path | None,
    begin: float,
) -> None:
    """The denoiser stage in one of `processes` processes, which share the gradients and split the
    cores.
    """
    torch.set_num_threads(max(1, 2 // processes))
    if processes > 1:
        store = torch.distributed.FileStore(
            str(run.folder / f"rendezvous-{os.getppid()}"), processes
        )
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    torch.manual_seed(run.seed + 1)
    if start is None:
        transformer, encoder = build_transformer(), build_text_encoder(build_tokenizer())
    else:
        transformer = WanTransformer3DModel.from_pretrained(start, subfolder="transformer").train()
        encoder = UMT5EncoderModel.from_pretrained(start / "text_encoder").train()
    step, parts = denoiser_step(transformer, encoder, cache, DenoiserSettings(), run.seed, begin)

    def after_checkpoint(progress: float) -> None:
        export_average(out, vae, parts["average"].weights, scheduler)
        run.log(stage="export", progress=progress)

    done = run.stage("denoiser", length, parts, step, after_checkpoint=after_checkpoint)
    if rank == 0:
        print("denoiser:", done)


def main(
    minutes: float,
    steps: list[int] | None,
    seed: int,
    out: Path,
    work: Path,
    videos: int,
    two: float,
    scheduler: str,
    processes: int,
    start: Path | None,
    begin: float,
    resume: bool,
) -> None:
    """Run the stages: 13% of the time for the autoencoder, 82% for the denoiser, 5% for the decoder
    on whole videos.
    """
    torch.set_num_threads(min(2, torch.get_num_threads()))
    work.mkdir(parents=True, exist_ok=True)
    if not resume and any(work.glob("*.pt")):
        raise SystemExit(
            f"{work} holds an earlier run: give --resume to go on with it, or another --work"
        )
    run = Run(work, seed)
    shares, counts = (0.13, 0.82, 0.05), steps or (None, None, None)
    vae_length, denoiser_length, decoder_length = (
        Length(minutes * share, count) for share, count in zip(shares, counts, strict=True)
    )
    vae = trained_vae(run, vae_length, start)
    cache = cached_latents(run, vae, videos, two)
    arguments = (processes, run, vae, cache, denoiser_length, out, scheduler, start, begin)
    if processes == 1:
        train_denoiser(0, *arguments)
    else:
        signal.signal(
            signal.SIGTERM, lambda *_: sys.exit(143)
        )  # an orderly exit takes the child processes along
        torch.multiprocessing.spawn(train_denoiser, arguments, nprocs=processes)
    print("decoder:", refine_decoder(run, vae, decoder_length))
    export_average(
        out, vae, torch.load(work / "denoiser.pt", weights_only=True)["average"], scheduler
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--minutes", type=float, default=85.0, help="training time, shared out among the stages"
    )
    parser.add_argument(
        "--steps",
        type=int,
        nargs=3,
        metavar=("VAE", "DENOISER", "DECODER"),
        help="steps of the stages, instead of minutes",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "models" / "wan-digits")
    parser.add_argument("--work", type=Path, default=HERE / ".work" / "wan-digits")
    parser.add_argument("--videos", type=int, default=1200, help="videos in the latent cache")
    parser.add_argument(
        "--two",
        type=float,
        default=0.65,
        help="share of videos with two digits: they teach twice as much, and are the harder ones",
    )
    parser.add_argument("--scheduler", choices=("euler", "unipc"), default="unipc")
    parser.add_argument(
        "--processes",
        type=int,
        default=2,
        help="for the denoiser; each gets its share of two cores",
    )
    parser.add_argument(
        "--start", type=Path, help="a trained pipeline to go on from, instead of random weights"
    )
    parser.add_argument(
        "--begin",
        type=float,
        default=0.0,
        help="the fraction of the denoiser's stage that --start has behind it",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the checkpoints in --work"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main(**vars(_arguments()))
