"""Training of the flux-digits denoiser and text encoders by flow matching on latents.

    x_s = (1 - s) x_0 + s e,    the model predicts e - x_0 at noise level s.

Flux rotates by the absolute places of image tokens and text sits at the origin, so windows of the
canvas that keep their places teach what the whole canvas does, at a fraction of the cost. Windows
around a single digit (144 tokens) come first, of images with one digit and then of any, whose
prompts name all digits. They teach what digits look like. Which digit goes where is learned from
small windows in the middles of all nine places at once: one place at a time, which is what a step
of single windows shows, teaches it next to nothing. Whole canvases of 4096 tokens come at the end.
Places are shared by all images of a step, because `FluxTransformer2DModel` takes one list of them
for a batch.

As for wan-digits, a head that is thrown away afterwards reads which digit's square covers each
token and where in the square it lies (`MeaningHead`). A second one reads from the T5 encoder's
embeddings of the words for digits in which places the prompt puts them (`PlaceHead`): what image
tokens have to find there, and too far from the squared error to be learned from that in an hour.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from denoising import BACKGROUND, MeaningHead, noise_levels, optimisers, rate_at
from diffusers import FluxTransformer2DModel
from flux_digits_model import LATENT_SCALE, LATENT_SHIFT
from moving_digits import DIGIT_WORDS
from placed_digits import (
    CANVAS,
    PLACES,
    PlacedScene,
    draw_placed_scene,
    parse_placed_prompt,
    prompt_of_placed,
    render_placed,
)
from torch import Tensor, nn
from tqdm import tqdm
from training import Average

__all__ = [
    "Canvases",
    "FluxDenoiserSettings",
    "FluxPhase",
    "PlaceHead",
    "Windows",
    "draw_canvases",
    "flux_denoiser_step",
    "install_fast_attention",
    "latents_of",
]

SIDE = CANVAS // 4  # tokens of the canvas, high and wide


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """A batch of images, of each `count` windows, `side` tokens high and wide; 64 is all of it.

    shift: of the noise levels. Which digit it is shows through at nine tenths of noise, because
    its square has a hundred tokens to tell it by: most is learned above.
    digit_weight: extra loss weight of the squares of digits.
    lone: only images with one digit.
    """

    side: int
    batch: int
    count: int = 1
    shift: float = 6.0
    digit_weight: float = 3.0
    lone: bool = False


@dataclass(frozen=True, slots=True)
class FluxPhase:
    """Up to `until` (fraction of the stage) train on `windows`, step by step in turn."""

    until: float
    windows: tuple[Windows, ...]


LONE = Windows(side=12, batch=24, lone=True)
ONE = Windows(side=12, batch=24)
# without windows of other sides the borders of a window tell where its digit is
MID = Windows(side=20, batch=9)
# the middles of all places at once: which digit goes where, and nothing else
NINE = Windows(side=4, batch=24, count=9, shift=16.0)
FOUR = Windows(side=12, batch=6, count=4)
WHOLE = Windows(side=SIDE, batch=1, shift=8.0)
# extra weight would bias the result, so there is none at the end
FINAL = tuple(replace(w, digit_weight=0.0) for w in (WHOLE, FOUR))


@dataclass(frozen=True, slots=True, kw_only=True)
class FluxDenoiserSettings:
    """Numbers of the denoiser stage."""

    phases: tuple[FluxPhase, ...] = (
        FluxPhase(0.15, (LONE,)),
        FluxPhase(0.45, (ONE, MID)),
        FluxPhase(0.7, (NINE, NINE, NINE, ONE)),
        FluxPhase(0.85, (NINE, ONE, MID, FOUR, NINE, WHOLE)),
        FluxPhase(1.0, FINAL),
    )
    muon_rate: float = 4e-3
    adam_rate: float = 2e-3
    prompt_dropout: float = 0.1
    average_decay: float = 0.995
    head_block: int = 2
    head_weight: float = 1.0
    place_weight: float = 0.5
    place_prompts: int = 64  # of a step
    bfloat16: bool = False


def latents_of(pixels: Tensor) -> Tensor:
    """Tokens `[4096, 12]` of pixels `[3, 256, 256]`: 2 x 2 means, shifted and scaled, packed as
    FluxPipeline packs them.
    """
    means = (F.avg_pool2d(pixels, 2) - LATENT_SHIFT) * LATENT_SCALE
    return means.view(3, SIDE, 2, SIDE, 2).permute(1, 3, 0, 2, 4).reshape(SIDE * SIDE, 12)


def digits_in_tokens(scene: PlacedScene) -> tuple[Tensor, Tensor]:
    """Which digit's square covers each token `[4096]` (`BACKGROUND` where none does), and where in
    the square the token lies `[4096, 2]`: (h, w) from -1 to 1, 0 outside.
    """
    place = 4 * torch.arange(SIDE) + 2.0
    digits = torch.full((SIDE, SIDE), BACKGROUND, dtype=torch.uint8)
    inside = torch.zeros(SIDE, SIDE, 2)
    for digit in scene.digits:
        h, w = ((place - centre) / (digit.size / 2) for centre in digit.centre)
        where = torch.stack(torch.broadcast_tensors(h[:, None], w[None, :]), -1)
        covered = where.abs().amax(-1) < 1
        digits[covered] = digit.digit
        inside[covered] = where[covered]
    return digits.flatten(), inside.flatten(0, 1)


def draw_canvases(seed: int, first: int, count: int) -> dict:
    """Of `count` images: latents `[n, 4096, 12]` and inside `[n, 4096, 2]` (float16), digits `[n,
    4096]`, which places are taken `[n, 9]`, and prompts.
    """
    result = {"latents": [], "digits": [], "inside": [], "taken": [], "prompts": []}
    for index in tqdm(range(first, first + count), desc="draw", mininterval=10):
        scene = draw_placed_scene(seed, index)
        digits, inside = digits_in_tokens(scene)
        taken = torch.tensor([p in {d.place for d in scene.digits} for p in PLACES])
        result["latents"].append(latents_of(render_placed(scene)).half())
        result["digits"].append(digits)
        result["inside"].append(inside.half())
        result["taken"].append(taken)
        result["prompts"].append(prompt_of_placed(scene))
    return {k: v if k == "prompts" else torch.stack(v) for k, v in result.items()}


@dataclass(frozen=True)
class Canvases:
    """What `draw_canvases` gives, with the token ids of both text encoders for its prompts, last
    row the empty prompt; and `t5_places`, of `places_of_tokens`.
    """

    latents: Tensor
    digits: Tensor
    inside: Tensor
    taken: Tensor
    t5_ids: Tensor
    clip_ids: Tensor
    t5_places: Tensor

    def _tokens(self, windows: Windows, places: list[int], random: torch.Generator) -> Tensor:
        """Numbers of the tokens of one window around each of `places`, up to two off centre."""
        if windows.side == SIDE:
            return torch.arange(SIDE * SIDE)
        centres = [torch.tensor(list(PLACES.values())[p]) // 4 for p in places]
        chosen = torch.zeros(SIDE, SIDE, dtype=torch.bool)
        for centre in centres:
            off = torch.randint(-2, 3, (2,), generator=random)
            top, left = (centre + off - windows.side // 2).clamp(0, SIDE - windows.side).tolist()
            chosen[top : top + windows.side, left : left + windows.side] = True
        return chosen.flatten().nonzero()[:, 0]

    def batch(
        self, windows: Windows, seed: int, step: int
    ) -> tuple[dict[str, Tensor], torch.Generator]:
        """Windows of step `step`, a function of `(seed, step)` and their kind alone; and the
        generator for what else is random in the step.

        Most images have a digit in a window: the more, the likelier an image is chosen.
        """
        random = torch.Generator().manual_seed(seed * 1_000_003 + 500_000 + step)
        places = torch.randperm(len(PLACES), generator=random)[: windows.count].tolist()
        weight = self.taken[:, places].float().sum(1).square() + 0.05
        if windows.lone:
            weight = weight * (self.taken.sum(1) == 1)
        images = torch.multinomial(weight, windows.batch, generator=random)
        tokens = self._tokens(windows, places, random)
        batch = {
            "clean": self.latents[images][:, tokens].float(),
            "digits": self.digits[images][:, tokens].long(),
            "inside": self.inside[images][:, tokens].float(),
            "places": torch.stack([torch.zeros_like(tokens), tokens // SIDE, tokens % SIDE], 1),
            "images": images,
        }
        return batch, random


class _FastAttention:
    """What `FluxAttnProcessor` computes, with the rotation as one complex product: fewer passes
    over memory.
    """

    def __call__(
        self,
        attn,
        hidden_states,
        encoder_hidden_states=None,
        attention_mask=None,
        image_rotary_emb=None,
    ):
        cosine, sine = image_rotary_emb
        rotation = torch.complex(cosine[:, 0::2], sine[:, 1::2])[:, None]
        heads = (attn.heads, -1)
        query = attn.norm_q(attn.to_q(hidden_states).unflatten(2, heads))
        key = attn.norm_k(attn.to_k(hidden_states).unflatten(2, heads))
        value = attn.to_v(hidden_states).unflatten(2, heads)
        if encoder_hidden_states is not None:
            text = encoder_hidden_states
            query = torch.cat(
                [attn.norm_added_q(attn.add_q_proj(text).unflatten(2, heads)), query], 1
            )
            key = torch.cat([attn.norm_added_k(attn.add_k_proj(text).unflatten(2, heads)), key], 1)
            value = torch.cat([attn.add_v_proj(text).unflatten(2, heads), value], 1)

        def rotated(x: Tensor) -> Tensor:
            pairs = torch.view_as_complex(x.float().unflatten(3, (-1, 2)))
            return torch.view_as_real(pairs * rotation).flatten(3).transpose(1, 2)

        mixed = F.scaled_dot_product_attention(
            rotated(query).to(value.dtype), rotated(key).to(value.dtype), value.transpose(1, 2)
        )
        mixed = mixed.transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return mixed
        length = encoder_hidden_states.shape[1]
        return attn.to_out[0](mixed[:, length:]), attn.to_add_out(mixed[:, :length])


def install_fast_attention(transformer: FluxTransformer2DModel) -> None:
    """Give every attention its training processor."""
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        block.attn.set_processor(_FastAttention())


def places_of_tokens(prompts: Sequence[str], length: int) -> Tensor:
    """Of every T5 token `[n, length]` of a prompt that is the word for a digit, the number of the
    place where the digit goes; -100 of the others. Words are one token each.
    """
    numbers = {name: number for number, name in enumerate(PLACES)}
    found = torch.full((len(prompts), length), -100)
    for row, prompt in zip(found, prompts, strict=True):
        words = [i for i, word in enumerate(prompt.split()) if word in DIGIT_WORDS]
        places = [numbers[place] for _, place in parse_placed_prompt(prompt)] if prompt else []
        row[words] = torch.tensor(places, dtype=row.dtype)
    return found


class PlaceHead(nn.Module):
    """Reads from the embedding of the word for a digit where the prompt puts it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.read = nn.Linear(width, len(PLACES))

    def forward(self, states: Tensor, places: Tensor) -> Tensor:
        """Cross-entropy of `places` `[b, tokens]` over the tokens that have one."""
        return F.cross_entropy(self.read(states).transpose(1, 2), places)


def embed_prompts(t5: nn.Module, clip: nn.Module, t5_ids: Tensor, clip_ids: Tensor):
    """Token embeddings and pooled vectors, as `FluxPipeline.encode_prompt` makes them: without
    masks.
    """
    return t5(t5_ids)[0], clip(clip_ids).pooler_output


def flux_denoiser_step(
    transformer: FluxTransformer2DModel,
    t5: nn.Module,
    clip: nn.Module,
    cache: Canvases,
    settings: FluxDenoiserSettings,
    seed: int,
):
    """The step function of the stage, and the parts of its checkpoint."""
    install_fast_attention(transformer)
    blocks = (*transformer.transformer_blocks, *transformer.single_transformer_blocks)
    head = MeaningHead(
        blocks[settings.head_block], transformer.inner_dim, read=lambda output: output[1]
    )
    place_head = PlaceHead(t5.config.d_model)
    muon, adam = optimisers(
        blocks, [transformer, t5, clip, head, place_head], settings.muon_rate, settings.adam_rate
    )
    average = Average({"transformer": transformer, "t5": t5, "clip": clip}, settings.average_decay)

    def losses(
        windows: Windows, batch: dict[str, Tensor], random: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss; and within it the squared error, and what the heads miss."""
        clean, images = batch["clean"], batch["images"].clone()
        images[torch.rand(len(images), generator=random) < settings.prompt_dropout] = -1
        sigma = noise_levels(len(images), windows.shift, random)
        noise = torch.randn(clean.shape, generator=random)
        s = sigma.view(-1, 1, 1)
        embeds, pooled = embed_prompts(t5, clip, cache.t5_ids[images], cache.clip_ids[images])
        velocity = transformer(
            (1 - s) * clean + s * noise,
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            timestep=sigma,
            img_ids=batch["places"].float(),
            txt_ids=torch.zeros(embeds.shape[1], 3),
            return_dict=False,
        )[0]
        squared = (velocity.float() - (noise - clean)).square()
        weight = 1 + windows.digit_weight * (batch["digits"] != BACKGROUND)[..., None]
        meant = head(batch["digits"], batch["inside"])
        loss = (squared * weight).mean() / weight.mean() + settings.head_weight * meant
        texts = torch.randint(len(cache.t5_ids) - 1, (settings.place_prompts,), generator=random)
        placed = place_head(t5(cache.t5_ids[texts])[0], cache.t5_places[texts])
        parts = {"loss": squared.mean(), "meaning": meant, "places": placed}
        return loss + settings.place_weight * placed, {k: v.detach() for k, v in parts.items()}

    def step(index: int, progress: float) -> dict[str, float]:
        phase = next(p for p in settings.phases if progress < p.until or p is settings.phases[-1])
        windows = phase.windows[index % len(phase.windows)]
        rate = rate_at(index, progress)
        muon.param_groups[0]["lr"] = settings.muon_rate * rate
        adam.param_groups[0]["lr"] = settings.adam_rate * rate
        batch, random = cache.batch(windows, seed, index)
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.bfloat16):
            loss, shown = losses(windows, batch, random)
            for optimiser in (muon, adam):
                optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(adam.param_groups[0]["params"], 1.0)
            muon.step()
            adam.step()
        average.update(index)
        kind = f"{windows.count}x{windows.side}"
        return {
            "loss": shown["loss"].item(),
            "places": shown["places"].item(),
            f"loss_{kind}": shown["loss"].item(),
            f"meaning_{kind}": shown["meaning"].item(),
        }

    parts = {
        "transformer": transformer,
        "t5": t5,
        "clip": clip,
        "head": head,
        "place_head": place_head,
        "muon": muon,
        "adam": adam,
        "average": average,
    }
    return step, parts
