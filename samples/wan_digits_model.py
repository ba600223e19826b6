"""The parts of the wan-digits pipeline and how they become a directory that
`WanPipeline.from_pretrained` loads.
"""

import copy
from pathlib import Path

from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from moving_digits import DIGIT_WORDS, MOTIONS
from torch import nn
from training import save_pipeline
from transformers import T5TokenizerFast, UMT5Config, UMT5EncoderModel

__all__ = [
    "FLOW_SHIFT",
    "TEXT_DIM",
    "build_scheduler",
    "build_text_encoder",
    "build_tokenizer",
    "build_transformer",
    "export",
]

# 3 for the 32,760 tokens of Wan at 480p, scaled by the root of the tokens as in Esser et al. 2024
# (arXiv 2403.03206, section 5.3.2): 3 * sqrt(4352 / 32760) = 1.09
FLOW_SHIFT = 1.0
TEXT_DIM = 64


def build_tokenizer() -> T5TokenizerFast:
    """A T5 tokenizer whose unigram vocabulary is the words of the prompts; anything else becomes
    `<unk>`.
    """
    words = [
        "a",
        "an",
        "and",
        *DIGIT_WORDS,
        *dict.fromkeys(w for motion in MOTIONS for w in motion.split()),
    ]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5TokenizerFast(
        vocab=special + [("▁" + word, -1.0) for word in words], extra_ids=0, model_max_length=512
    )


def build_text_encoder(tokenizer: T5TokenizerFast) -> UMT5EncoderModel:
    """A two-layer UMT5 encoder; it is trained together with the denoiser."""
    config = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_DIM,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=32,
        dropout_rate=0.0,
        is_encoder_decoder=False,
        use_cache=False,
    )
    return UMT5EncoderModel(config)


def build_transformer() -> WanTransformer3DModel:
    """Four blocks of width 192; patches are single cells: 33 frames of 64x64 are 4352 tokens."""
    model = WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=4,
        attention_head_dim=48,
        in_channels=8,
        out_channels=8,
        text_dim=TEXT_DIM,
        freq_dim=64,
        ffn_dim=448,
        num_layers=4,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=128,
    )
    nn.init.zeros_(model.proj_out.weight)
    # The zero vectors that pad a prompt start with zero keys and values: they say nothing.
    embedder = model.condition_embedder.text_embedder
    for layer in (
        embedder.linear_1,
        embedder.linear_2,
        *(l for b in model.blocks for l in (b.attn2.to_k, b.attn2.to_v)),
    ):
        nn.init.zeros_(layer.bias)
    return model


def build_scheduler(name: str) -> FlowMatchEulerDiscreteScheduler | UniPCMultistepScheduler:
    """`euler` or `unipc`, both on the shifted flow-matching noise levels."""
    if name == "euler":
        return FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT)
    if name == "unipc":
        return UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT
        )
    raise ValueError(f"scheduler must be 'euler' or 'unipc', got {name!r}")


def export(
    out: Path,
    vae: AutoencoderKLWan,
    text_encoder: UMT5EncoderModel,
    transformer: WanTransformer3DModel,
    scheduler: str,
) -> None:
    """Write the pipeline to `out`; the autoencoder goes into its file as float16, half the size."""
    pipe = WanPipeline(
        tokenizer=build_tokenizer(),
        text_encoder=text_encoder.eval(),
        vae=copy.deepcopy(vae).half().eval(),
        transformer=transformer.eval(),
        scheduler=build_scheduler(scheduler),
    )
    save_pipeline(pipe, out)
