"""Every kind of denoiser at a few thousand random weights: real classes, and calls of them.

A case says what its model's attention sees in its own words (`layouts`), so that the adapters are
tested against it and not against themselves.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from accel.layout import Layout

HEADS, DIM = 3, 24
INNER = HEADS * DIM
TEXTS = (5, 11, 3)  # valid lengths of three prompts
PADDED = 11  # what they are padded to
# grids of a plan and of another resolution; no block size divides them
VIDEOS = ((3, 7, 9), (2, 11, 10))
IMAGES = ((1, 13, 15), (1, 11, 16))


@dataclass(frozen=True)
class Case:
    """One kind of model.

    call: (model, grid, samples, seed) -> arguments; samples: which of TEXTS a batch holds.
    layouts: (grid, samples) -> site name pattern -> one layout for each sample.
    sites: names of all attention sites, by hand. padded: arguments whose padding may hold anything.
    by_sample: attention is called for each sample by itself.
    grids: of a plan, and of another resolution.
    """

    name: str
    build: Callable[[], nn.Module]
    call: Callable[..., dict[str, Any]]
    layouts: Callable[..., Any]
    sites: tuple[str, ...]
    padded: tuple[str, ...] = ()
    by_sample: bool = False
    grids: tuple[tuple[int, int, int], ...] = VIDEOS
    notes: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def model(self, **changes: Any) -> nn.Module:
        torch.manual_seed(0)
        model = self.build(**changes).eval()
        with torch.no_grad():  # some start as zeros, and would say nothing
            for name, weight in model.named_parameters():
                if weight.ndim > 1 and weight.abs().sum() == 0:
                    weight.normal_(std=0.1)
                if "norm_q" in name or "norm_k" in name:
                    weight.mul_(2.0)  # attention far from uniform
        return model

    def inputs(self, grid=None, samples=(0, 1, 2), seed=0) -> dict[str, Any]:
        return self.call(grid or self.grids[0], samples, torch.Generator().manual_seed(seed))

    def expected(self, grid=None, samples=(0, 1, 2)) -> dict[str, list[Layout]]:
        """The layouts of the samples, by site."""
        found = self.layouts(grid or self.grids[0], samples)
        if not isinstance(found, dict):
            found = dict.fromkeys(self.sites, found)
        return {
            site: [layout] * len(samples) if isinstance(layout, Layout) else layout
            for site, layout in found.items()
        }


def _names(*blocks: tuple[str, int, str]) -> tuple[str, ...]:
    return tuple(f"{block}.{i}.{attn}" for block, count, attn in blocks for i in range(count))


def _random(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g)


def _texts(g: torch.Generator, samples: tuple[int, ...], width: int) -> Tensor:
    """Prompts of all samples of TEXTS, the same for each whatever the batch."""
    return _random(g, len(TEXTS), PADDED, width)[list(samples)]


def _some(g: torch.Generator, samples: tuple[int, ...], *shape: int) -> Tensor:
    return _random(g, len(TEXTS), *shape)[list(samples)]


def _mask(samples: tuple[int, ...]) -> Tensor:
    lengths = torch.tensor([TEXTS[s] for s in samples])
    return (torch.arange(PADDED) < lengths[:, None]).long()


def _ids(h: int, w: int, axes: int, image: int = 0) -> Tensor:
    ids = torch.zeros(h, w, axes)
    ids[..., 0] = image
    ids[..., 1] += torch.arange(h)[:, None]
    ids[..., 2] += torch.arange(w)
    return ids.reshape(h * w, axes)


# --- video -----------------------------------------------------------------------------------


def _wan(kind: str = "WanTransformer3DModel", **changes: Any) -> nn.Module:
    settings = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": HEADS,
        "attention_head_dim": DIM,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 32,
        "ffn_dim": 48,
        "num_layers": 2,
        "rope_max_seq_len": 64,
    }
    return getattr(diffusers, kind)(**{**settings, **changes})


def _wan_call(grid, samples, g, *, image=0, vace=0, tokenwise=False):
    t, h, w = grid
    call = {
        "hidden_states": _some(g, samples, 4, t, 2 * h, 2 * w),
        "timestep": torch.full((len(samples),), 500),
        "encoder_hidden_states": _texts(g, samples, 16),
    }
    if tokenwise:
        call["timestep"] = torch.full((len(samples), t * h * w), 500)
    if image:
        text = _some(g, samples, 512, 16)  # image cross-attention counts text from the end
        call |= {
            "encoder_hidden_states": text,
            "encoder_hidden_states_image": _some(g, samples, 3, image),
        }
    if vace:
        call["control_hidden_states"] = _some(g, samples, vace, t, 2 * h, 2 * w)
    return call


def _alone(grid, samples):
    return Layout.of(grid)


WAN_SITES = _names(("blocks", 2, "attn1"))
WAN = Case("Wan T2V", _wan, _wan_call, _alone, WAN_SITES)
WAN_I2V = Case(
    "Wan I2V",
    lambda **c: _wan(image_dim=20, added_kv_proj_dim=INNER, **c),
    lambda *a: _wan_call(*a, image=20),
    _alone,
    WAN_SITES,
)
WAN22 = Case("Wan2.2", _wan, lambda *a: _wan_call(*a, tokenwise=True), _alone, WAN_SITES)
WAN_VACE = Case(
    "Wan VACE",
    lambda **c: _wan("WanVACETransformer3DModel", vace_layers=[0], vace_in_channels=6, **c),
    lambda *a: _wan_call(*a, vace=6),
    _alone,
    (*WAN_SITES, "vace_blocks.0.attn1"),
)


def _hunyuan(**changes: Any) -> nn.Module:
    settings = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": HEADS,
        "attention_head_dim": DIM,
        "num_layers": 1,
        "num_single_layers": 2,
        "num_refiner_layers": 1,
        "patch_size": 2,
        "patch_size_t": 1,
        "text_embed_dim": 16,
        "pooled_projection_dim": 8,
        "rope_axes_dim": (4, 8, 12),
        "guidance_embeds": False,
    }
    return diffusers.HunyuanVideoTransformer3DModel(**{**settings, **changes})


def _hunyuan_call(grid, samples, g, channels=4):
    t, h, w = grid
    return {
        "hidden_states": _some(g, samples, channels, t, 2 * h, 2 * w),
        "timestep": torch.full((len(samples),), 500),
        "encoder_hidden_states": _texts(g, samples, 16),
        "encoder_attention_mask": _mask(samples),
        "pooled_projections": _some(g, samples, 8),
    }


def _text_last(grid, samples):
    return [Layout.of(grid, text_after=TEXTS[s], padding=PADDED - TEXTS[s]) for s in samples]


HUNYUAN_SITES = _names(("transformer_blocks", 1, "attn"), ("single_transformer_blocks", 2, "attn"))
HUNYUAN = Case(
    "HunyuanVideo",
    _hunyuan,
    _hunyuan_call,
    _text_last,
    HUNYUAN_SITES,
    padded=("encoder_hidden_states",),
)
HUNYUAN_I2V = Case(
    "HunyuanVideo I2V",
    lambda **c: _hunyuan(image_condition_type="token_replace", **c),
    _hunyuan_call,
    _text_last,
    HUNYUAN_SITES,
    padded=("encoder_hidden_states",),
)


def _hunyuan15(**changes: Any) -> nn.Module:
    settings = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": HEADS,
        "attention_head_dim": DIM,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "patch_size": 1,
        "patch_size_t": 1,
        "text_embed_dim": 16,
        "text_embed_2_dim": 12,
        "image_embed_dim": 10,
        "rope_axes_dim": (4, 8, 12),
    }
    return diffusers.HunyuanVideo15Transformer3DModel(**{**settings, **changes})


def _hunyuan15_call(grid, samples, g, image=False):
    embeds = _some(g, samples, 3, 10)
    return {
        "hidden_states": _some(g, samples, 4, *grid),
        "timestep": torch.full((len(samples),), 500.0),
        "encoder_hidden_states": _texts(g, samples, 16),
        "encoder_attention_mask": _mask(samples),
        "encoder_hidden_states_2": _some(g, samples, 4, 12),
        "encoder_attention_mask_2": torch.tensor([[1, 1, 0, 0]] * len(samples)),
        "image_embeds": embeds if image else torch.zeros_like(embeds),
    }


def _hunyuan15_layout(grid, samples, image=0):
    # [video, image, ByT5 (2 of 4), text] and their padding
    whole = PADDED + 4 + 3
    valid = [image + 2 + TEXTS[s] for s in samples]
    return [Layout.of(grid, text_after=n, padding=whole - n) for n in valid]


HUNYUAN15 = Case(
    "HunyuanVideo 1.5",
    _hunyuan15,
    _hunyuan15_call,
    _hunyuan15_layout,
    _names(("transformer_blocks", 2, "attn")),
    padded=("encoder_hidden_states",),
    notes={"compiled whole": "the model itself asks its image embeddings whether they are zero"},
)
HUNYUAN15_I2V = Case(
    "HunyuanVideo 1.5 I2V",
    _hunyuan15,
    lambda *a: _hunyuan15_call(*a, image=True),
    lambda *a: _hunyuan15_layout(*a, image=3),
    HUNYUAN15.sites,
    padded=("encoder_hidden_states",),
    notes=HUNYUAN15.notes,
)


def _cogvideox(**changes: Any) -> nn.Module:
    settings = {
        "num_attention_heads": HEADS,
        "attention_head_dim": DIM,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 8,
        "text_embed_dim": 16,
        "num_layers": 2,
        "sample_width": 14,
        "sample_height": 10,
        "sample_frames": 9,
        "patch_size": 2,
        "temporal_compression_ratio": 4,
        "max_text_seq_length": PADDED,
        "use_rotary_positional_embeddings": True,
    }
    return diffusers.CogVideoXTransformer3DModel(**{**settings, **changes})


def _cogvideox_call(grid, samples, g, patch_t=1, rotary=True):
    t, h, w = grid
    angles = _random(g, t * h * w, DIM)
    return {
        "hidden_states": _some(g, samples, t * patch_t, 4, 2 * h, 2 * w),
        "encoder_hidden_states": _texts(g, samples, 16),
        "timestep": torch.full((len(samples),), 500),
        "image_rotary_emb": (angles.cos(), angles.sin()) if rotary else None,
    }


def _text_first(grid, samples):
    return Layout.of(grid, text_before=PADDED)


COGVIDEOX = Case(
    "CogVideoX",
    # its table of positions asks for a width that 32 divides
    lambda **c: _cogvideox(use_rotary_positional_embeddings=False, attention_head_dim=32, **c),
    lambda *a: _cogvideox_call(*a, rotary=False),
    _text_first,
    _names(("transformer_blocks", 2, "attn1")),
)
COGVIDEOX15 = Case(
    "CogVideoX 1.5",
    lambda **c: _cogvideox(patch_size_t=2, patch_bias=False, **c),
    lambda *a: _cogvideox_call(*a, patch_t=2),
    _text_first,
    COGVIDEOX.sites,
)


def _mochi(**changes: Any) -> nn.Module:
    settings = {
        "patch_size": 2,
        "num_attention_heads": HEADS,
        "attention_head_dim": DIM,
        "num_layers": 2,
        "pooled_projection_dim": 16,
        "in_channels": 4,
        "text_embed_dim": 16,
        "time_embed_dim": 8,
        "max_sequence_length": PADDED,
    }
    return diffusers.MochiTransformer3DModel(**{**settings, **changes})


def _mochi_call(grid, samples, g):
    t, h, w = grid
    return {
        "hidden_states": _some(g, samples, 4, t, 2 * h, 2 * w),
        "encoder_hidden_states": _texts(g, samples, 16),
        "timestep": torch.full((len(samples),), 500),
        "encoder_attention_mask": _mask(samples).bool(),
    }


MOCHI = Case(
    "Mochi",
    _mochi,
    _mochi_call,
    lambda grid, samples: [Layout.of(grid, text_after=TEXTS[s]) for s in samples],
    _names(("transformer_blocks", 2, "attn1")),
    padded=("encoder_hidden_states",),
    by_sample=True,
)


def _ltx(**changes: Any) -> nn.Module:
    settings = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": HEADS,
        "attention_head_dim": DIM,
        "cross_attention_dim": INNER,
        "num_layers": 2,
        "caption_channels": 16,
    }
    return diffusers.LTXVideoTransformer3DModel(**{**settings, **changes})


def _ltx_call(grid, samples, g):
    t, h, w = grid
    return {
        "hidden_states": _some(g, samples, t * h * w, 4),
        "encoder_hidden_states": _texts(g, samples, 16),
        "timestep": torch.full((len(samples),), 500.0),
        "encoder_attention_mask": _mask(samples),
        "num_frames": t,
        "height": h,
        "width": w,
    }


LTX_SITES = _names(("transformer_blocks", 2, "attn1"))
LTX = Case("LTX", _ltx, _ltx_call, _alone, LTX_SITES)


def _ltx2(**changes: Any) -> nn.Module:
    settings = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": HEADS,
        "attention_head_dim": DIM,
        "cross_attention_dim": INNER,
        "audio_in_channels": 5,
        "audio_out_channels": 5,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 12,
        "audio_cross_attention_dim": 24,
        "num_layers": 2,
        "caption_channels": 16,
    }
    return diffusers.LTX2VideoTransformer3DModel(**{**settings, **changes})


def _ltx2_call(grid, samples, g):
    t, h, w = grid
    return {
        "hidden_states": _some(g, samples, t * h * w, 4),
        "audio_hidden_states": _some(g, samples, 6, 5),
        "encoder_hidden_states": _texts(g, samples, 16),
        "audio_encoder_hidden_states": _texts(g, samples, 16),
        "timestep": torch.full((len(samples),), 500.0),
        "sigma": torch.full((len(samples),), 0.5),
        "num_frames": t,
        "height": h,
        "width": w,
        "audio_num_frames": 6,
    }


LTX2 = Case("LTX2", _ltx2, _ltx2_call, _alone, LTX_SITES)


def _cosmos(**changes: Any) -> nn.Module:
    settings = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": HEADS,
        "attention_head_dim": DIM,
        "num_layers": 2,
        "mlp_ratio": 2,
        "text_embed_dim": 16,
        "adaln_lora_dim": 4,
        "max_size": (4, 32, 32),
        "patch_size": (1, 2, 2),
        "concat_padding_mask": False,
    }
    return diffusers.CosmosTransformer3DModel(**{**settings, **changes})


def _cosmos_call(grid, samples, g):
    t, h, w = grid
    return {
        "hidden_states": _some(g, samples, 4, t, 2 * h, 2 * w),
        "timestep": torch.full((len(samples),), 0.5),
        "encoder_hidden_states": _texts(g, samples, 16),
        "fps": 24,
    }


COSMOS = Case("Cosmos", _cosmos, _cosmos_call, _alone, LTX_SITES)


def _latte(**changes: Any) -> nn.Module:
    settings = {
        "num_attention_heads": HEADS,
        "attention_head_dim": DIM,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "cross_attention_dim": INNER,
        "attention_bias": True,
        "sample_size": 14,
        "patch_size": 2,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "caption_channels": 16,
        "video_length": 3,
    }
    return diffusers.LatteTransformer3DModel(**{**settings, **changes})


def _latte_call(grid, samples, g):
    t, h, w = grid
    return {
        "hidden_states": _some(g, samples, 4, t, 2 * h, 2 * w),
        "timestep": torch.full((len(samples),), 500),
        "encoder_hidden_states": _texts(g, samples, 16),
    }


def _latte_layouts(grid, samples):
    t, h, w = grid
    space, time = LATTE_SITES[:2], LATTE_SITES[2:]
    return {
        **{site: [Layout.of((1, h, w))] * (t * len(samples)) for site in space},
        **{site: [Layout.of((t, 1, 1))] * (h * w * len(samples)) for site in time},
    }


LATTE_SITES = _names(
    ("transformer_blocks", 2, "attn1"), ("temporal_transformer_blocks", 2, "attn1")
)
LATTE = Case(
    "Latte",
    _latte,
    _latte_call,
    _latte_layouts,
    LATTE_SITES,
    grids=((3, 7, 9), (3, 11, 10)),  # its frames are a table of the trained number
)

# --- images ----------------------------------------------------------------------------------


def _flux(**changes: Any) -> nn.Module:
    settings = {
        "in_channels": 4,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": DIM,
        "num_attention_heads": HEADS,
        "joint_attention_dim": 16,
        "pooled_projection_dim": 8,
        "axes_dims_rope": (4, 8, 12),
    }
    return diffusers.FluxTransformer2DModel(**{**settings, **changes})


REFERENCE = (4, 3)  # rows and columns of a reference image


def _flux_call(grid, samples, g, *, reference=False, axes=3):
    _, h, w = grid
    ids = _ids(h, w, axes)
    if reference:
        ids = torch.cat([ids, _ids(*REFERENCE, axes, image=10 if axes == 4 else 1)])
    return {
        "hidden_states": _some(g, samples, len(ids), 4),
        "encoder_hidden_states": _texts(g, samples, 16),
        "pooled_projections": _some(g, samples, 8),
        "timestep": torch.full((len(samples),), 0.5),
        "img_ids": ids,
        "txt_ids": torch.zeros(PADDED, axes),
    }


def _text_image_reference(grid, samples):
    h, w = REFERENCE
    return Layout.join([("text", PADDED), grid, ("reference", h * w)])


FLUX = Case("Flux", _flux, _flux_call, _text_first, HUNYUAN_SITES, grids=IMAGES)
KONTEXT = Case(
    "Flux Kontext",
    _flux,
    lambda *a: _flux_call(*a, reference=True),
    _text_image_reference,
    HUNYUAN_SITES,
    grids=IMAGES,
)


def _flux2(**changes: Any) -> nn.Module:
    settings = {
        "in_channels": 4,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": DIM,
        "num_attention_heads": HEADS,
        "joint_attention_dim": 16,
        "timestep_guidance_channels": 8,
        "axes_dims_rope": (6, 6, 6, 6),
        "guidance_embeds": False,
    }
    return diffusers.Flux2Transformer2DModel(**{**settings, **changes})


def _flux2_call(grid, samples, g):
    call = _flux_call(grid, samples, g, reference=True, axes=4)
    del call["pooled_projections"]
    return call


FLUX2 = Case("Flux2", _flux2, _flux2_call, _text_image_reference, HUNYUAN_SITES, grids=IMAGES)


def _sd3(**changes: Any) -> nn.Module:
    settings = {
        "sample_size": 32,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": DIM,
        "num_attention_heads": HEADS,
        "joint_attention_dim": 16,
        "caption_projection_dim": INNER,
        "pooled_projection_dim": 8,
        "pos_embed_max_size": 24,
    }
    return diffusers.SD3Transformer2DModel(**{**settings, **changes})


def _sd3_call(grid, samples, g):
    _, h, w = grid
    return {
        "hidden_states": _some(g, samples, 4, 2 * h, 2 * w),
        "encoder_hidden_states": _texts(g, samples, 16),
        "pooled_projections": _some(g, samples, 8),
        "timestep": torch.full((len(samples),), 500),
    }


def _image_text(grid, samples):
    return Layout.of(grid, text_after=PADDED)


SD3_SITES = _names(("transformer_blocks", 2, "attn"))
SD3 = Case("SD3", _sd3, _sd3_call, _image_text, SD3_SITES, grids=IMAGES)
SD35 = Case(
    "SD3.5",
    lambda **c: _sd3(dual_attention_layers=(0,), qk_norm="rms_norm", **c),
    _sd3_call,
    lambda grid, samples: {
        **dict.fromkeys(SD3_SITES, Layout.of(grid, text_after=PADDED)),
        "transformer_blocks.0.attn2": Layout.of(grid),
    },
    ("transformer_blocks.0.attn", "transformer_blocks.0.attn2", "transformer_blocks.1.attn"),
    grids=IMAGES,
)


def _qwen(**changes: Any) -> nn.Module:
    settings = {
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 1,
        "num_layers": 2,
        "attention_head_dim": DIM,
        "num_attention_heads": HEADS,
        "joint_attention_dim": 16,
        "axes_dims_rope": (4, 8, 12),
    }
    return diffusers.QwenImageTransformer2DModel(**{**settings, **changes})


def _qwen_call(grid, samples, g, reference=False):
    images = [grid, (1, *REFERENCE)] if reference else [grid]
    tokens = sum(t * h * w for t, h, w in images)
    return {
        "hidden_states": _some(g, samples, tokens, 4),
        "encoder_hidden_states": _texts(g, samples, 16),
        "encoder_hidden_states_mask": _mask(samples),
        "timestep": torch.full((len(samples),), 0.5),
        "img_shapes": [images] * len(samples),
    }


def _qwen_layouts(grid, samples, reference=0):
    return [
        Layout.join(
            [("text", TEXTS[s]), ("pad", PADDED - TEXTS[s]), grid, ("reference", reference)]
        )
        for s in samples
    ]


QWEN = Case(
    "QwenImage",
    _qwen,
    _qwen_call,
    _qwen_layouts,
    SD3_SITES,
    padded=("encoder_hidden_states",),
    grids=IMAGES,
)
QWEN_EDIT = Case(
    "QwenImage edit",
    _qwen,
    lambda *a: _qwen_call(*a, reference=True),
    lambda *a: _qwen_layouts(*a, reference=12),
    SD3_SITES,
    padded=("encoder_hidden_states",),
    grids=IMAGES,
)


def _pixart(**changes: Any) -> nn.Module:
    settings = {
        "num_attention_heads": HEADS,
        "attention_head_dim": DIM,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "cross_attention_dim": INNER,
        "sample_size": 16,
        "caption_channels": 16,
        "use_additional_conditions": False,
    }
    return diffusers.PixArtTransformer2DModel(**{**settings, **changes})


def _pixart_call(grid, samples, g):
    _, h, w = grid
    return {
        "hidden_states": _some(g, samples, 4, 2 * h, 2 * w),
        "encoder_hidden_states": _texts(g, samples, 16),
        "encoder_attention_mask": _mask(samples),
        "timestep": torch.full((len(samples),), 500),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


PIXART = Case("PixArt", _pixart, _pixart_call, _alone, LTX_SITES, grids=IMAGES)


def _dit(**changes: Any) -> nn.Module:
    settings = {
        "num_attention_heads": HEADS,
        "attention_head_dim": DIM,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "sample_size": 16,
        "num_embeds_ada_norm": 1000,
    }
    return diffusers.DiTTransformer2DModel(**{**settings, **changes})


def _dit_call(grid, samples, g):
    _, h, w = grid
    return {
        "hidden_states": _some(g, samples, 4, 2 * h, 2 * w),
        "timestep": torch.full((len(samples),), 500),
        "class_labels": torch.tensor(samples),
    }


DIT = Case(
    "DiT",
    _dit,
    _dit_call,
    _alone,
    LTX_SITES,
    grids=((1, 13, 13), (1, 11, 11)),  # the class takes square images alone
)


def _z_image(**changes: Any) -> nn.Module:
    settings = {
        "in_channels": 4,
        "dim": INNER,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": HEADS,
        "n_kv_heads": HEADS,
        "cap_feat_dim": 16,
        "axes_dims": [8, 8, 8],
        "axes_lens": [128, 32, 32],
    }
    return diffusers.ZImageTransformer2DModel(**{**settings, **changes})


Z_CAPTIONS = (5, 40, 3)  # of which two are filled up to 32 tokens, and one to 64


def _z_image_call(grid, samples, g):
    _, h, w = grid
    images = _some(g, samples, 4, 1, 2 * h, 2 * w)
    captions = _some(g, samples, max(Z_CAPTIONS), 16)
    return {
        "x": list(images),
        "t": torch.full((len(samples),), 0.5),
        "cap_feats": [c[: Z_CAPTIONS[s]] for c, s in zip(captions, samples, strict=True)],
    }


def _z_image_layouts(grid, samples):
    fill = -grid[1] * grid[2] % 32
    texts = [fill + (64 if s == 1 else 32) for s in samples]
    return [Layout.of(grid, text_after=n, padding=max(texts) - n) for n in texts]


Z_IMAGE = Case(
    "Z-Image",
    _z_image,
    _z_image_call,
    _z_image_layouts,
    _names(("layers", 2, "attention")),
    grids=IMAGES,
)


def _hidream(**changes: Any) -> nn.Module:
    settings = {
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": DIM,
        "num_attention_heads": HEADS,
        "caption_channels": [16, 12],
        "text_emb_dim": 8,
        "axes_dims_rope": (8, 8, 8),
        "max_resolution": (32, 28),
        "llama_layers": [0, 1, 2],
        "force_inference_output": True,
    }
    return diffusers.HiDreamImageTransformer2DModel(**{**settings, **changes})


def _hidream_call(grid, samples, g):
    _, h, w = grid
    return {
        "hidden_states": _some(g, samples, 4, 2 * h, 2 * w),
        "timesteps": torch.full((len(samples),), 500),
        "encoder_hidden_states_t5": _some(g, samples, 6, 16),
        "encoder_hidden_states_llama3": _some(g, samples, 3, 4, 12).transpose(0, 1).contiguous(),
        "pooled_embeds": _some(g, samples, 8),
    }


HIDREAM = Case(
    "HiDream",
    _hidream,
    _hidream_call,
    # filled up to 224 image tokens, since it is not square; T5's 6, and twice Llama's 4
    lambda grid, samples: Layout.of(grid, text_after=224 - grid[1] * grid[2] + 6 + 2 * 4),
    (
        "double_stream_blocks.0.block.attn1",
        "single_stream_blocks.0.block.attn1",
        "single_stream_blocks.1.block.attn1",
    ),
    grids=IMAGES,
)


def _auraflow(**changes: Any) -> nn.Module:
    settings = {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_mmdit_layers": 1,
        "num_single_dit_layers": 2,
        "attention_head_dim": DIM,
        "num_attention_heads": HEADS,
        "joint_attention_dim": 16,
        "caption_projection_dim": INNER,
        "pos_embed_max_size": 256,
    }
    model = diffusers.AuraFlowTransformer2DModel(**{**settings, **changes})
    with torch.no_grad():  # its attention counts for little as it starts
        for weight in model.parameters():
            weight.mul_(2.0)
    return model


def _auraflow_call(grid, samples, g):
    _, h, w = grid
    return {
        "hidden_states": _some(g, samples, 4, 2 * h, 2 * w),
        "encoder_hidden_states": _texts(g, samples, 16),
        "timestep": torch.full((len(samples),), 0.5),
    }


AURAFLOW = Case(
    "AuraFlow",
    _auraflow,
    _auraflow_call,
    lambda grid, samples: Layout.of(grid, text_before=8 + PADDED),  # 8 register tokens
    _names(("joint_transformer_blocks", 1, "attn"), ("single_transformer_blocks", 2, "attn")),
    grids=IMAGES,
)


def _lumina2(**changes: Any) -> nn.Module:
    settings = {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 4,
        "hidden_size": 4 * DIM,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "multiple_of": 16,
        "axes_dim_rope": (8, 8, 8),
        "axes_lens": (64, 32, 32),
        "cap_feat_dim": 16,
    }
    return diffusers.Lumina2Transformer2DModel(**{**settings, **changes})


def _lumina2_call(grid, samples, g):
    _, h, w = grid
    return {
        "hidden_states": _some(g, samples, 4, 2 * h, 2 * w),
        "timestep": torch.full((len(samples),), 0.5),
        "encoder_hidden_states": _texts(g, samples, 16),
        "encoder_attention_mask": _mask(samples),
    }


def _lumina2_layouts(grid, samples):
    longest = max(TEXTS[s] for s in samples)
    return [Layout.of(grid, text_before=TEXTS[s], padding=longest - TEXTS[s]) for s in samples]


LUMINA2 = Case(
    "Lumina2",
    _lumina2,
    _lumina2_call,
    _lumina2_layouts,
    _names(("layers", 2, "attn")),
    padded=("encoder_hidden_states",),
    grids=IMAGES,
)

CASES = (
    WAN,
    WAN_I2V,
    WAN22,
    WAN_VACE,
    HUNYUAN,
    HUNYUAN_I2V,
    HUNYUAN15,
    HUNYUAN15_I2V,
    COGVIDEOX,
    COGVIDEOX15,
    MOCHI,
    LTX,
    LTX2,
    COSMOS,
    LATTE,
    FLUX,
    KONTEXT,
    FLUX2,
    SD3,
    SD35,
    QWEN,
    QWEN_EDIT,
    PIXART,
    DIT,
    Z_IMAGE,
    HIDREAM,
    AURAFLOW,
    LUMINA2,
)
