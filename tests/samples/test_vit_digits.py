"""vit-digits: its windows of patches, its training, what is measured of it, and the committed
model.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import evaluate_vit_digits
import pytest
import timm
import torch
import train_vit_digits
import vit_digits_card
import vit_digits_model
from digit_crops import draw_crop, make_crop
from evaluate_vit_digits import rates
from moving_digits import DIGIT_WORDS
from vit_digits_model import FILE_SEED, build_pipeline, export
from vit_digits_training import (
    ClassifierPhase,
    ClassifierSettings,
    PatchWindow,
    classifier_step,
    crops,
    window_around,
)

from accel.pipelines.vision import VisionPipeline

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "samples" / "models" / "vit-digits"
trained = pytest.mark.skipif(not MODEL.exists(), reason="vit-digits is not trained yet")
SETTINGS = ClassifierSettings(phases=(ClassifierPhase(0.5, 3, 2), ClassifierPhase(1.0, 2)), crop=48)


def tiny_pipe(size: int = 48) -> VisionPipeline:
    torch.manual_seed(0)
    return build_pipeline(size, embed_dim=16, depth=2, num_heads=2, reg_tokens=1)


def test_a_window_lies_on_the_map_around_its_centre() -> None:
    random = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.5, 13.0], [7.0, 7.0], [13.5, 3.2]])
    kept = window_around(centres, 5, 14, random)
    assert kept.shape == (3, 25)
    for row, centre in zip(kept, centres, strict=True):
        rows, columns = row // 14, row % 14
        assert rows.unique().numel() == columns.unique().numel() == 5
        assert torch.equal(row, row.sort().values)
        for along, at in ((rows, centre[0]), (columns, centre[1])):
            middle = along.float().mean() + 0.5
            assert abs(middle - at.clamp(2.5, 11.5)) <= 1.5
    whole = window_around(centres, 14, 14, random)
    assert torch.equal(whole, torch.arange(196).expand(3, -1))


def test_patches_are_kept_by_image_and_prefix_tokens_always() -> None:
    window = PatchWindow(2)
    x = torch.randn(2, 2 + 6, 3)
    assert window(x) is x
    window.kept = torch.tensor([[0, 3], [5, 1]])
    found = window(x)
    assert torch.equal(found[:, :2], x[:, :2])
    assert torch.equal(found[0, 2:], x[0, [2, 5]])
    assert torch.equal(found[1, 2:], x[1, [7, 3]])


def test_a_batch_is_a_function_of_its_step() -> None:
    phase = ClassifierPhase(1.0, 4)
    seen, again = (crops(phase, 0, 3, 48, 8) for _ in range(2))
    for name in ("pixels", "digits", "centres", "covered", "inside"):
        assert torch.equal(getattr(seen, name), getattr(again, name))
    assert not torch.equal(seen.pixels, crops(phase, 0, 4, 48, 8).pixels)
    for i in range(4):
        image, digit = make_crop(0, 3 * 256 + i, side=48)
        assert torch.equal(seen.pixels[i], image)
        assert int(seen.digits[i]) == digit
        drawn = draw_crop(0, 3 * 256 + i, side=48).digits[0]
        assert drawn.centre == pytest.approx(seen.centres[i])
        for patch in range(36):
            place = (8 * (patch // 6) + 4, 8 * (patch % 6) + 4)
            off = [(p - c) / (drawn.size / 2) for p, c in zip(place, drawn.centre, strict=True)]
            there = max(map(abs, off)) < 1
            assert int(seen.covered[i, patch]) == (digit if there else 10)
            assert seen.inside[i, patch].tolist() == pytest.approx(off if there else [0, 0])


def test_a_step_trains_all_parts_on_windows_and_on_whole_crops() -> None:
    pipe = tiny_pipe()
    before = {name: weight.clone() for name, weight in pipe.model.state_dict().items()}
    seen = []
    pipe.model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    step, parts = classifier_step(pipe, SETTINGS, 0)
    shown = {}
    for index, progress in enumerate((0.1, 0.2, 0.6, 0.9)):
        shown |= step(index, progress)
    assert seen == [2 + 4, 2 + 4, 2 + 36, 2 + 36]
    assert {"loss", "meaning", "right", "right_2", "right_6"} == set(shown)
    assert all(math.isfinite(value) for value in shown.values())
    for name, weight in pipe.model.state_dict().items():
        assert not torch.equal(before[name], weight), name
    assert set(parts) == {"model", "head", "muon", "adam", "average"}
    assert set(before) == set(pipe.model.state_dict())


def test_phases_grow_to_whole_crops() -> None:
    phases = ClassifierSettings().phases
    assert [p.until for p in phases] == sorted(p.until for p in phases)
    assert phases[-1].until == 1.0
    assert phases[-1].side is None
    sides = [p.side for p in phases[:-1]]
    assert sides == sorted(sides)


class Killed(Exception):
    """What ends a run in the middle."""


@pytest.fixture
def few_files(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"test": range(3), "calibration": range(100, 101)}
    monkeypatch.setattr(vit_digits_model, "FILES", files)


def train(folder: Path, name: str, **settings) -> dict[str, torch.Tensor]:
    out = folder / name
    given = {"minutes": 0, "steps": 4, "seed": 1, "threads": 1, "resume": False}
    given |= {
        "bfloat16": False,
        "compiled": False,
        "work": folder / f"{name}.work",
        "pipe": tiny_pipe(),
        "settings": SETTINGS,
    }
    train_vit_digits.main(out=out, **given | settings)
    return VisionPipeline.from_pretrained(out).model.state_dict()


@pytest.mark.usefixtures("few_files")
def test_a_resumed_training_is_the_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(tmp_path, "whole")
    with pytest.raises(SystemExit, match="resume"):
        train(tmp_path, "whole")
    original = train_vit_digits.classifier_step

    def dying(*args):
        step, parts = original(*args)

        def until(index: int, progress: float) -> dict[str, float]:
            if index == 3:
                raise Killed
            return step(index, progress)

        return until, parts

    stage = train_vit_digits.Run.stage
    monkeypatch.setattr(stage, "__kwdefaults__", {**stage.__kwdefaults__, "checkpoint_minutes": 0})
    monkeypatch.setattr(train_vit_digits, "classifier_step", dying)
    with pytest.raises(Killed):
        train(tmp_path, "two")
    monkeypatch.setattr(train_vit_digits, "classifier_step", original)
    again = train(tmp_path, "two", resume=True)
    assert set(again) == set(whole)
    for name, weight in whole.items():
        assert torch.equal(again[name], weight), name


def test_an_export_loads_in_float32_and_is_timms_own(tmp_path: Path) -> None:
    pipe = tiny_pipe()
    export(tmp_path / "m", pipe)
    loaded = VisionPipeline.from_pretrained(tmp_path / "m")
    assert loaded.classes == DIGIT_WORDS
    assert loaded.dtype == pipe.dtype == torch.float32
    for name, weight in pipe.model.state_dict().items():
        torch.testing.assert_close(loaded.model.state_dict()[name], weight, atol=1e-3, rtol=1e-3)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True).eval()
    image = torch.rand(2, 3, 48, 48)
    with torch.no_grad():
        assert torch.equal(theirs(image), loaded.model(image))


def test_rates_count_each_digit_and_what_it_is_taken_for() -> None:
    found = rates(torch.tensor([0, 0, 7, 7, 7]), torch.tensor([0, 0, 1, 1, 7]))
    assert found["crops"] == 5
    assert found["top1"] == 0.6
    assert found["by_digit"] == {
        "zero": {"crops": 2, "right": 1.0, "taken_for": None},
        "seven": {"crops": 3, "right": round(1 / 3, 4), "taken_for": "one"},
    }


@pytest.mark.usefixtures("few_files")
def test_evaluation_and_card_tell_what_was_measured(tmp_path: Path) -> None:
    train(tmp_path, "m", settings=replace(SETTINGS, phases=SETTINGS.phases[1:]), bfloat16=True)
    folder = tmp_path / "m"
    labels = json.loads((folder / "test" / "labels.json").read_text())
    named = {
        f"{i:03d}": DIGIT_WORDS[make_crop(FILE_SEED, i, split="held-out")[1]] for i in range(3)
    }
    assert labels == named
    evaluate_vit_digits.main(folder, crops=12, threads=1, out=None)
    told = json.loads((folder / "evaluation.json").read_text())
    assert told["crops"] == 12
    assert 0 <= told["top1"] <= 1
    assert told["test_files"]["images"] == 3
    log = tmp_path / "m.work" / "log.jsonl"
    with log.open("a") as file:  # a stage writes every twenty steps
        file.write('{"stage": "classifier", "steps": 20, "seconds": 90.0, "right_6": 0.25}\n')
    card = vit_digits_card.card(folder, log, "a command", "A note.")
    assert "    a command\n" in card
    assert f"Top-1: **{told['top1']:.1%}**" in card
    assert "--crops 12" in card
    assert "| classifier | 20 | 1.5 |" in card
    assert "| 6 | 25.0% |" in card


@trained
def test_the_committed_files_name_no_folder_and_every_crop() -> None:
    for folder, count in (("test", 64), ("calibration", 16)):
        names = {f.stem for f in (MODEL / folder).glob("*.png")}
        assert names == set(json.loads((MODEL / folder / "labels.json").read_text()))
        assert len(names) == count
    for config in MODEL.rglob("*.json"):
        assert str(ROOT) not in config.read_text(), config


@trained
def test_the_committed_model_names_digits() -> None:
    pipe = VisionPipeline.from_pretrained(MODEL)
    made = [make_crop(FILE_SEED, 2000 + i, split="held-out") for i in range(24)]
    found = pipe(torch.stack([image for image, _ in made])).labels.tolist()
    assert sum(a == digit for a, (_, digit) in zip(found, made, strict=True)) / 24 > 0.6
