"""The parts of the flux-digits pipeline and how they become a directory that
`FluxPipeline.from_pretrained` loads.
"""

import copy
from pathlib import Path

from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from moving_digits import DIGIT_WORDS
from placed_digits import PLACES
from torch import nn
from training import save_pipeline
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

__all__ = [
    "FLOW_SHIFT",
    "LATENT_SCALE",
    "LATENT_SHIFT",
    "TEXT_TOKENS",
    "build_clip",
    "build_clip_tokenizer",
    "build_t5",
    "build_t5_tokenizer",
    "build_transformer",
    "build_vae",
    "export",
]

FLOW_SHIFT = 6.0
TEXT_DIM = 64
# `max_sequence_length` of the pipeline: 4 digits take 24 tokens at most. FluxPipeline gives the T5
# encoder no mask, so padding is part of what the model was trained on: take no other length.
TEXT_TOKENS = 32
# of the pixels, over training images: latents are (2 x 2 means - shift) * scale
LATENT_SHIFT, LATENT_SCALE = -0.4, 3.2
WORDS = (
    *("a", "an", "and"),
    *DIGIT_WORDS,
    *dict.fromkeys(word for place in PLACES for word in place.split()),
)


def build_t5_tokenizer() -> T5TokenizerFast:
    """A T5 tokenizer whose unigram vocabulary is the words of the prompts; anything else becomes
    `<unk>`.
    """
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5TokenizerFast(
        vocab=special + [("▁" + word, -1.0) for word in WORDS], extra_ids=0, model_max_length=512
    )


def build_clip_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer that knows the words of the prompts, one token each.

    Byte pairs are merged from the front of each word, longer words first, so that no merge of a
    shorter word comes in between.
    """
    vocab, merges = {"<|startoftext|>": 0, "<|endoftext|>": 1}, []
    for word in sorted(WORDS, key=len, reverse=True):
        letters = [*word[:-1], word[-1] + "</w>"]
        for letter in letters:
            vocab.setdefault(letter, len(vocab))
        whole = letters[0]
        for letter in letters[1:]:
            if (whole, letter) not in merges:
                merges.append((whole, letter))
            whole += letter
            vocab.setdefault(whole, len(vocab))
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TEXT_TOKENS)


def build_t5(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    """A two-layer T5 encoder; it is trained together with the denoiser."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_DIM,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=32,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    return T5EncoderModel(config)


def build_clip(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A one-layer CLIP text model, for the pooled vector; trained like the other."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_DIM,
        intermediate_size=128,
        projection_dim=TEXT_DIM,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=TEXT_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_transformer() -> FluxTransformer2DModel:
    """Two double and three single blocks of width 192; 256 x 256 pixels are 4096 tokens."""
    model = FluxTransformer2DModel(
        in_channels=12,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=48,
        num_attention_heads=4,
        joint_attention_dim=TEXT_DIM,
        pooled_projection_dim=TEXT_DIM,
        guidance_embeds=False,
        axes_dims_rope=(8, 20, 20),
    )
    # Modulation starts as none, with gates half open: at zero, as usual, nothing below them learns
    # before they have opened, and a short training has no time for that.
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        for norm in block.children():
            if hasattr(norm, "linear"):
                nn.init.zeros_(norm.linear.weight)
                nn.init.zeros_(norm.linear.bias)
                parts = norm.linear.bias.data.view(-1, model.inner_dim)
                parts[2::3] = 0.5  # of (shift, scale, gate), once or twice
    nn.init.zeros_(model.norm_out.linear.weight)
    nn.init.zeros_(model.norm_out.linear.bias)
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.proj_out.bias)
    return model


def build_vae() -> AutoencoderKL:
    """Pixels to latents of half the height and width: three channels, close to the mean colour of
    2 x 2 pixels.
    """
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        layers_per_block=1,
        latent_channels=3,
        norm_num_groups=4,
        sample_size=256,
        scaling_factor=LATENT_SCALE,
        shift_factor=LATENT_SHIFT,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Euler steps on the shifted flow-matching noise levels."""
    return FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT)


def assemble(
    vae: AutoencoderKL,
    clip: CLIPTextModel,
    t5: T5EncoderModel,
    transformer: FluxTransformer2DModel,
) -> FluxPipeline:
    """The pipeline of these parts."""
    return FluxPipeline(
        scheduler=build_scheduler(),
        vae=vae.eval(),
        text_encoder=clip.eval(),
        tokenizer=build_clip_tokenizer(),
        text_encoder_2=t5.eval(),
        tokenizer_2=build_t5_tokenizer(),
        transformer=transformer.eval(),
    )


def export(
    out: Path,
    vae: AutoencoderKL,
    clip: CLIPTextModel,
    t5: T5EncoderModel,
    transformer: FluxTransformer2DModel,
) -> None:
    """Write the pipeline to `out`; the autoencoder and the denoiser go into their files as
    float16, half the size.
    """
    pipe = assemble(copy.deepcopy(vae).half(), clip, t5, copy.deepcopy(transformer).half())
    save_pipeline(pipe, out)
