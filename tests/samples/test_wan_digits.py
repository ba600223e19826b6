"""The sample data and the committed pipeline: deterministic, true to prompts, loadable, small."""

import json
from pathlib import Path

import pytest
import torch
from attention_recall import ORDERS, best_block_recall, measured_recall
from moving_digits import (
    CANVAS,
    DIGIT_WORDS,
    MOTIONS,
    coverage,
    draw_scene,
    make_video,
    positions,
    prompt_of,
    render,
    scans,
)
from tiny_denoiser import call, tiny_denoiser, tiny_geometry

from accel.layout import Layout
from accel.metrics import Classifier

SAMPLES = Path(__file__).parents[2] / "samples"
MODEL = SAMPLES / "models" / "wan-digits"
CLASSIFIER = SAMPLES / "models" / "digit-classifier"
VOCABULARY = {
    "a",
    "an",
    "and",
    *DIGIT_WORDS,
    *(word for motion in MOTIONS for word in motion.split()),
}


def test_a_video_is_a_function_of_seed_and_index() -> None:
    first, prompt = make_video(3, 17)
    again, same_prompt = make_video(3, 17)
    other, _ = make_video(3, 18)
    assert prompt == same_prompt
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (3, 33, CANVAS, CANVAS)
    assert first.min() >= -1
    assert first.max() <= 1


def test_scans_of_the_splits_do_not_meet() -> None:
    train, held_out = (scans(split)[0].flatten(1) for split in ("train", "held-out"))
    assert len(train) + len(held_out) == 1797
    assert not (train[:, None] == held_out[None]).all(2).any()
    with pytest.raises(ValueError, match="split"):
        scans("validation")


@pytest.mark.parametrize("index", range(40, 56))
def test_digits_move_in_the_prompted_direction(index: int) -> None:
    scene = draw_scene(1, index)
    for actor in scene.actors:
        alone = coverage(
            type(scene)(actors=(actor,), texture_seed=0, wavelength=16.0, drift=(0.0, 0.0))
        )
        place = torch.arange(CANVAS, dtype=torch.float32)
        centre = (
            torch.stack([(alone.sum(2) * place).sum(1), (alone.sum(1) * place).sum(1)], 1)
            / alone.sum((1, 2))[:, None]
        )
        moved, told = centre[-1] - centre[0], torch.tensor(MOTIONS[actor.motion]).float()
        if told.norm() == 0:
            assert moved.norm() < 0.5
        else:
            assert moved @ told > 8  # pixels along the prompted direction, bounces included
            assert (moved - (moved @ told) * told).norm() < 0.5


def test_prompts_use_the_vocabulary_and_name_the_digits() -> None:
    for index in range(30):
        scene = draw_scene(2, index)
        words = prompt_of(scene).split()
        assert set(words) <= VOCABULARY
        assert [w for w in words if w in DIGIT_WORDS] == [
            DIGIT_WORDS[a.digit] for a in scene.actors
        ]


def test_two_digits_are_named_in_reading_order() -> None:
    names = set()
    for index in range(20):
        scene = draw_scene(2, index, two=1.0)
        first, second = (positions(actor, 33).mean(0) for actor in scene.actors)
        apart = second - first
        names.add("left" if abs(apart[1]) > abs(apart[0]) else "upper")
        assert apart[abs(apart).argmax()] > 0
    assert names == {"left", "upper"}


def test_digits_stand_out_from_the_background() -> None:
    scene = draw_scene(4, 5)
    dark = render(scene).amin(0) / 2 + 0.5
    ink = coverage(scene)
    assert dark[ink > 0.99].min() > 0.8
    assert dark[ink == 0].max() <= 0.63


def test_recall_is_the_kept_share_where_attention_is_uniform_and_one_where_it_is_local() -> None:
    layout = Layout.of((3, 4, 5))
    query = torch.randn(1, 2, 60, 8)
    uniform = best_block_recall(query, torch.zeros_like(query), layout, keep=0.25, block=15)
    torch.testing.assert_close(uniform, torch.full((len(ORDERS), 2), 0.25))
    itself = torch.eye(60)[None, None] * 1e3
    local = best_block_recall(itself, itself, layout, keep=0.25, block=15)
    torch.testing.assert_close(local, torch.ones(len(ORDERS), 1))


def test_recall_is_measured_where_it_is_asked_for_and_changes_nothing() -> None:
    transformer = tiny_denoiser()
    before = call(transformer)
    with measured_recall(transformer) as recalls:
        recalls.record = False
        call(transformer, 0)
        assert not recalls.calls
        recalls.record = True
        torch.testing.assert_close(call(transformer, 1), before)
    assert set(recalls.calls) == {site.name for site in tiny_geometry(transformer).sites}
    for site in recalls.best():
        assert all(0 < recall <= 1 and order in ORDERS for recall, order in site)


def test_one_padding_key_stands_for_all_padding() -> None:
    from wan_digits_denoiser import embed_prompts, install_processors
    from wan_digits_model import build_text_encoder, build_tokenizer, build_transformer

    torch.manual_seed(0)
    tokenizer, transformer = build_tokenizer(), build_transformer()
    encoder = build_text_encoder(tokenizer).eval()
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.1)
    prompts = ["a two moving right", "an eight standing still and a nine moving down"]
    tokens = tokenizer(prompts, padding=True, return_tensors="pt")
    lengths, total = tokens.attention_mask.sum(1), 40
    latents, timestep = torch.randn(2, 8, 2, 3, 4), torch.tensor([300.0, 700.0])
    with torch.no_grad():
        embeds, bias = embed_prompts(
            encoder, tokens.input_ids, lengths, torch.tensor([total, total])
        )
        padded = torch.nn.functional.pad(embeds, (0, 0, 0, total - embeds.shape[1]))
        expected = transformer(latents, timestep, padded).sample
        processors, rotary = install_processors(transformer)
        rotary.times = torch.arange(2).expand(2, 2)
        for processor in processors:
            processor.bias = bias
        torch.testing.assert_close(
            transformer(latents, timestep, embeds).sample, expected, atol=1e-4, rtol=1e-4
        )


def test_frames_keep_the_times_at_which_they_were_taken() -> None:
    from wan_digits_denoiser import install_processors
    from wan_digits_model import build_transformer

    rope = build_transformer().rope
    latents = torch.zeros(2, 8, 9, 3, 4)
    cosine, sine = rope(latents)
    times = torch.tensor([[0, 3, 8], [1, 2, 5]])
    model = build_transformer()
    _, rotary = install_processors(model)
    rotary.times = times
    for got, whole in zip(model.rope(latents[:, :, :3]), (cosine, sine), strict=True):
        assert torch.equal(got, whole.unflatten(1, (9, 12))[0][times].flatten(1, 2))


def test_the_committed_pipeline_loads_and_generates() -> None:
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)
    video = pipe(
        "a seven moving left",
        height=32,
        width=32,
        num_frames=5,
        num_inference_steps=2,
        guidance_scale=3.0,
        max_sequence_length=24,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).frames[0]
    assert video.shape == (5, 32, 32, 3)
    assert video.std() > 0.02


def test_the_committed_models_are_small() -> None:
    bytes_of = {
        folder: sum(f.stat().st_size for f in folder.rglob("*.safetensors"))
        for folder in (MODEL, CLASSIFIER)
    }
    assert 0 < bytes_of[MODEL] <= 12 * 2**20
    assert 0 < bytes_of[CLASSIFIER] <= 2 * 2**20


def test_the_committed_classifier_reads_held_out_scans() -> None:
    config = json.loads((CLASSIFIER / "config.json").read_text())
    assert config["labels"] == list(DIGIT_WORDS)
    judge = Classifier.load(CLASSIFIER)
    hits = []
    for index in range(5_000_000, 5_000_008):
        scene = draw_scene(0, index, split="held-out")
        video = render(scene, split="held-out")[:, ::8].permute(1, 2, 3, 0) / 2 + 0.5
        hits.append(judge.reads(video.numpy(), prompt_of(scene)))
    assert sum(hits) >= 6


def test_committed_configurations_name_no_folder() -> None:
    for config in MODEL.rglob("*.json"):
        assert "_name_or_path" not in config.read_text(), config


def test_a_killed_evaluation_does_not_make_its_videos_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import evaluate_wan_digits as evaluation

    made = []

    def generate(pipe: object, prompt: str, seed: int, guidance: float, steps: int) -> torch.Tensor:
        made.append((prompt, seed, guidance, steps))
        return torch.rand(5, 3, 8, 16, generator=torch.Generator().manual_seed(seed))

    monkeypatch.setattr(evaluation, "generate", generate)
    calls = [("a two moving up", 3, 4.0, 30), ("a two moving up", 4, 4.0, 30)]
    first = [evaluation.kept_video(None, *call, tmp_path) for call in calls]
    again = [evaluation.kept_video(None, *call, tmp_path) for call in calls]
    assert made == calls
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(*first)
    evaluation.kept_video(None, "a two moving up", 3, 4.0, 15, tmp_path)
    assert len(made) == 3
