"""swin-digits: its loss, its training in stages, what is measured of it, the committed model."""

import json
import math
from dataclasses import replace
from pathlib import Path

import draw_swin_digits
import evaluate_swin_digits
import numpy as np
import pytest
import swin_digits_card
import swin_digits_model
import torch
import train_swin_digits
from digit_canvases import CLASSES, SIZES, draw_canvas, make_canvas, render_canvas
from evaluate_swin_digits import background_windows, digits_right, share_table
from PIL import Image
from swin_digits_model import build_pipeline, export, swin_of
from swin_digits_training import (
    ADAPT,
    DENSE,
    TUNE,
    SegmentationPhase,
    SegmentationSettings,
    adapting,
    canvases,
    segmentation_loss,
    segmentation_step,
    tuning,
)
from torch.nn import functional as F
from window_adaptation import keeps_plan, window_blocks

import accel
from accel.pipelines.enable import enabled, plan_of
from accel.pipelines.vision import VisionPipeline
from accel.pipelines.vision_images import ImageFolder
from accel.plan import Plan
from accel.window_keeps import WindowKeeps

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "samples" / "models" / "swin-digits"
trained = pytest.mark.skipif(not MODEL.exists(), reason="swin-digits is not trained yet")
SETTINGS = SegmentationSettings(
    phases=(SegmentationPhase(0.5, 64, 2, (1, 2)), SegmentationPhase(1.0, 96, 1))
)
STAGES = {
    name: replace(SETTINGS, muon_rate=rate)
    for name, rate in (("dense", 3e-3), ("adapt", 1e-3), ("tune", 5e-4))
}


def tiny_pipe(size: int = 96) -> VisionPipeline:
    torch.manual_seed(0)
    small = {"embed_dim": 8, "depths": (2, 1, 2, 1), "num_heads": (1, 2, 2, 4), "window_size": 2}
    return build_pipeline(size, head_width=8, **small)


def test_the_loss_is_what_it_says_in_float64() -> None:
    random = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 11, 5, 7, generator=random, dtype=torch.float64)
    classes = torch.randint(0, 4, (3, 5, 7), generator=random)
    p = logits.softmax(1)
    entropy, weights = 0.0, 0.0
    for b in range(3):
        for h in range(5):
            for w in range(7):
                c = int(classes[b, h, w])
                weight = 0.2 if c == 0 else 1.0
                entropy -= weight * math.log(p[b, c, h, w])
                weights += weight
    missed = []
    for c in (1, 2, 3):
        there = classes == c
        dice = 2 * p[:, c][there].sum() / (p[:, c].sum() + there.sum())
        missed.append(1 - float(dice))
    expected = entropy / weights + 0.7 * sum(missed) / 3
    found = segmentation_loss(logits.float(), classes, 0.2, 0.7)
    assert float(found) == pytest.approx(expected, rel=1e-5)
    ground = torch.zeros_like(classes)
    entropy = F.cross_entropy(logits, ground)
    assert float(segmentation_loss(logits.float(), ground, 0.2, 0.7)) == pytest.approx(
        float(entropy), rel=1e-5
    )


def test_a_batch_is_a_function_of_stage_and_step() -> None:
    phase = SegmentationPhase(1.0, 64, 3, (1, 2))
    pixels, classes = canvases(phase, 0, 1, 4)
    assert pixels.shape == (3, 3, 64, 64)
    assert classes.shape == (3, 64, 64)
    assert torch.equal(pixels, canvases(phase, 0, 1, 4)[0])
    for other in ((1, 1, 4), (0, 0, 4), (0, 1, 5)):
        assert not torch.equal(pixels, canvases(phase, *other)[0])


def test_a_size_and_back_leaves_the_model_as_it_was() -> None:
    pipe = tiny_pipe()
    image = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        before = pipe.model(image)
        pipe.set_input_size(64, 64)
        assert pipe.model(image[:, :, :64, :64]).shape == (1, 11, 64, 64)
        pipe.set_input_size(96, 96)
        assert torch.equal(pipe.model(image), before)


@pytest.mark.parametrize("adapted", [False, True])
def test_a_step_trains_all_parts(adapted: bool) -> None:
    pipe = tiny_pipe()
    around = {"around": adapting(pipe, 0)} if adapted else {}
    before = {name: weight.clone() for name, weight in pipe.model.state_dict().items()}
    step, parts = segmentation_step(pipe, SETTINGS, 0, **around)
    shown = {}
    for index, progress in enumerate((0.1, 0.2, 0.6, 0.9)):
        shown |= step(index, progress)
    assert {"loss", "right", "right_64", "right_96"} == set(shown)
    assert all(math.isfinite(value) for value in shown.values())
    for name, weight in pipe.model.state_dict().items():
        assert not torch.equal(before[name], weight), name
        assert torch.isfinite(weight).all()
    assert set(parts) == {"model", "muon", "adam", "average"}


def test_steps_of_adaptation_have_keeps_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    import swin_digits_training

    pipe, plans = tiny_pipe(), []

    def enabling(model, plan, **settings):
        plans.append((plan.windows.keeps, settings))
        return original(model, plan, **settings)

    original = swin_digits_training.enabled
    monkeypatch.setattr(swin_digits_training, "enabled", enabling)
    around = adapting(pipe, 3)
    for index in (0, 1, 0):
        with around(index):
            assert "_accel" in vars(swin_of(pipe))
        assert "_accel" not in vars(swin_of(pipe))
    assert plans[0] == plans[2] != plans[1]
    assert list(plans[0][0]) == window_blocks(pipe.model)


def test_steps_of_tuning_go_round_the_plans_and_the_dense_model() -> None:
    pipe = tiny_pipe()
    sites = window_blocks(pipe.model)
    around = tuning(pipe, [WindowKeeps(dict.fromkeys(sites, keep)) for keep in (0.5, 0.25)])
    seen = []
    for index in range(6):
        with around(index):
            plan = plan_of(swin_of(pipe))
            seen.append(None if plan is None else plan.windows.keeps[sites[0]])
    assert seen == [0.5, 0.25, None] * 2


def test_phases_grow_to_whole_canvases() -> None:
    for settings in (DENSE, ADAPT, TUNE):
        assert [p.until for p in settings.phases] == sorted(p.until for p in settings.phases)
        assert settings.phases[-1].until == 1.0
        assert settings.phases[-1].size == 512
        assert settings.phases[-1].digits is None
        assert settings.phases[-1].sizes == SIZES
    assert DENSE.muon_rate > ADAPT.muon_rate > TUNE.muon_rate


def train(folder: Path, name: str, steps: list[int], **settings) -> dict[str, torch.Tensor]:
    out = folder / name
    given = {"minutes": 0, "seed": 1, "keeps": [], "threads": 1, "resume": False}
    given |= {
        "bfloat16": False,
        "compiled": False,
        "work": folder / "work",
        "stages": STAGES,
        "pipe": tiny_pipe(),
    }
    train_swin_digits.main(steps=steps, out=out, **given | settings)
    return VisionPipeline.from_pretrained(out).model.state_dict()


@pytest.fixture
def few_files(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"test": range(1), "calibration": range(100, 101)}
    monkeypatch.setattr(swin_digits_model, "FILES", files)


class Killed(Exception):
    """What ends a run in the middle."""


@pytest.mark.parametrize("dies", [("dense", 3), ("adapt", 1)])
def test_a_resumed_training_is_the_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies: tuple[str, int]
) -> None:
    monkeypatch.setattr(train_swin_digits, "write_canvases", lambda out: None)
    whole = train(tmp_path, "whole", [4, 2], work=tmp_path / "one")
    with pytest.raises(SystemExit, match="resume"):
        train(tmp_path, "whole", [4, 2], work=tmp_path / "one")
    original = train_swin_digits.segmentation_step

    def dying(pipe, settings, seed, stage, **more):
        step, parts = original(pipe, settings, seed, stage, **more)

        def until(index: int, progress: float) -> dict[str, float]:
            if (list(STAGES)[stage], index) == dies:
                raise Killed
            return step(index, progress)

        return until, parts

    monkeypatch.setattr(train_swin_digits, "segmentation_step", dying)
    monkeypatch.setattr(
        train_swin_digits.Run.stage,
        "__kwdefaults__",
        {**train_swin_digits.Run.stage.__kwdefaults__, "checkpoint_minutes": 0.0},
    )
    with pytest.raises(Killed):
        train(tmp_path, "two", [4, 2], work=tmp_path / "two-work")
    monkeypatch.setattr(train_swin_digits, "segmentation_step", original)
    again = train(tmp_path, "two", [4, 2], work=tmp_path / "two-work", resume=True)
    assert set(again) == set(whole)
    for name, weight in whole.items():
        assert torch.equal(again[name], weight), name


@pytest.mark.usefixtures("few_files")
def test_found_keeps_are_tuned_for_in_a_folder_of_their_own(tmp_path: Path) -> None:
    work = tmp_path / "work"
    pipe = tiny_pipe()
    keeps = dict.fromkeys(window_blocks(pipe.model), 0.5)
    plan = keeps_plan(pipe.model, WindowKeeps(keeps))
    plan.save(tmp_path / "found.json")
    with pytest.raises(SystemExit, match=r"adapt\.pt"):
        train(tmp_path, "tuned", [2], keeps=[tmp_path / "found.json"])
    adapted = train(tmp_path, "adapted", [2, 2])
    tuned = train(tmp_path, "tuned", [2], keeps=[tmp_path / "found.json"], resume=True)
    kept = VisionPipeline.from_pretrained(tmp_path / "adapted").model.state_dict()
    assert all(torch.equal(kept[name], weight) for name, weight in adapted.items())
    assert any(not torch.equal(tuned[name], weight) for name, weight in adapted.items())
    # by what the plan is: another one of the same name is tuned for anew
    names = ["adapt.pt", "dense.pt", f"tune-{plan.digest}.pt"]
    assert sorted(p.name for p in work.glob("*.pt")) == names
    files = sorted(p.name for p in (tmp_path / "tuned").iterdir())
    assert files == ["config.json", "model.safetensors"]


def test_an_export_loads_in_float32(tmp_path: Path) -> None:
    pipe = tiny_pipe()
    export(tmp_path / "m", pipe)
    loaded = VisionPipeline.from_pretrained(tmp_path / "m")
    assert loaded.classes == CLASSES
    assert loaded.dtype == pipe.dtype == torch.float32
    for name, weight in pipe.model.state_dict().items():
        torch.testing.assert_close(loaded.model.state_dict()[name], weight, atol=1e-3, rtol=1e-3)


def test_windows_without_digits_are_counted_by_stage() -> None:
    classes = torch.zeros(512, 512, dtype=torch.int64)
    classes[40, 300] = 3  # one window of every stage
    found = background_windows(classes)
    assert found == {f"stage {i + 1}": pytest.approx(1 - 4.0**i / 1024) for i in range(4)}


def test_a_digit_is_right_where_most_of_it_is() -> None:
    canvas = draw_canvas(2, 1, height=256, width=320, digits=(3, 3))
    classes = render_canvas(canvas)[1].long()
    assert [hit for _, hit in digits_right(canvas, classes, classes)] == [True] * 3
    found = classes.clone()
    first = canvas.digits[0]
    top, left = (int(c - 0.62 * first.size) for c in first.centre)
    side = int(1.24 * first.size)
    found[max(0, top) : top + side + 2, max(0, left) : left + side + 2] = 0
    rows = digits_right(canvas, classes, found)
    assert [hit for _, hit in rows] == [False, True, True]
    assert rows[0][0] == first.size
    table = share_table([(25.0, True), (30.0, False), (100.0, True)])
    assert table == {
        "20 to 40": {"digits": 2, "right": 0.5},
        "40 to 80": {"digits": 0, "right": None},
        "80 to 140": {"digits": 1, "right": 1.0},
    }


@pytest.mark.usefixtures("few_files")
def test_evaluation_and_card_tell_what_was_measured(tmp_path: Path) -> None:
    train(tmp_path, "m", [2, 1], bfloat16=True)
    folder = tmp_path / "m"
    pipe = VisionPipeline.from_pretrained(folder)
    plan = evaluate_swin_digits.same_keep(pipe, 0.25).save(tmp_path / "quarter.json")
    asked = {"keeps": [0.5], "plans": [plan], "threads": 1, "out": None}
    evaluate_swin_digits.main(folder, canvases=2, **asked)
    told = json.loads((folder / "evaluation.json").read_text())
    assert 0 <= told["miou"] <= 1
    assert set(told["iou"]) <= set(CLASSES)
    assert told["test_files"]["images"] == 1
    assert (set(told["keeps"]), set(told["plans"])) == ({"0.5"}, {str(plan)})
    assert set(told["background_windows"]) == {f"stage {i}" for i in (1, 2, 3, 4)}
    log = tmp_path / "work" / "log.jsonl"
    with log.open("a") as file:  # a stage writes every twenty steps
        file.write('{"stage": "adapt", "steps": 20, "seconds": 90.0, "right_96": 0.25}\n')
    card = swin_digits_card.card(folder, log, "a command", "A note.")
    assert "    a command\n" in card
    assert "A note." in card
    assert f"{told['miou']:.1%}" in card
    assert "--canvases 2 \\\n        --keeps 0.5 \\\n        --plans" in card
    assert "| adapt | 20 | 1.5 |" in card
    assert "| adapt | 96 | 25.0% |" in card


@trained
def test_the_committed_model_is_small_and_names_no_folder() -> None:
    both = [MODEL, MODEL.with_name("vit-digits")]
    files = [f for folder in both for f in folder.rglob("*") if f.is_file()]
    assert 0 < sum(f.stat().st_size for f in files) <= 12 * 2**20
    for config in MODEL.rglob("*.json"):
        assert str(ROOT) not in config.read_text(), config


@trained
def test_the_committed_canvases_are_those_of_their_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = len(swin_digits_model.FILES["test"])
    monkeypatch.setattr(swin_digits_model, "FILES", {"test": range(1)})
    swin_digits_model.write_canvases(tmp_path)
    names = sorted(f.name for f in (MODEL / "test").iterdir())
    assert names == sorted(f"{i:03d}{end}.png" for i in range(count) for end in ("", "-classes"))
    # other versions of OpenCV and Pillow may round otherwise
    for name, most in (("000.png", 3.0), ("000-classes.png", 0.01)):
        ours, theirs = (
            np.asarray(Image.open(folder / name).convert("RGB"), np.float32)
            for folder in (tmp_path / "test", MODEL / "test")
        )
        assert np.abs(ours - theirs).mean() < most


def test_more_canvases_are_others_and_nothing_is_overwritten(tmp_path: Path) -> None:
    draw_swin_digits.main(2, draw_swin_digits.FIRST, tmp_path / "more")
    names = ["000-classes.png", "000.png", "001-classes.png", "001.png"]
    assert sorted(f.name for f in (tmp_path / "more").iterdir()) == names
    folder = ImageFolder.of(str(tmp_path / "more"))
    right = folder.right("000-001", CLASSES, "segmentation")
    for number in (0, 1):
        index = draw_swin_digits.FIRST + number
        _, classes = make_canvas(swin_digits_model.FILE_SEED, index, split="held-out")
        assert (right[number] == classes.numpy()).all()
    first = draw_swin_digits.FIRST
    assert not {first, first + 1} & {i for of in swin_digits_model.FILES.values() for i in of}
    with pytest.raises(SystemExit, match="holds files"):
        draw_swin_digits.main(2, first, tmp_path / "more")
    with pytest.raises(SystemExit, match=r"among the committed ones: give a --first from 124 on"):
        draw_swin_digits.main(2, 47, tmp_path / "others")


@trained
def test_the_committed_model_finds_the_digits_of_a_canvas() -> None:
    pipe = VisionPipeline.from_pretrained(MODEL)
    digits = []
    for index in (2000, 2001):
        canvas = draw_canvas(swin_digits_model.FILE_SEED, index, split="held-out")
        image, classes = render_canvas(canvas, split="held-out")
        digits += digits_right(canvas, classes.long(), pipe(image).labels[0])
    assert sum(hit for _, hit in digits) / len(digits) > 0.5


@trained
@pytest.mark.parametrize("name", ["swin-digits", "swin-digits-fast"])
def test_the_committed_plans_leave_windows_out_and_find_what_dense_finds(name: str) -> None:
    pipe = VisionPipeline.from_pretrained(MODEL)
    plan = Plan.load(ROOT / "samples" / "plans" / f"{name}.json")
    front = ROOT / "samples" / "plans" / "swin-digits-front" / "plans"
    assert plan.digest in {Plan.load(path).digest for path in front.iterdir()}
    paths = [MODEL / "test" / f"{number:03d}.png" for number in (0, 1)]
    dense = pipe(paths).labels
    with enabled(pipe, plan, strict=True):
        found = pipe(paths).labels
        rows = accel.summary(pipe).rows
    assert max(row.keep for row in rows) < 1
    digits = (dense > 0) | (found > 0)
    assert float((found == dense)[digits].float().mean()) > 0.8
