"""Small masked diffusion language models of every kind that accel takes.

Two are transformers' own classes; three follow the structure of remote code that is on the hub:
where their attention is called, what their `forward` takes, and which masks they heed.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AttentionInterface,
    EuroBertConfig,
    EuroBertForMaskedLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY, MASK, LONGEST = 96, 95, 640
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": LONGEST,
    "initializer_range": 0.25,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "mask_token_id": MASK,
}


def euro_bert(**changes):
    """Bidirectional by itself, through AttentionInterface."""
    torch.manual_seed(0)
    return EuroBertForMaskedLM(EuroBertConfig(**{**SIZES, "head_dim": 8, **changes})).eval()


def qwen3(**changes):
    """A causal class, loaded with is_causal=False (SDAR's and Dream's parents are of this kind)."""
    torch.manual_seed(1)
    config = Qwen3Config(**{**SIZES, "head_dim": 16, "is_causal": False, **changes})
    return Qwen3ForCausalLM(config).eval()


class _Norm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return x * x.pow(2).mean(-1, keepdim=True).add(1e-6).rsqrt() * self.weight


def _turned(x, positions):
    """Rotary positions of x [batch, heads, tokens, dim]; positions [batch or 1, tokens]."""
    half = x.shape[-1] // 2
    frequency = 10_000.0 ** (-torch.arange(half) / half)
    angle = positions[:, None, :, None] * frequency
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


class _CountingRotary(nn.Module):
    def forward(self, q, k):
        length, queries = k.shape[-2], q.shape[-2]
        places = torch.arange(length, device=q.device)[None]
        return _turned(q, places[:, length - queries :]), _turned(k, places)


class _LladaBlock(nn.Module):
    """Attention and feed-forward in one module, whose method calls `F`'s SDPA without a mask."""

    def __init__(self, size, heads, kv_heads):
        super().__init__()
        self.heads, self.kv_heads, dim = heads, kv_heads, size // heads
        self.attn_norm, self.ff_norm = _Norm(size), _Norm(size)
        self.q_proj = nn.Linear(size, size, bias=False)
        self.k_proj = nn.Linear(size, kv_heads * dim, bias=False)
        self.v_proj = nn.Linear(size, kv_heads * dim, bias=False)
        self.attn_out = nn.Linear(size, size, bias=False)
        self.ff_proj = nn.Linear(size, 2 * size, bias=False)
        self.ff_out = nn.Linear(2 * size, size, bias=False)
        self.rotary_emb = _CountingRotary()

    def _scaled_dot_product_attention(self, q, k, v):
        groups = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=None, is_causal=False)

    def forward(self, x):
        batch, tokens, size = x.shape
        y = self.attn_norm(x)
        q, k, v = (
            project(y).view(batch, tokens, n, -1).transpose(1, 2)
            for project, n in (
                (self.q_proj, self.heads),
                (self.k_proj, self.kv_heads),
                (self.v_proj, self.kv_heads),
            )
        )
        q, k = self.rotary_emb(q, k)
        y = self._scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, size)
        x = x + self.attn_out(y)
        return x + self.ff_out(F.silu(self.ff_proj(self.ff_norm(x))))


class _RemoteConfig(PretrainedConfig):
    model_type = "tiny-remote"

    def __init__(self, d_model=48, n_heads=6, n_kv_heads=6, n_layers=3, **kwargs):
        super().__init__(**kwargs)
        self.d_model, self.n_heads, self.n_kv_heads = d_model, n_heads, n_kv_heads
        self.n_layers = n_layers
        self.max_sequence_length = LONGEST
        self.mask_token_id = MASK


class _Remote(PreTrainedModel):
    config_class = _RemoteConfig
    _supports_sdpa = True

    def _init_weights(self, module):
        pass


class TinyLlada(_Remote):
    """LLaDA-8B: no position_ids, no mask heeded, positions counted in every block."""

    def __init__(self, config):
        super().__init__(config)
        size = config.d_model
        blocks = [
            _LladaBlock(size, config.n_heads, config.n_kv_heads) for _ in range(config.n_layers)
        ]
        self.model = nn.Module()
        self.model.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCABULARY, size),
                "blocks": nn.ModuleList(blocks),
                "ln_f": _Norm(size),
                "ff_out": nn.Linear(size, VOCABULARY, bias=False),
            }
        )

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, use_cache=None):
        parts = self.model.transformer
        x = parts["wte"](input_ids)
        for block in parts["blocks"]:
            x = block(x)
        return SimpleNamespace(logits=parts["ff_out"](parts["ln_f"](x)))


class _DreamAttention(nn.Module):
    def __init__(self, size, heads, kv_heads):
        super().__init__()
        self.num_heads, self.num_key_value_heads = heads, kv_heads
        self.head_dim = size // heads
        self.q_proj = nn.Linear(size, size)
        self.k_proj = nn.Linear(size, kv_heads * self.head_dim)
        self.v_proj = nn.Linear(size, kv_heads * self.head_dim)
        self.o_proj = nn.Linear(size, size, bias=False)

    def forward(self, hidden_states, attention_mask=None, position_ids=None):
        batch, tokens, size = hidden_states.shape
        q, k, v = (
            project(hidden_states).view(batch, tokens, -1, self.head_dim).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = _turned(q, position_ids), _turned(k, position_ids)
        groups = self.num_heads // self.num_key_value_heads
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=attention_mask, dropout_p=0.0, is_causal=False
        )
        return self.o_proj(out.transpose(1, 2).reshape(batch, tokens, size))


class _DreamLayer(nn.Module):
    def __init__(self, size, heads, kv_heads):
        super().__init__()
        self.self_attn = _DreamAttention(size, heads, kv_heads)
        self.mlp = nn.Sequential(nn.Linear(size, 2 * size), nn.SiLU(), nn.Linear(2 * size, size))
        self.input_layernorm, self.post_attention_layernorm = _Norm(size), _Norm(size)

    def forward(self, x, attention_mask, position_ids):
        x = x + self.self_attn(self.input_layernorm(x), attention_mask, position_ids)
        return x + self.mlp(self.post_attention_layernorm(x))


class TinyDream(_Remote):
    """Dream: logits of a token stand before it; masks have four axes, or are the word "full"."""

    def __init__(self, config):
        super().__init__(config)
        size = config.d_model
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(VOCABULARY, size)
        self.model.layers = nn.ModuleList(
            _DreamLayer(size, config.n_heads, config.n_kv_heads) for _ in range(config.n_layers)
        )
        self.model.norm = _Norm(size)
        self.lm_head = nn.Linear(size, VOCABULARY, bias=False)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids=None, attention_mask="full", position_ids=None):
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        mask = None if isinstance(attention_mask, str) else attention_mask
        if mask is not None and mask.ndim != 4:
            raise ValueError("attention_mask must have four axes")
        x = self.model.embed_tokens(input_ids)
        for layer in self.model.layers:
            x = layer(x, mask, position_ids)
        return SimpleNamespace(logits=self.lm_head(self.model.norm(x)))


ALL_ATTENTION_FUNCTIONS = AttentionInterface()


class _BlockCausalAttention(nn.Module):
    """LLaDA2's: through the interface, with whatever mask of four axes it is given."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.head_dim = config.head_dim
        self.is_causal = False
        size, dim = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(size, config.num_attention_heads * dim, bias=False)
        self.k_proj = nn.Linear(size, config.num_key_value_heads * dim, bias=False)
        self.v_proj = nn.Linear(size, config.num_key_value_heads * dim, bias=False)
        self.dense = nn.Linear(config.num_attention_heads * dim, size, bias=False)

    def forward(self, x, attention_mask, position_ids):
        batch, tokens, _ = x.shape
        q, k, v = (
            project(x).view(batch, tokens, -1, self.head_dim).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = _turned(q, position_ids), _turned(k, position_ids)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
        out, _ = attend(self, q, k, v, attention_mask, dropout=0.0, scaling=self.head_dim**-0.5)
        return self.dense(out.reshape(batch, tokens, -1))


class _BlockCausalLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        size = config.hidden_size
        self.attention = _BlockCausalAttention(config, layer_idx)
        self.mlp = nn.Sequential(nn.Linear(size, 2 * size), nn.SiLU(), nn.Linear(2 * size, size))
        self.input_layernorm, self.post_attention_layernorm = _Norm(size), _Norm(size)

    def forward(self, x, attention_mask, position_ids):
        x = x + self.attention(self.input_layernorm(x), attention_mask, position_ids)
        return x + self.mlp(self.post_attention_layernorm(x))


class _BlockCausalConfig(PretrainedConfig):
    model_type = "tiny-block-causal"

    def __init__(self, block_length=16, **kwargs):
        sizes = {**SIZES, "head_dim": 8}
        for name in (*sizes, "block_length"):
            setattr(self, name, kwargs.pop(name, {**sizes, "block_length": block_length}[name]))
        super().__init__(**kwargs)


class TinyLlada2(PreTrainedModel):
    """LLaDA2: both ways inside a block, causal from block to block."""

    config_class = _BlockCausalConfig
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config):
        super().__init__(config)
        size = config.hidden_size
        self.model = nn.Module()
        self.model.word_embeddings = nn.Embedding(VOCABULARY, size)
        self.model.layers = nn.ModuleList(
            _BlockCausalLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.model.norm = _Norm(size)
        self.lm_head = nn.Linear(size, VOCABULARY, bias=False)

    def _init_weights(self, module):
        pass

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        tokens = input_ids.shape[1]
        if position_ids is None:
            position_ids = torch.arange(tokens, device=input_ids.device)[None]
        number = torch.arange(tokens, device=input_ids.device) // self.config.block_length
        mask = (number[:, None] >= number)[None, None]
        if attention_mask is not None:
            mask = mask & (attention_mask != 0)[:, None, None]
        x = self.model.word_embeddings(input_ids)
        for layer in self.model.layers:
            x = layer(x, mask, position_ids)
        return SimpleNamespace(logits=self.lm_head(self.model.norm(x)))


def _spread(model):
    """Weights large enough for confident logits, and for attention that is not flat."""
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            nn.init.normal_(weight, std=0.25 if "mlp" not in name else 0.1)
    return model.eval()


def llada(**changes):
    torch.manual_seed(2)
    return _spread(TinyLlada(_RemoteConfig(**changes)))


def dream(**changes):
    torch.manual_seed(3)
    return _spread(TinyDream(_RemoteConfig(**{"n_kv_heads": 2, **changes})))


def llada2(**changes):
    torch.manual_seed(4)
    return _spread(TinyLlada2(_BlockCausalConfig(**changes)))


MODELS = {"euro_bert": euro_bert, "qwen3": qwen3, "llada": llada, "dream": dream, "llada2": llada2}
PADDED = ("euro_bert", "qwen3", "dream")  # those that heed a mask of padding
