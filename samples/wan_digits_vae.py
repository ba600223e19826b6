"""The video autoencoder of wan-digits: pixels `[b, 3, 1+2n, h, w]` to latents `[b, 8, 1+n, h/4,
w/4]`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from denoising import BACKGROUND
from diffusers import AutoencoderKLWan
from moving_digits import CANVAS, Scene, draw_scene, make_video, positions, prompt_of, render
from torch import Tensor
from tqdm import tqdm
from training import Length, Muon, Run, save_atomically

__all__ = ["VaeSettings", "build_vae", "encode_videos", "refine_decoder", "train_vae"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeSettings:
    """Numbers of the autoencoder stage."""

    length: Length
    pool_videos: int = 384
    learning_rate: float = 3e-3
    kl_weight: float = 3e-4
    chroma_weight: float = 12.0  # without it the first thousand steps learn grey videos


def build_vae(mean: list[float] | None = None, std: list[float] | None = None) -> AutoencoderKLWan:
    """A small `AutoencoderKLWan`. Pixels are first folded 2x2 into channels, so no layer runs at
    full resolution.
    """
    return AutoencoderKLWan(
        base_dim=16,
        decoder_base_dim=24,
        z_dim=8,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_temporal=2,
        scale_factor_spatial=4,
        latents_mean=mean or [0.0] * 8,
        latents_std=std or [1.0] * 8,
    )


def _clip(pool: Tensor, seed: int, step: int) -> Tensor:
    """Clips of step `step`: mostly small crops of five frames, every fourth step thirteen whole
    frames.

    Thirteen frames are seven chunks of the causal cache, more than the receptive field of the
    decoder in time.
    """
    random = torch.Generator().manual_seed(seed * 1_000_003 + step)
    batch, frames, side = (2, 13, 64) if step % 4 == 3 else (8, 5, 32)
    corners = [
        torch.randint(n + 1, (batch,), generator=random).tolist()
        for n in (pool.shape[2] - frames, 64 - side, 64 - side)
    ]
    videos = torch.randint(len(pool), (batch,), generator=random).tolist()
    clips = [
        pool[v, :, t : t + frames, h : h + side, w : w + side]
        for v, t, h, w in zip(videos, *corners, strict=True)
    ]
    return torch.stack(clips).float() / 127.5 - 1


def _render_pool(run: Run, count: int) -> Tensor:
    """The first `count` videos `[count, 3, 33, 64, 64]` as bytes, rendered once and kept in the
    work folder.
    """
    path = run.folder / f"pixels-{run.seed}-{count}.pt"
    if not path.exists():
        indices = tqdm(range(count), desc="render", mininterval=10)
        videos = [
            ((make_video(run.seed, i)[0] + 1) * 127.5).round().to(torch.uint8) for i in indices
        ]
        save_atomically(torch.stack(videos), path)
    return torch.load(path, weights_only=True)


def _make_channels_last(vae: AutoencoderKLWan) -> None:
    """Lay convolution weights out so that CPUs train them a third faster."""
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)
        elif isinstance(module, torch.nn.Conv2d):
            module.to(memory_format=torch.channels_last)


def train_vae(run: Run, vae: AutoencoderKLWan, settings: VaeSettings) -> dict:
    """Absolute and squared error, the colour part weighted up, and a small KL term."""
    _make_channels_last(vae)
    pool = _render_pool(run, settings.pool_videos)
    muon = Muon(
        [p for p in vae.parameters() if p.ndim > 3 and p[0].numel() > 24], lr=settings.learning_rate
    )
    chosen = {id(p) for p in muon.param_groups[0]["params"]}
    adam = torch.optim.AdamW(
        [p for p in vae.parameters() if id(p) not in chosen], betas=(0.9, 0.97), weight_decay=0.0
    )

    def step(index: int, progress: float) -> dict[str, float]:
        for group in (*muon.param_groups, *adam.param_groups):
            group["lr"] = settings.learning_rate * min(
                1.0, (index + 1) / 30, 0.02 + 1.5 * (1 - progress)
            )
        pixels = _clip(pool, run.seed, index)
        posterior = vae.encode(pixels).latent_dist
        random = torch.Generator().manual_seed(run.seed * 1_000_003 + index)
        restored = vae.decode(posterior.sample(generator=random)).sample
        squared = F.mse_loss(restored, pixels)
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        error = restored - pixels
        chroma = error - error.mean(1, keepdim=True)
        loss = (
            error.abs().mean()
            + 2 * squared
            + settings.chroma_weight * chroma.square().mean()
            + settings.kl_weight * kl
        )
        for optimiser in (muon, adam):
            optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        muon.step()
        adam.step()
        return {
            "loss": loss.item(),
            "psnr": (10 * torch.log10(4 / squared.detach())).item(),
            "kl": kl.item(),
        }

    return run.stage("vae", settings.length, {"vae": vae, "muon": muon, "adam": adam}, step)


def refine_decoder(
    run: Run, vae: AutoencoderKLWan, length: Length, learning_rate: float = 1.5e-3
) -> dict:
    """Train the decoder alone on whole videos: after clips of 13 frames its causal cache drifts on
    the frames beyond.

    The encoder does not drift (its latents of a still video settle within three frames) and stays
    as it is, so that cached latents remain valid.
    """
    _make_channels_last(vae)
    pool = _render_pool(run, VaeSettings(length=length).pool_videos)
    weights = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    muon = Muon([p for p in weights if p.ndim > 3 and p[0].numel() > 24], lr=learning_rate)
    chosen = {id(p) for p in muon.param_groups[0]["params"]}
    adam = torch.optim.AdamW(
        [p for p in weights if id(p) not in chosen], betas=(0.9, 0.97), weight_decay=0.0
    )

    def step(index: int, progress: float) -> dict[str, float]:
        for group in (*muon.param_groups, *adam.param_groups):
            group["lr"] = learning_rate * min(1.0, (index + 1) / 10, 0.02 + 1.3 * (1 - progress))
        random = torch.Generator().manual_seed(run.seed * 1_000_003 + index)
        pixels = pool[torch.randint(len(pool), (1,), generator=random)].float() / 127.5 - 1
        with torch.no_grad():
            latents = vae.encode(pixels).latent_dist.sample(generator=random)
        row, column = torch.randint(
            9, (2,), generator=random
        ).tolist()  # half of each side: 8 of 16 latent cells
        error = vae.decode(latents[..., row : row + 8, column : column + 8]).sample
        error = error - pixels[..., 4 * row : 4 * row + 32, 4 * column : 4 * column + 32]
        squared = error.square().mean()
        for optimiser in (muon, adam):
            optimiser.zero_grad(set_to_none=True)
        (error.abs().mean() + 4 * squared).backward()
        muon.step()
        adam.step()
        return {"psnr": (10 * torch.log10(4 / squared.detach())).item()}

    return run.stage(
        "decoder", length, {"vae": vae, "muon": muon, "adam": adam}, step, checkpoint_minutes=1.0
    )


def digits_in_cells(scene: Scene) -> tuple[Tensor, Tensor]:
    """Which digit's square covers each latent cell `[17, 16, 16]` (`BACKGROUND` where none does),
    and where in the square the cell lies `[17, 2, 16, 16]`: (h, w) from -1 to 1, 0 outside.

    Latent frame 0 shows frame 0, latent frame i shows 2i-1 and 2i. Later actors stand in front.
    """
    cells = CANVAS // 4
    place = 4 * torch.arange(cells) + 2.0
    digits = torch.full((17, cells, cells), BACKGROUND, dtype=torch.uint8)
    inside = torch.zeros(17, 2, cells, cells)
    for actor in scene.actors:
        path = torch.from_numpy(positions(actor, 33)).float()
        centre = torch.cat([path[:1], path[1:].unflatten(0, (-1, 2)).mean(1)])
        h, w = ((place - centre[:, axis, None]) / (actor.size / 2) for axis in (0, 1))
        where = torch.stack(torch.broadcast_tensors(h[:, :, None], w[:, None, :]), 1)
        covered = where.abs().amax(1) < 1
        digits[covered] = actor.digit
        inside = torch.where(covered[:, None], where, inside)
    return digits, inside


@torch.no_grad()
def encode_videos(
    vae: AutoencoderKLWan, seed: int, first: int, count: int, *, two: float = 0.4, batch: int = 8
) -> dict:
    """Latents `[count, 8, 17, 16, 16]` (float16), digits `[count, 17, 16, 16]` (uint8), where in
    their squares the cells lie `[count, 17, 2, 16, 16]` (float16), and prompts.

    The latents are posterior means; a share `two` of the videos shows two digits.
    """
    result = {"latents": [], "digits": [], "inside": [], "prompts": []}
    for start in tqdm(range(first, first + count, batch), desc="encode", mininterval=10):
        indices = range(start, min(start + batch, first + count))
        scenes = [draw_scene(seed, i, two=two) for i in indices]
        digits, inside = zip(*(digits_in_cells(scene) for scene in scenes), strict=True)
        pixels = torch.stack([render(scene) for scene in scenes])
        result["latents"].append(vae.encode(pixels).latent_dist.mode().half())
        result["digits"].append(torch.stack(digits))
        result["inside"].append(torch.stack(inside).half())
        result["prompts"] += [prompt_of(scene) for scene in scenes]
    return {k: v if k == "prompts" else torch.cat(v) for k, v in result.items()}
