"""A Wan pipeline of a few thousand random weights: real classes, loaded like any other."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import T5TokenizerFast, UMT5Config, UMT5EncoderModel

WORDS = ["a", "one", "two", "seven", "moving", "left", "right"]
CALL = {
    "height": 32,
    "width": 48,
    "num_frames": 9,
    "num_inference_steps": 4,
    "guidance_scale": 2.0,
    "max_sequence_length": 16,
}


def build_tiny_wan(path: Path) -> Path:
    """Save the pipeline at `path`; CALL makes 9 frames of 32 x 48, a grid of (5, 8, 12)."""
    torch.manual_seed(0)
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    tokenizer = T5TokenizerFast(
        vocab=special + [("▁" + word, -1.0) for word in WORDS],
        extra_ids=0,
        model_max_length=64,
    )
    text_encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer),
            d_model=16,
            d_kv=8,
            d_ff=16,
            num_layers=1,
            num_heads=2,
            is_encoder_decoder=False,
            use_cache=False,
        )
    )
    transformer = WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
    )
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
        scale_factor_temporal=2,
        scale_factor_spatial=4,
    )
    pipe = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder.eval(),
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipe.save_pretrained(path)
    return path


def tiny_wan_config(path: Path) -> dict:
    """The entry of `configs/model` for the pipeline at `path`."""
    return {
        "name": "tiny-wan",
        "pipeline": "diffusers.WanPipeline",
        "path": str(path),
        "dtype": "float32",
        "device": "cpu",
        "call": CALL,
        "fps": 8,
        "classifier": "",
        "prompts": ["a seven moving left", "a two moving right"],
        "calibration": ["a one moving left"],
    }
