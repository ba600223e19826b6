"""flux-digits: its training on windows of the canvas, and the committed pipeline."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from denoising import BACKGROUND
from flux_digits_denoiser import (
    Canvases,
    FluxDenoiserSettings,
    FluxPhase,
    Windows,
    draw_canvases,
    embed_prompts,
    flux_denoiser_step,
    install_fast_attention,
    latents_of,
    places_of_tokens,
)
from flux_digits_model import (
    LATENT_SCALE,
    LATENT_SHIFT,
    TEXT_TOKENS,
    WORDS,
    assemble,
    build_clip,
    build_clip_tokenizer,
    build_t5,
    build_t5_tokenizer,
    build_transformer,
    build_vae,
    export,
)
from moving_digits import DIGIT_WORDS
from omegaconf import OmegaConf
from placed_digits import CANVAS, PLACES, draw_placed_scene, window_of
from training import Average

from accel.metrics import Classifier
from accel.pipelines.model_settings import model_config

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "samples" / "models" / "flux-digits"
CLASSIFIER = ROOT / "samples" / "models" / "digit-classifier"


def small_cache() -> Canvases:
    """Four images whose latents say where they come from: image, row and column of the token."""
    tokens = torch.arange(4096)
    place = torch.stack([tokens // 64, tokens % 64], 1).float()
    latents = torch.zeros(4, 4096, 12)
    latents[..., 0] = torch.arange(4.0)[:, None]
    latents[..., 1:3] = place
    taken = torch.zeros(4, 9, dtype=torch.bool)
    taken[0, 0] = taken[1, 4] = taken[2, [2, 6]] = taken[3, [0, 1, 8]] = True
    return Canvases(
        latents=latents.half(),
        digits=torch.full((4, 4096), BACKGROUND, dtype=torch.uint8),
        inside=place.half().expand(4, -1, -1),
        taken=taken,
        t5_ids=torch.randint(3, 20, (5, TEXT_TOKENS)),
        clip_ids=torch.ones(5, TEXT_TOKENS, dtype=torch.long),
        t5_places=places_of_tokens(["a two top"] * 4 + [""], TEXT_TOKENS),
    )


@pytest.mark.parametrize(
    "windows",
    [
        Windows(side=12, batch=3),
        Windows(side=12, batch=2, lone=True),
        Windows(side=12, batch=2, count=4),
        Windows(side=64, batch=1),
    ],
)
@pytest.mark.parametrize("step", [0, 7])
def test_latents_and_labels_of_windows_are_those_of_their_places(
    windows: Windows, step: int
) -> None:
    cache = small_cache()
    batch, _ = cache.batch(windows, 0, step)
    tokens = len(batch["places"])
    assert tokens == windows.count * windows.side**2
    assert batch["places"][:, 0].eq(0).all()
    assert batch["clean"].shape == (windows.batch, tokens, 12)
    assert torch.equal(batch["clean"][0, :, 1:3], batch["places"][:, 1:].float())
    assert torch.equal(batch["inside"][0], batch["places"][:, 1:].float())
    assert torch.equal(batch["clean"][:, 0, 0].long(), batch["images"])
    if windows.lone:
        assert (cache.taken[batch["images"]].sum(1) == 1).all()
    again, _ = cache.batch(windows, 0, step)
    assert torch.equal(batch["clean"], again["clean"])


def test_latents_are_packed_as_the_pipeline_unpacks_them() -> None:
    pipe = tiny_pipe()
    pixels = torch.rand(3, CANVAS, CANVAS)
    unpacked = pipe._unpack_latents(latents_of(pixels)[None], CANVAS, CANVAS, 2)
    means = unpacked / LATENT_SCALE + LATENT_SHIFT
    torch.testing.assert_close(means[0], torch.nn.functional.avg_pool2d(pixels, 2))


def test_tokens_with_strokes_know_their_digit() -> None:
    drawn = draw_canvases(0, 20, 3)
    for index in range(3):
        scene = draw_placed_scene(0, 20 + index)
        digits, inside = drawn["digits"][index], drawn["inside"][index]
        shown = {d.digit for d in scene.digits}
        assert set(digits.tolist()) == {BACKGROUND, *shown}
        bright = drawn["latents"][index].float().view(4096, 3, 4).amax(1).amin(1)
        ink = bright / LATENT_SCALE + LATENT_SHIFT > 0.9
        assert ink.any()
        assert (digits[ink] != BACKGROUND).all()
        assert (inside[digits == BACKGROUND] == 0).all()
        assert drawn["taken"][index].sum() == len(scene.digits)


def test_every_word_is_one_token_of_both_tokenizers() -> None:
    t5, clip = build_t5_tokenizer(), build_clip_tokenizer()
    for word in WORDS:
        assert len(t5(word).input_ids) == 2  # and the end
        assert len(clip(word).input_ids) == 3  # the beginning, too
    longest = " and ".join(["an eight bottom right"] * 4)
    assert len(t5(longest).input_ids) <= TEXT_TOKENS
    assert len(clip(longest).input_ids) <= TEXT_TOKENS


def test_the_word_for_a_digit_knows_where_the_prompt_puts_it() -> None:
    prompts = ["a seven top left and an eight right", "a two bottom", ""]
    found = places_of_tokens(prompts, TEXT_TOKENS)
    ids = build_t5_tokenizer()(prompts, padding="max_length", max_length=TEXT_TOKENS).input_ids
    tokens = build_t5_tokenizer().convert_ids_to_tokens
    for row, of_prompt, expected in zip(
        found, ids, ({"▁seven": 0, "▁eight": 5}, {"▁two": 7}, {}), strict=True
    ):
        named = (row >= 0).nonzero()[:, 0].tolist()
        assert {tokens(of_prompt[i]): int(row[i]) for i in named} == expected


def tiny_pipe():
    """The pipeline before training."""
    torch.manual_seed(0)
    clip, t5 = build_clip(build_clip_tokenizer()), build_t5(build_t5_tokenizer())
    return assemble(build_vae(), clip, t5, build_transformer())


def test_prompts_are_embedded_as_the_pipeline_does_it() -> None:
    pipe, prompt = tiny_pipe(), "a seven top left and a three right"
    embeds, pooled, _ = pipe.encode_prompt(prompt, max_sequence_length=TEXT_TOKENS)
    ids = (
        tokenizer(
            prompt, padding="max_length", max_length=TEXT_TOKENS, return_tensors="pt"
        ).input_ids
        for tokenizer in (pipe.tokenizer_2, pipe.tokenizer)
    )
    ours = embed_prompts(pipe.text_encoder_2, pipe.text_encoder, *ids)
    torch.testing.assert_close(ours[0], embeds)
    torch.testing.assert_close(ours[1], pooled)


def test_the_fast_attention_computes_what_the_own_one_does() -> None:
    torch.manual_seed(0)
    model = build_transformer()
    torch.nn.init.normal_(model.proj_out.weight, std=0.1)
    tokens = torch.arange(15)
    call = {
        "hidden_states": torch.randn(2, 15, 12),
        "encoder_hidden_states": torch.randn(2, 7, 64),
        "pooled_projections": torch.randn(2, 64),
        "timestep": torch.tensor([0.3, 0.8]),
        "img_ids": torch.stack([torch.zeros(15), tokens // 5 + 20, tokens % 5 + 3], 1),
        "txt_ids": torch.zeros(7, 3),
    }
    with torch.no_grad():
        expected = model(**call).sample
        install_fast_attention(model)
        torch.testing.assert_close(model(**call).sample, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("progress", "kind"), [(0.1, "1x4"), (0.9, "2x4")])
def test_a_step_trains_all_parts_on_the_windows_of_its_phase(progress: float, kind: str) -> None:
    torch.manual_seed(0)
    phases = (
        FluxPhase(0.5, (Windows(side=4, batch=2),)),
        FluxPhase(1.0, (Windows(side=4, batch=2, count=2),)),
    )
    models = (
        build_transformer(),
        build_t5(build_t5_tokenizer()),
        build_clip(build_clip_tokenizer()),
    )
    before = [next(m.parameters()).clone() for m in models]
    step, parts = flux_denoiser_step(
        *models, small_cache(), FluxDenoiserSettings(phases=phases), seed=0
    )
    step(0, progress)  # nothing but the output layer, which starts at zero, has a gradient
    found = step(1, progress)
    assert math.isfinite(found[f"loss_{kind}"])
    assert f"meaning_{kind}" in found
    for old, model in zip(before, models, strict=True):
        assert not torch.equal(next(model.parameters()), old)
    assert isinstance(parts["average"], Average)


def test_the_last_phase_has_whole_canvases_and_no_bias_there() -> None:
    phases = FluxDenoiserSettings().phases
    assert [p.until for p in phases] == sorted(p.until for p in phases)
    assert phases[-1].until == 1.0
    whole = [w for w in phases[-1].windows if w.side == 64]
    assert whole
    assert all(w.digit_weight == 0 for w in phases[-1].windows)


def test_an_export_loads_as_it_was(tmp_path: Path) -> None:
    from diffusers import FluxPipeline

    pipe = tiny_pipe()
    export(tmp_path / "m", pipe.vae, pipe.text_encoder, pipe.text_encoder_2, pipe.transformer)
    assert pipe.transformer.dtype == torch.float32
    loaded = FluxPipeline.from_pretrained(tmp_path / "m")
    assert loaded.transformer.dtype == torch.float32
    for name, weight in pipe.transformer.state_dict().items():
        torch.testing.assert_close(
            loaded.transformer.state_dict()[name], weight, atol=1e-3, rtol=1e-3
        )


def test_the_committed_pipeline_loads_and_generates() -> None:
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)
    image = pipe(
        "a seven top left",
        height=64,
        width=96,
        num_inference_steps=2,
        true_cfg_scale=3.0,
        negative_prompt="",
        max_sequence_length=TEXT_TOKENS,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    assert image.shape == (1, 64, 96, 3)
    assert image.std() > 0.02


def test_the_committed_pipeline_is_small_and_names_no_folder() -> None:
    files = [f for f in MODEL.rglob("*") if f.is_file()]
    assert 0 < sum(f.stat().st_size for f in files) <= 12 * 2**20
    for config in MODEL.rglob("*.json"):
        assert "_name_or_path" not in config.read_text(), config


def test_the_configuration_looks_where_the_data_puts_digits() -> None:
    settings = OmegaConf.to_container(OmegaConf.load(ROOT / "configs/model/flux-digits.yaml"))
    model = model_config(settings)
    assert {k: tuple(v) for k, v in model.places.items()} == {p: window_of(p) for p in PLACES}
    judge = Classifier.load(CLASSIFIER, {k: tuple(v) for k, v in model.places.items()})
    for prompt in (*model.prompts, *model.calibration):
        asked = judge.placed_in(prompt)
        assert len(asked) == prompt.count(" and ") + 1
        assert [word for word, _ in asked] == [w for w in prompt.split() if w in DIGIT_WORDS]
    assert not set(model.prompts) & set(model.calibration)


def test_rates_count_asked_digits_and_empty_places() -> None:
    from evaluate_flux_digits import rates

    def place(asked: int | None, read: int, sure: float) -> dict:
        return {"place": "top", "asked": asked, "read": read, "sure": sure}

    found = rates(
        [
            {"places": [place(3, 3, 0.9), place(8, 2, 0.9), place(None, 1, 0.1)]},
            {"places": [place(5, 5, 0.2), place(None, 1, 0.7)]},
        ]
    )
    assert found == {
        "images": 2,
        "digits": 3,
        "digits_right": round(2 / 3, 4),
        "images_all_right": 0.5,
        "empty_places": 2,
        "empty_places_right": 0.5,
    }


def test_evaluation_prompts_are_the_same_again_and_of_two_to_four_digits() -> None:
    from evaluate_flux_digits import placed_evaluation_prompts

    prompts = placed_evaluation_prompts(10)
    assert prompts == placed_evaluation_prompts(10)
    assert len(set(prompts)) == 10
    assert {p.count(" and ") + 1 for p in prompts} == {2, 3, 4}


def test_a_killed_evaluation_does_not_make_its_images_again(tmp_path: Path) -> None:
    from evaluating import kept_frames

    made = []

    def make() -> np.ndarray:
        made.append(1)
        return np.full((1, 4, 6, 3), 0.5, dtype=np.float32)

    first = kept_frames(tmp_path, ("a two", 3, 2.0), make)
    assert np.array_equal(kept_frames(tmp_path, ("a two", 3, 2.0), make), first)
    assert len(made) == 1
    kept_frames(tmp_path, ("a two", 4, 2.0), make)
    assert len(made) == 2
