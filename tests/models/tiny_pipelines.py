"""Real pipelines around the small models, with embeddings of prompts in place of text encoders.

Every entry gives a pipeline and the arguments of a call that makes latents of the case's grid.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import diffusers
import torch
from cases import (
    COGVIDEOX,
    DIT,
    FLUX,
    HUNYUAN,
    HUNYUAN15,
    LATTE,
    LTX,
    MOCHI,
    PIXART,
    QWEN,
    SD3,
    WAN,
    Case,
)
from diffusers import FlowMatchEulerDiscreteScheduler as Euler

LATENT = {"output_type": "latent", "return_dict": False}


def _embeds(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))


def _both(**found: torch.Tensor) -> dict[str, torch.Tensor]:
    """A prompt and a negative prompt, which is the prompt from its end."""
    return {**found, **{f"negative_{name}": value.flip(1) for name, value in found.items()}}


def _pipeline(kind: str, model: Any, scheduler: Any, **given: Any) -> Any:
    cls = getattr(diffusers, kind)
    absent = {
        name: None
        for name in cls._get_signature_keys(cls)[0]
        if name not in ("transformer", "scheduler")
    }
    pipe = cls(**{**absent, "transformer": model, "scheduler": scheduler, **given})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _size(case: Case, unit: int) -> dict[str, int]:
    _, h, w = case.grids[0]
    return {"height": h * unit, "width": w * unit}


def wan(scheduler: Any = None) -> Any:
    scheduler = scheduler or diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True
    )
    call = _both(prompt_embeds=_embeds(11, 16)) | _size(WAN, 16) | {"num_frames": 9}
    return _pipeline("WanPipeline", WAN.model(), scheduler), call


def wan22() -> Any:
    """Two denoisers: the first for the noisier part."""
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True
    )
    second = WAN.model()
    pipe = _pipeline(
        "WanPipeline", WAN.model(), scheduler, transformer_2=second, boundary_ratio=0.6
    )
    return pipe, wan()[1]


def hunyuan(true_cfg: float = 1.0) -> Any:
    """Guidance is embedded; with `true_cfg` there is a second call."""
    mask = torch.ones(1, 11)
    call = _both(
        prompt_embeds=_embeds(11, 16),
        prompt_attention_mask=mask,
        pooled_prompt_embeds=_embeds(8),
    )
    call |= {**_size(HUNYUAN, 16), "num_frames": 9, "true_cfg_scale": true_cfg}
    return _pipeline("HunyuanVideoPipeline", HUNYUAN.model(guidance_embeds=True), Euler()), call


def hunyuan15(guider: Any = None) -> Any:
    """A guider makes the calls."""
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=2,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
        downsample_match_channel=False,
        upsample_match_channel=False,
    )
    pipe = _pipeline(
        "HunyuanVideo15Pipeline",
        HUNYUAN15.model(in_channels=5, out_channels=2),
        Euler(),
        vae=vae,
        guider=guider or diffusers.ClassifierFreeGuidance(3.0),
    )
    pipe.vision_num_semantic_tokens = 3
    call = _both(
        prompt_embeds=_embeds(11, 16),
        prompt_embeds_mask=torch.ones(1, 11),
        prompt_embeds_2=_embeds(4, 12),
        prompt_embeds_mask_2=torch.ones(1, 4),
    )
    return pipe, call | _size(HUNYUAN15, 4) | {"num_frames": 9}


def cogvideox(scheduler: Any = None) -> Any:
    pipe = _pipeline(
        "CogVideoXPipeline", COGVIDEOX.model(), scheduler or diffusers.CogVideoXDDIMScheduler()
    )
    call = _both(prompt_embeds=_embeds(11, 16)) | _size(COGVIDEOX, 16)
    return pipe, call | {"num_frames": 9, "guidance_scale": 3.0}


def mochi() -> Any:
    call = _both(prompt_embeds=_embeds(11, 16), prompt_attention_mask=torch.ones(1, 11).bool())
    call |= {**_size(MOCHI, 16), "num_frames": 13}
    return _pipeline("MochiPipeline", MOCHI.model(), Euler()), call


def ltx() -> Any:
    call = _both(prompt_embeds=_embeds(11, 16), prompt_attention_mask=torch.ones(1, 11))
    return _pipeline("LTXPipeline", LTX.model(), Euler()), call | _size(LTX, 32) | {
        "num_frames": 17
    }


def latte() -> Any:
    call = _both(prompt_embeds=_embeds(11, 16)) | _size(LATTE, 16)
    call |= {"negative_prompt": None, "video_length": 3, "mask_feature": False}
    return _pipeline("LattePipeline", LATTE.model(), diffusers.DDIMScheduler()), call


def flux(true_cfg: float = 1.0) -> Any:
    call = _both(prompt_embeds=_embeds(11, 16), pooled_prompt_embeds=_embeds(8))
    call |= {**_size(FLUX, 16), "true_cfg_scale": true_cfg}
    return _pipeline("FluxPipeline", FLUX.model(guidance_embeds=True), Euler()), call


def sd3(scheduler: Any = None) -> Any:
    call = _both(prompt_embeds=_embeds(11, 16), pooled_prompt_embeds=_embeds(8)) | _size(SD3, 16)
    return _pipeline("StableDiffusion3Pipeline", SD3.model(), scheduler or Euler()), call


def qwen() -> Any:
    call = _both(prompt_embeds=_embeds(11, 16), prompt_embeds_mask=torch.ones(1, 11).long())
    return (
        _pipeline("QwenImagePipeline", QWEN.model(), Euler()),
        call | _size(QWEN, 16) | {"true_cfg_scale": 3.0},
    )


def pixart(scheduler: Any = None) -> Any:
    scheduler = scheduler or diffusers.DPMSolverMultistepScheduler()
    call = _both(prompt_embeds=_embeds(11, 16), prompt_attention_mask=torch.ones(1, 11))
    call |= {**_size(PIXART, 16), "negative_prompt": None, "use_resolution_binning": False}
    return _pipeline("PixArtAlphaPipeline", PIXART.model(), scheduler), call


def dit() -> Any:
    """No prompts, no callbacks, no context, and its first argument has no name."""
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=4, layers_per_block=1
    )
    pipe = _pipeline("DiTPipeline", DIT.model(sample_size=26), diffusers.DDIMScheduler(), vae=vae)
    return pipe, {"class_labels": [1], "output_type": "pt"}


@dataclass(frozen=True)
class Tiny:
    """calls: of the denoiser in a step; twice: steps count two calls by its scheduler (Heun).

    indexed: its scheduler says where it stands.
    """

    case: Case
    build: Any
    calls: int = 1
    twice: bool = False
    callbacks: bool = True
    indexed: bool = True

    @property
    def unindexed(self) -> bool:
        return not self.indexed


TINY = {
    "Wan, separate": Tiny(WAN, wan, calls=2),
    "HunyuanVideo, embedded": Tiny(HUNYUAN, hunyuan),
    "HunyuanVideo, separate": Tiny(HUNYUAN, partial(hunyuan, 2.0), calls=2),
    "HunyuanVideo 1.5, guider": Tiny(HUNYUAN15, hunyuan15, calls=2, callbacks=False),
    "CogVideoX, batched, DDIM": Tiny(COGVIDEOX, cogvideox, indexed=False),
    "CogVideoX, batched, DPM": Tiny(
        COGVIDEOX, lambda: cogvideox(diffusers.CogVideoXDPMScheduler()), indexed=False
    ),
    "Mochi, batched": Tiny(MOCHI, mochi, calls=2),  # of a site, one for each sample
    "LTX, batched": Tiny(LTX, ltx),
    "Latte, batched, DDIM": Tiny(LATTE, latte, indexed=False),
    "Flux, embedded": Tiny(FLUX, flux),
    "Flux, separate": Tiny(FLUX, partial(flux, 2.0), calls=2),
    "SD3, batched": Tiny(SD3, sd3),
    "SD3, Heun": Tiny(SD3, lambda: sd3(diffusers.FlowMatchHeunDiscreteScheduler()), twice=True),
    "QwenImage, separate": Tiny(QWEN, qwen, calls=2),
    "PixArt, batched": Tiny(PIXART, pixart, callbacks=False),
    "PixArt, DDIM": Tiny(
        PIXART, lambda: pixart(diffusers.DDIMScheduler()), callbacks=False, indexed=False
    ),
    "DiT, batched, DDIM": Tiny(DIT, dit, callbacks=False, indexed=False),
}


def generate(pipe: Any, call: dict[str, Any], steps: int = 10, seed: int = 0, **more: Any) -> Any:
    """The output of one generation as a tensor."""
    generator = torch.Generator().manual_seed(seed)
    settings = {**LATENT, **call, "generator": generator, "num_inference_steps": steps, **more}
    return torch.as_tensor(pipe(**settings)[0])
