"""The image autoencoder of flux-digits: pixels `[b, 3, h, w]` to latents `[b, 3, h/2, w/2]`.

Latents are the mean colours of 2 x 2 pixels: smooth pictures, the easiest thing to denoise. So the
denoiser needs no encoder for its data; the decoder learns to give the edges back, and the encoder
learns the means, for those who start from an image.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from placed_digits import CANVAS, make_image
from torch import Tensor
from tqdm import tqdm
from training import Length, Muon, Run

__all__ = ["FluxVaeSettings", "train_flux_vae"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FluxVaeSettings:
    """Numbers of the autoencoder stage."""

    length: Length
    pool_images: int = 200
    learning_rate: float = 3e-3
    latent_noise: float = 0.02  # so that what the denoiser leaves is no surprise
    log_variance: float = -8.0  # what the encoder gives as its own uncertainty


def _crops(pool: Tensor, seed: int, step: int) -> Tensor:
    """Crops of step `step`: eight of 64 x 64 pixels, every fourth step one whole image.

    Whole images, because group norms see other statistics there.
    """
    random = torch.Generator().manual_seed(seed * 1_000_003 + step)
    batch, side = (1, CANVAS) if step % 4 == 3 else (8, 64)
    images = torch.randint(len(pool), (batch,), generator=random).tolist()
    corners = torch.randint(CANVAS - side + 1, (batch, 2), generator=random).tolist()
    return torch.stack(
        [pool[i, :, h : h + side, w : w + side] for i, (h, w) in zip(images, corners, strict=True)]
    )


def train_flux_vae(run: Run, vae: AutoencoderKL, settings: FluxVaeSettings) -> dict:
    """Absolute and squared error of what the decoder makes of noisy means, and squared error of the
    encoder's means.
    """
    indices = tqdm(range(settings.pool_images), desc="render", mininterval=10)
    pool = torch.stack([make_image(run.seed, i)[0] for i in indices])
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.to(memory_format=torch.channels_last)
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
        pixels = _crops(pool, run.seed, index)
        means = F.avg_pool2d(pixels, 2)
        random = torch.Generator().manual_seed(run.seed * 1_000_003 + index)
        noise = settings.latent_noise * torch.randn(means.shape, generator=random)
        restored = vae.decode(means + noise).sample
        posterior = vae.encode(pixels).latent_dist
        squared = F.mse_loss(restored, pixels)
        encoded = F.mse_loss(posterior.mean, means)
        unsure = (posterior.logvar - settings.log_variance).square().mean()
        loss = F.l1_loss(restored, pixels) + 2 * squared + 2 * encoded + 1e-3 * unsure
        for optimiser in (muon, adam):
            optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        muon.step()
        adam.step()
        return {
            "loss": loss.item(),
            "psnr": (10 * torch.log10(4 / squared.detach())).item(),
            "encoder_psnr": (10 * torch.log10(4 / encoded.detach())).item(),
        }

    return run.stage("vae", settings.length, {"vae": vae, "muon": muon, "adam": adam}, step)
