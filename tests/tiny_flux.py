"""A Flux pipeline of a few thousand random weights: real classes, loaded like any other."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

WORDS = ["a", "one", "two", "seven", "and", "top", "left", "right"]
CALL = {
    "height": 32,
    "width": 48,
    "num_inference_steps": 4,
    "true_cfg_scale": 2.0,
    "negative_prompt": "",
    "max_sequence_length": 16,
}


def build_tiny_flux(path: Path) -> Path:
    """Save the pipeline at `path`; CALL makes an image of 32 x 48: 16 text tokens and a grid of
    (1, 8, 12).
    """
    torch.manual_seed(0)
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    t5_tokenizer = T5TokenizerFast(
        vocab=special + [("▁" + word, -1.0) for word in WORDS],
        extra_ids=0,
        model_max_length=64,
    )
    letters = sorted({x for word in WORDS for x in (*word, word[-1] + "</w>")})
    vocab = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    vocab |= {letter: i for i, letter in enumerate(letters, 2)}
    clip_tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=64)
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer),
            d_model=16,
            d_kv=8,
            d_ff=16,
            num_layers=1,
            num_heads=2,
            is_encoder_decoder=False,
            use_cache=False,
        )
    )
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=64,
            bos_token_id=clip_tokenizer.bos_token_id,
            eos_token_id=clip_tokenizer.eos_token_id,
            pad_token_id=clip_tokenizer.pad_token_id,
        )
    )
    transformer = FluxTransformer2DModel(
        in_channels=12,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=24,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 10, 10),
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        layers_per_block=1,
        latent_channels=3,
        norm_num_groups=2,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae.eval(),
        text_encoder=clip.eval(),
        tokenizer=clip_tokenizer,
        text_encoder_2=t5.eval(),
        tokenizer_2=t5_tokenizer,
        transformer=transformer.eval(),
    )
    pipe.save_pretrained(path)
    return path


def tiny_flux_config(path: Path) -> dict:
    """The entry of `configs/model` for the pipeline at `path`."""
    return {
        "name": "tiny-flux",
        "pipeline": "diffusers.FluxPipeline",
        "path": str(path),
        "dtype": "float32",
        "device": "cpu",
        "call": CALL,
        "classifier": "",
        "places": {"top left": [0, 0, 16, 24], "right": [0, 24, 32, 48]},
        "prompts": ["a seven top left", "a two right"],
        "calibration": ["a one right"],
    }
