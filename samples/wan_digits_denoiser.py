"""Training of the wan-digits denoiser and text encoder by flow matching on cached latents.

    x_s = (1 - s) x_0 + s e,    the model predicts e - x_0 at timestep 1000 s.

Clips grow during the run: crops of single latent frames around a digit first (100 tokens, cheap),
then whole frames, then three or seven of the seventeen frames of a video, mostly far apart, then
all of them (4352 tokens) in turn with these. Positions enter by rotation only, so what a crop
teaches carries over, and frames keep the times at which they were taken: seven frames teach the
motion of the whole video at an eighth of the cost of its attention, and three of many videos what
digits look like.

A head that is thrown away afterwards reads from the third block which digit's square covers each
cell, and where in the square the cell lies. The velocity says little about that: a digit that is
not the prompted one costs a few strokes of squared error, but the whole of this loss. Aligning
hidden states with what they should mean speeds up diffusion transformers (REPA, arXiv 2410.06940;
there with the features of a pretrained encoder).
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from denoising import BACKGROUND, MeaningHead, noise_levels, optimisers, rate_at
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from training import Average, average_gradients, rank_and_world
from transformers import UMT5EncoderModel

__all__ = ["Clips", "DenoiserSettings", "Latents", "Phase", "denoiser_step", "install_processors"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Clips:
    """A batch of `frames` latent frames of videos, `side` cells high and wide.

    shift: of the noise levels. Where the digits are is told by all tokens of a clip together, so it
    is settled at the more noise the more tokens there are, and the levels follow the root of their
    number (Esser et al. 2024, arXiv 2403.03206, section 5.3.2).
    digit_weight: extra loss weight of the squares of digits. By squares, not by strokes: weights
    that follow the strokes make them thick.
    """

    frames: int
    side: int
    batch: int
    shift: float = 3.0
    digit_weight: float = 3.0


@dataclass(frozen=True, slots=True)
class Phase:
    """Up to `until` (fraction of the stage) train on `clips`, step by step in turn."""

    until: float
    clips: tuple[Clips, ...]


FEW = Clips(frames=3, side=16, batch=12)
SOME = Clips(frames=7, side=16, batch=4, shift=4.6)
ALL = Clips(frames=17, side=16, batch=2, shift=7.0)
FINAL = tuple(
    # extra weight would bias the result, so there is none at the end
    replace(c, digit_weight=0.0)
    for c in (ALL, SOME, SOME)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DenoiserSettings:
    """Numbers of the denoiser stage."""

    phases: tuple[Phase, ...] = (
        Phase(0.2, (Clips(frames=1, side=10, batch=40, shift=2.0),)),
        Phase(0.3, (Clips(frames=1, side=16, batch=24, shift=2.0),)),
        Phase(0.65, (FEW, FEW, SOME)),
        Phase(0.85, (ALL, SOME, SOME)),
        Phase(1.0, FINAL),
    )
    muon_rate: float = 4e-3
    adam_rate: float = 2e-3
    prompt_dropout: float = 0.12
    average_decay: float = 0.995
    head_block: int = 2
    head_weight: float = 0.4


@dataclass(frozen=True)
class Latents:
    """The cache: latents `[n, 8, 17, 16, 16]` (normalised, float16), digits `[n, 17, 16, 16]` and
    inside `[n, 17, 2, 16, 16]` of `digits_in_cells`, token ids `[n, l]`.
    """

    latents: Tensor
    digits: Tensor
    inside: Tensor
    ids: Tensor
    lengths: Tensor
    empty_id: int

    @staticmethod
    def _corner(shown: Tensor, shift: list[int], side: int) -> tuple[int, int]:
        """Upper left cell of a crop around the digit in `shown` `[16, 16]`, off centre by `shift`
        cells.
        """
        place = torch.arange(len(shown), dtype=torch.float32) + 0.5
        centre = torch.stack(
            [(shown.sum(1) * place).sum(), (shown.sum(0) * place).sum()]
        ) / shown.sum().clamp(min=1e-3)
        corner = (centre - side / 2).round().long() + torch.tensor(shift)
        return tuple(corner.clamp(0, len(shown) - side).tolist())

    def _times(self, count: int, random: torch.Generator) -> Tensor:
        """`count` frames of a video in order: neighbours, every second one, or any."""
        total = self.latents.shape[2]
        stride = int(torch.randint(4, (), generator=random))
        room = total - 1 - stride * (count - 1)
        if stride in (1, 2) and room >= 0:
            start = int(torch.randint(room + 1, (), generator=random))
            return start + stride * torch.arange(count)
        return torch.randperm(total, generator=random)[:count].sort().values

    def batch(
        self, clips: Clips, seed: int, step: int
    ) -> tuple[dict[str, Tensor], torch.Generator]:
        """Clips of step `step` with the times of their frames `[b, frames]`, a function of `(seed,
        step)` and their kind alone; and the generator for what else is random in the step.
        """
        random = torch.Generator().manual_seed(seed * 1_000_003 + 500_000 + step)
        # A crop shows one digit, so its prompt must name one only.
        pool = (
            torch.arange(len(self.latents))
            if clips.side == 16
            else (self.lengths == self.lengths.min()).nonzero()[:, 0]
        )
        videos = pool[torch.randint(len(pool), (clips.batch,), generator=random)]
        times = torch.stack([self._times(clips.frames, random) for _ in range(clips.batch)])
        jitter = torch.randint(-1, 2, (clips.batch, 2), generator=random)
        rows = []
        for video, when, shift in zip(videos.tolist(), times, jitter.tolist(), strict=True):
            digits = self.digits[video, when]
            h, w = self._corner((digits[0] != BACKGROUND).float(), shift, clips.side)
            here = (..., slice(h, h + clips.side), slice(w, w + clips.side))
            rows.append(
                (self.latents[video][:, when][here], digits[here], self.inside[video, when][here])
            )
        clean, digits, inside = (torch.stack(parts) for parts in zip(*rows, strict=True))
        batch = {
            "clean": clean.float(),
            "digits": digits.long(),
            "inside": inside.float(),
            "times": times,
            "ids": self.ids[videos],
            "lengths": self.lengths[videos],
        }
        return batch, random


class _FrameRotary:
    """The rotation of frames that were taken at `times` `[b, frames]`, in place of
    `WanRotaryPosEmbed.forward`, which numbers them from zero.
    """

    def __init__(self, rope: nn.Module) -> None:
        self.own = rope.forward
        self.times: Tensor | None = None

    def __call__(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        _, _, _, height, width = latents.shape
        last = int(self.times.max()) + 1
        tables = self.own(latents.new_empty(1, 1, last, height, width))
        return tuple(
            table.unflatten(1, (last, height * width))[0][self.times].flatten(1, 2)
            for table in tables
        )


class _PaddedCrossAttention:
    """Cross-attention in which one zero embedding stands for all padding.

    `WanPipeline` pads prompts with zero vectors up to `max_sequence_length` and Wan attends to
    them. n equal keys weigh as much as one key whose logit is raised by log(n); `bias` `[b, 1, 1,
    l]` carries that.
    """

    bias: Tensor | None = None

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None
    ) -> Tensor:
        heads = (attn.heads, -1)
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, heads).transpose(1, 2)
        key = attn.norm_k(attn.to_k(encoder_hidden_states)).unflatten(2, heads).transpose(1, 2)
        value = attn.to_v(encoder_hidden_states).unflatten(2, heads).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=self.bias)
        return attn.to_out[0](mixed.transpose(1, 2).flatten(2))


class _FastSelfAttention:
    """What `WanAttnProcessor` computes, with the rotation as one complex product: fewer passes over
    memory.
    """

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None
    ) -> Tensor:
        cosine, sine = rotary_emb
        rotation = torch.complex(cosine[..., 0::2].float(), sine[..., 1::2].float())

        def rotated(x: Tensor) -> Tensor:
            pairs = torch.view_as_complex(x.unflatten(2, (attn.heads, -1, 2)))
            return torch.view_as_real(pairs * rotation).flatten(3).transpose(1, 2)

        query = rotated(attn.norm_q(attn.to_q(hidden_states)))
        key = rotated(attn.norm_k(attn.to_k(hidden_states)))
        value = attn.to_v(hidden_states).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return attn.to_out[0](mixed.transpose(1, 2).flatten(2))


def install_processors(
    transformer: WanTransformer3DModel,
) -> tuple[list[_PaddedCrossAttention], _FrameRotary]:
    """Give every attention its training processor; returns those of the cross-attentions, whose
    `bias` is to be set, and the rotation, whose `times` are.
    """
    rotary = transformer.rope.forward = _FrameRotary(transformer.rope)
    processors = [_PaddedCrossAttention() for _ in transformer.blocks]
    for block, processor in zip(transformer.blocks, processors, strict=True):
        block.attn1.set_processor(_FastSelfAttention())
        block.attn2.set_processor(processor)
    return processors, rotary


def _padding(size: int, progress: float, random: torch.Generator) -> Tensor:
    """Numbers of padding tokens: one to four at first, log-uniform in 24 to 512 from the middle of
    the stage on.

    With hundreds of padding keys from the start the words get a hundredth of the attention, their
    gradient drowns,
    and the text is never learned.
    """
    grown = min(1.0, max(0.0, (progress - 0.15) / 0.4))
    low, high = grown * math.log(24), (1 - grown) * math.log(4) + grown * math.log(512)
    return (
        torch.exp(torch.empty(size).uniform_(low, high, generator=random))
        .round()
        .long()
        .clamp(min=1)
    )


def embed_prompts(
    encoder: UMT5EncoderModel, ids: Tensor, lengths: Tensor, padded: Tensor
) -> tuple[Tensor, Tensor]:
    """Embeddings `[b, l + 1, d]` (zero from each length on) and the bias `[b, 1, 1, l + 1]` for
    `padded` tokens in all.
    """
    position = torch.arange(ids.shape[1] + 1)
    valid = position[:-1] < lengths[:, None]
    states = encoder(ids, valid.long()).last_hidden_state * valid[..., None]
    bias = torch.where(position < lengths[:, None], 0.0, -1e4)
    bias[torch.arange(len(ids)), lengths] = torch.log((padded - lengths).float())
    return F.pad(states, (0, 0, 0, 1)), bias[:, None, None]


def denoiser_step(
    transformer, encoder, cache: Latents, settings: DenoiserSettings, seed: int, begin: float = 0.0
):
    """The step function of the stage, and the parts of its checkpoint.

    begin: the fraction of the stage that given weights have behind them.
    """
    rank, world = rank_and_world()
    processors, rotary = install_processors(transformer)
    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    head = MeaningHead(transformer.blocks[settings.head_block], width)
    muon, adam = optimisers(
        transformer.blocks, [transformer, encoder, head], settings.muon_rate, settings.adam_rate
    )
    parameters = [p for m in (transformer, encoder, head) for p in m.parameters()]
    average = Average({"transformer": transformer, "text_encoder": encoder}, settings.average_decay)

    def step(index: int, progress: float) -> dict[str, float]:
        progress = begin + (1 - begin) * progress
        phase = next(p for p in settings.phases if progress < p.until or p is settings.phases[-1])
        clips = phase.clips[index % len(phase.clips)]
        rate = rate_at(index, progress)
        muon.param_groups[0]["lr"], adam.param_groups[0]["lr"] = (
            settings.muon_rate * rate,
            settings.adam_rate * rate,
        )
        batch, random = cache.batch(clips, seed, index)
        clean, ids, lengths = (batch[k] for k in ("clean", "ids", "lengths"))
        size = len(clean)
        dropped = torch.rand(size, generator=random) < settings.prompt_dropout
        ids[dropped], lengths[dropped] = (
            F.pad(torch.tensor([cache.empty_id]), (0, ids.shape[1] - 1)),
            1,
        )
        padded = lengths + _padding(size, progress, random)
        sigma = noise_levels(size, clips.shift, random)
        noise = torch.randn(clean.shape, generator=random)
        mine = slice(rank, None, world)  # every rank draws the whole batch and computes its share
        clean, digits, inside, rotary.times = (
            batch[k][mine] for k in ("clean", "digits", "inside", "times")
        )
        ids, lengths, padded, sigma, noise = (x[mine] for x in (ids, lengths, padded, sigma, noise))
        s = sigma.view(-1, 1, 1, 1, 1)
        embeds, bias = embed_prompts(encoder, ids, lengths, padded)
        for processor in processors:
            processor.bias = bias
        velocity = transformer(
            (1 - s) * clean + s * noise, sigma * 1000, embeds, return_dict=False
        )[0]
        squared = (velocity - (noise - clean)).square()
        weight = 1 + clips.digit_weight * (digits != BACKGROUND)[:, None]
        meant = head(digits.flatten(1), inside.movedim(2, -1).flatten(1, 3))
        loss = (squared * weight).mean() / weight.mean() + settings.head_weight * meant
        for optimiser in (muon, adam):
            optimiser.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(parameters)
        nn.utils.clip_grad_norm_(adam.param_groups[0]["params"], 1.0)
        muon.step()
        adam.step()
        average.update(index)
        return {
            "loss": squared.detach().mean().item(),
            f"loss_{clips.frames}x{clips.side}": squared.detach().mean().item(),
            f"meaning_{clips.frames}x{clips.side}": meant.item(),
        }

    parts = {
        "transformer": transformer,
        "text_encoder": encoder,
        "head": head,
        "muon": muon,
        "adam": adam,
        "average": average,
    }
    return step, parts
