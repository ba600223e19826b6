"""Video diffusion transformers: where their sites are, and where text and video tokens stand."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch

from accel.layout import Layout
from accel.pipelines.adapters import Adapter, Call, register
from accel.pipelines.token_order import patched


def _video_alone(model: Any, call: Call) -> Layout:
    """Wan, Cosmos: [batch, channels, t, h, w] in patches of (t, h, w); text is cross-attended."""
    return Layout.of(patched(call["hidden_states"].shape, model.config.patch_size))


def _hunyuan(model: Any, call: Call) -> list[Layout]:
    """HunyuanVideo: [video, text, padding of the text]; a sample's mask counts its text."""
    config, mask = model.config, call["encoder_attention_mask"]
    p = config.patch_size
    grid = patched(call["hidden_states"].shape, (config.patch_size_t, p, p))
    valid = mask.sum(1).int().tolist()
    return [Layout.of(grid, text_after=n, padding=mask.shape[1] - n) for n in valid]


def _hunyuan15(model: Any, call: Call) -> list[Layout]:
    """HunyuanVideo 1.5: [video, condition image, ByT5's text, the other text, all their padding].

    Image embeddings of zeros (text to video) are padding.
    """
    config = model.config
    p = config.patch_size
    grid = patched(call["hidden_states"].shape, (config.patch_size_t, p, p))
    masks = [call["encoder_attention_mask"], call["encoder_attention_mask_2"]]
    image = call["image_embeds"]
    seen = 0 if bool((image == 0).all()) else image.shape[1]
    whole = sum(mask.shape[1] for mask in masks) + image.shape[1]
    valid = [seen + int(n) for n in sum(mask.bool().sum(1) for mask in masks).tolist()]
    return [Layout.of(grid, text_after=n, padding=whole - n) for n in valid]


def _cogvideox(model: Any, call: Call) -> Layout:
    """CogVideoX: [text, video]; latents [batch, t, channels, h, w], in 1.5 patched in time."""
    config = model.config
    b, t, _, h, w = call["hidden_states"].shape
    patch = (config.patch_size_t or 1, config.patch_size, config.patch_size)
    text = call["encoder_hidden_states"].shape[1]
    return Layout.of(patched((b, t, h, w), patch), text_before=text)


def _mochi(model: Any, call: Call) -> list[Layout]:
    """Mochi: [video, text]; it calls attention sample by sample, and leaves padding out itself."""
    p = model.config.patch_size
    grid = patched(call["hidden_states"].shape, (1, p, p))
    valid = call["encoder_attention_mask"].bool().sum(1).tolist()
    return [Layout.of(grid, text_after=n) for n in valid]


def _ltx(model: Any, call: Call) -> Layout | str:
    """LTX, LTX2's video: tokens [batch, t * h * w, channels], whose grid is given beside them."""
    grid = tuple(call[name] for name in ("num_frames", "height", "width"))
    tokens = call["hidden_states"].shape[1]
    if None in grid or prod(grid) != tokens:
        return (
            f"the call has {tokens} video tokens, and num_frames, height and width are {grid};"
            " pass layout= to accel.enable"
        )
    return Layout.of(grid)


def _latte(model: Any, call: Call) -> dict[str, Layout]:
    """Latte: attention over the h * w tokens of a frame, and over the t frames of a token."""
    p = model.config.patch_size
    t, h, w = patched(call["hidden_states"].shape, (1, p, p))
    space, time = Layout.of((1, h, w)), Layout.of((t, 1, 1))
    blocks = range(len(model.transformer_blocks))
    return {f"transformer_blocks.{i}.attn1": space for i in blocks} | {
        f"temporal_transformer_blocks.{i}.attn1": time for i in blocks
    }


def _latents(model: Any, patch: Sequence[int]) -> torch.Tensor:
    t, h, w = patch
    channels: int = model.config.in_channels
    return torch.zeros(1, channels, t, 2 * h, 3 * w)


def _wan_probe(model: Any) -> dict[str, Any]:
    config = model.config
    image = getattr(config, "image_dim", None)
    probe = {
        "hidden_states": _latents(model, config.patch_size),
        "timestep": torch.zeros(1, dtype=torch.long),
        "encoder_hidden_states": torch.zeros(1, 512 if image else 2, config.text_dim),
        "encoder_hidden_states_image": torch.zeros(1, 1, image) if image else None,
    }
    if hasattr(config, "vace_layers"):
        t, h, w = config.patch_size
        probe["control_hidden_states"] = torch.zeros(1, config.vace_in_channels, t, 2 * h, 3 * w)
    return probe


def _hunyuan_probe(model: Any) -> dict[str, Any]:
    config = model.config
    p = config.patch_size
    return {
        "hidden_states": _latents(model, (config.patch_size_t, p, p)),
        "timestep": torch.zeros(1, dtype=torch.long),
        "encoder_hidden_states": torch.zeros(1, 2, config.text_embed_dim),
        "encoder_attention_mask": torch.ones(1, 2, dtype=torch.long),
        "pooled_projections": torch.zeros(1, config.pooled_projection_dim),
        "guidance": torch.zeros(1) if config.guidance_embeds else None,
    }


def _hunyuan15_probe(model: Any) -> dict[str, Any]:
    config = model.config
    p = config.patch_size
    return {
        "hidden_states": _latents(model, (config.patch_size_t, p, p)),
        "timestep": torch.zeros(1),
        "encoder_hidden_states": torch.zeros(1, 2, config.text_embed_dim),
        "encoder_attention_mask": torch.ones(1, 2, dtype=torch.long),
        "timestep_r": torch.zeros(1) if config.use_meanflow else None,
        "encoder_hidden_states_2": torch.zeros(1, 2, config.text_embed_2_dim),
        "encoder_attention_mask_2": torch.ones(1, 2, dtype=torch.long),
        "image_embeds": torch.zeros(1, 1, config.image_embed_dim),
    }


def _cogvideox_probe(model: Any) -> dict[str, Any]:
    config = model.config
    p, t = config.patch_size, config.patch_size_t or 1
    size, frames, text = (p, p), t, 2
    if not config.use_rotary_positional_embeddings or config.use_learned_positional_embeddings:
        # its positions are a table: only the trained size fits
        size, text = (config.sample_height, config.sample_width), config.max_text_seq_length
        frames = (config.sample_frames - 1) // config.temporal_compression_ratio + 1
    rotary = None
    if config.use_rotary_positional_embeddings:
        tokens = frames // t * (size[0] // p) * (size[1] // p)
        rotary = (torch.ones(tokens, config.attention_head_dim),) * 2
    return {
        "hidden_states": torch.zeros(1, frames, config.in_channels, *size),
        "encoder_hidden_states": torch.zeros(1, text, config.text_embed_dim),
        "timestep": torch.zeros(1, dtype=torch.long),
        "ofs": torch.zeros(1) if config.ofs_embed_dim else None,
        "image_rotary_emb": rotary,
    }


def _mochi_probe(model: Any) -> dict[str, Any]:
    config = model.config
    p = config.patch_size
    return {
        "hidden_states": _latents(model, (1, p, p)),
        "encoder_hidden_states": torch.zeros(1, 2, config.text_embed_dim),
        "timestep": torch.zeros(1),
        "encoder_attention_mask": torch.ones(1, 2, dtype=torch.bool),
    }


def _ltx_probe(model: Any) -> dict[str, Any]:
    config = model.config
    return {
        "hidden_states": torch.zeros(1, 6, config.in_channels),
        "encoder_hidden_states": torch.zeros(1, 2, config.caption_channels),
        "timestep": torch.zeros(1),
        "encoder_attention_mask": torch.ones(1, 2, dtype=torch.long),
        "num_frames": 1,
        "height": 2,
        "width": 3,
    }


def _ltx2_probe(model: Any) -> dict[str, Any]:
    config = model.config
    text = config.caption_channels
    video, audio = (text, text)
    if not config.use_prompt_embeddings:  # they come projected
        video, audio = config.cross_attention_dim, config.audio_cross_attention_dim
    return {
        "hidden_states": torch.zeros(1, 6, config.in_channels),
        "audio_hidden_states": torch.zeros(1, 2, config.audio_in_channels),
        "encoder_hidden_states": torch.zeros(1, 2, video),
        "audio_encoder_hidden_states": torch.zeros(1, 2, audio),
        "timestep": torch.zeros(1),
        "sigma": torch.zeros(1),
        "num_frames": 1,
        "height": 2,
        "width": 3,
        "audio_num_frames": 2,
    }


def _cosmos_probe(model: Any) -> dict[str, Any]:
    config = model.config
    t, h, w = config.patch_size
    hidden = _latents(model, (t, h, w))
    probe: dict[str, Any] = {
        "timestep": torch.zeros(1),
        "encoder_hidden_states": torch.zeros(
            1,
            2,
            config.crossattn_proj_in_channels
            if config.use_crossattn_projection
            else config.text_embed_dim,
        ),
    }
    if config.concat_padding_mask:
        probe["padding_mask"] = torch.zeros(1, 1, 2 * h, 3 * w)
    return {"hidden_states": hidden, **probe}


def _latte_probe(model: Any) -> dict[str, Any]:
    config = model.config
    side = config.sample_size
    return {
        "hidden_states": torch.zeros(1, config.in_channels, config.video_length, side, side),
        "timestep": torch.zeros(1, dtype=torch.long),
        "encoder_hidden_states": torch.zeros(1, 2, config.caption_channels),
    }


SELF = r"transformer_blocks\.\d+\.attn1"

for _adapter in (
    Adapter(
        classes=("WanTransformer3DModel", "WanVACETransformer3DModel"),
        sites=r"(vace_)?blocks\.\d+\.attn1",
        layout=_video_alone,
        probe=_wan_probe,
    ),
    Adapter(
        classes=("HunyuanVideoTransformer3DModel",),
        sites=r"(single_)?transformer_blocks\.\d+\.attn",
        contents=("encoder_attention_mask",),
        layout=_hunyuan,
        probe=_hunyuan_probe,
    ),
    Adapter(
        classes=("HunyuanVideo15Transformer3DModel",),
        sites=r"transformer_blocks\.\d+\.attn",
        contents=("encoder_attention_mask", "encoder_attention_mask_2", "image_embeds"),
        layout=_hunyuan15,
        probe=_hunyuan15_probe,
        vector_masks=True,
    ),
    Adapter(
        classes=("CogVideoXTransformer3DModel",),
        sites=SELF,
        reads=("encoder_hidden_states",),
        layout=_cogvideox,
        probe=_cogvideox_probe,
    ),
    Adapter(
        classes=("MochiTransformer3DModel",),
        sites=SELF,
        contents=("encoder_attention_mask",),
        layout=_mochi,
        probe=_mochi_probe,
    ),
    Adapter(
        classes=("LTXVideoTransformer3DModel",),
        sites=SELF,
        reads=("num_frames", "height", "width"),
        layout=_ltx,
        probe=_ltx_probe,
    ),
    Adapter(
        classes=("LTX2VideoTransformer3DModel",),
        sites=SELF,
        reads=("num_frames", "height", "width"),
        layout=_ltx,
        probe=_ltx2_probe,
    ),
    Adapter(
        classes=("CosmosTransformer3DModel",),
        sites=SELF,
        layout=_video_alone,
        probe=_cosmos_probe,
    ),
    Adapter(
        classes=("LatteTransformer3DModel",),
        sites=r"(temporal_)?transformer_blocks\.\d+\.attn1",
        layout=_latte,
        probe=_latte_probe,
    ),
):
    register(_adapter)
