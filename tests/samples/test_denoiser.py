"""What the denoiser is trained on: cells that know their digit, clips cut out alike, phases."""

import math

import pytest
import torch
from denoising import BACKGROUND, MeaningHead
from moving_digits import CANVAS, coverage, draw_scene
from training import Average
from wan_digits_denoiser import Clips, DenoiserSettings, Latents, Phase, denoiser_step
from wan_digits_model import build_text_encoder, build_tokenizer, build_transformer
from wan_digits_vae import digits_in_cells


@pytest.mark.parametrize("index", range(6))
def test_cells_with_strokes_know_their_digit(index: int) -> None:
    scene = draw_scene(3, index, two=0.5)
    digits, inside = digits_in_cells(scene)
    assert set(digits.unique().tolist()) <= {BACKGROUND, *(a.digit for a in scene.actors)}
    shown = coverage(scene).unflatten(1, (CANVAS // 4, 4)).unflatten(3, (CANVAS // 4, 4))
    strokes = shown.mean((2, 4))[::2] > 0.7  # of frames 0, 2, 4, ...: cells full of ink
    assert strokes.any()
    assert (digits[strokes] != BACKGROUND).all()
    assert inside.abs().max() < 1
    assert (inside.movedim(1, -1)[digits == BACKGROUND] == 0).all()


def test_where_a_cell_lies_in_its_square_grows_along_the_axes() -> None:
    scene = draw_scene(3, 1, two=0.0)
    digits, inside = digits_in_cells(scene)
    for frame, where in zip(digits, inside, strict=True):
        rows, columns = ((frame != BACKGROUND).any(axis) for axis in (1, 0))
        square = where[:, rows][..., columns]
        step = 2 * 4 / scene.actors[0].size
        torch.testing.assert_close(square[0].diff(dim=0), torch.full_like(square[0][1:], step))
        torch.testing.assert_close(square[1].diff(dim=1), torch.full_like(square[1][:, 1:], step))


def small_cache() -> Latents:
    """Four videos whose latents say where they come from: video, frame, row and column."""
    place = torch.meshgrid(*(torch.arange(n) for n in (4, 17, 16, 16)), indexing="ij")
    digits = torch.full((4, 17, 16, 16), BACKGROUND, dtype=torch.uint8)
    digits[:, :, 5:9, 9:14] = 3
    return Latents(
        latents=torch.stack([*place, *place], 1).half(),
        digits=digits,
        inside=torch.stack([place[2], place[3]], 2).half(),
        ids=torch.tensor([[3, 4, 0], [3, 5, 0], [3, 6, 7], [3, 8, 0]]),
        lengths=torch.tensor([2, 2, 3, 2]),
        empty_id=1,
    )


@pytest.mark.parametrize(
    "clips", [Clips(frames=3, side=16, batch=5), Clips(frames=1, side=10, batch=7)]
)
def test_latents_labels_and_times_of_a_clip_are_those_of_one_place(clips: Clips) -> None:
    cache = small_cache()
    batch, _ = cache.batch(clips, 0, 11)
    video, time, row, column = batch["clean"][:, :4].long().unbind(1)
    assert (video == video[:, :1, :1, :1]).all()
    assert torch.equal(time[:, :, 0, 0], batch["times"])
    assert torch.equal(batch["inside"].long(), torch.stack([row, column], 2))
    assert torch.equal(batch["digits"], cache.digits[video, time, row, column].long())
    assert torch.equal(batch["ids"], cache.ids[video[:, 0, 0, 0]])
    if clips.side < 16:
        assert (batch["lengths"] == 2).all()
        assert (batch["digits"] != BACKGROUND).flatten(1).any(1).all()


def test_the_meaning_of_a_head_that_knows_nothing() -> None:
    block = torch.nn.Linear(8, 8)
    head = MeaningHead(block, 8)
    torch.nn.init.zeros_(head.read.weight)
    torch.nn.init.zeros_(head.read.bias)
    digits = torch.tensor([[3, BACKGROUND, 3, 4]])
    inside = torch.zeros(1, 4, 2)
    inside[0, 0] = 0.5
    block(torch.randn(1, 4, 8))
    # ln 11 for eleven labels; two squares of 0.5 over three cells and two axes
    assert head(digits, inside).item() == pytest.approx(math.log(11) + 2 * 0.25 / 3 / 2)


@pytest.mark.parametrize(("begin", "frames"), [(0.0, 1), (0.5, 2)])
def test_given_weights_skip_the_phases_behind_them(begin: float, frames: int) -> None:
    clips = [Clips(frames=n, side=16, batch=2) for n in (1, 2)]
    settings = DenoiserSettings(phases=(Phase(0.4, (clips[0],)), Phase(1.0, (clips[1],))))
    transformer, encoder = build_transformer(), build_text_encoder(build_tokenizer())
    before = transformer.blocks[0].ffn.net[2].weight.clone()
    step, parts = denoiser_step(transformer, encoder, small_cache(), settings, 0, begin)
    assert f"loss_{frames}x16" in step(0, 0.1)
    assert not torch.equal(transformer.blocks[0].ffn.net[2].weight, before)
    assert isinstance(parts["average"], Average)
    assert parts["head"].read.weight.grad is not None
