"""The canvases of swin-digits and vit-digits: the same again, true to their classes, mostly empty,
and of two sets of scans that never meet.
"""

from dataclasses import replace

import digit_canvases
import numpy as np
import pytest
import torch
from digit_canvases import (
    APART,
    CANVAS,
    CLASSES,
    SIZES,
    SOLID,
    draw_canvas,
    ink_of,
    make_canvas,
    render_canvas,
)
from digit_crops import CROP, draw_crop, make_crop
from moving_digits import scans

SIDES = {"height": 96, "width": 160}


def test_a_canvas_is_a_function_of_seed_index_and_size() -> None:
    image, classes = make_canvas(3, 17, **SIDES)
    again, same = make_canvas(3, 17, **SIDES)
    assert torch.equal(image, again)
    assert torch.equal(classes, same)
    assert image.shape == (3, 96, 160)
    assert classes.shape == (96, 160)
    assert image.dtype == classes.dtype == torch.uint8
    assert not torch.equal(image, make_canvas(3, 18, **SIDES)[0])
    assert not torch.equal(image, make_canvas(4, 17, **SIDES)[0])
    assert len(CLASSES) == 11


@pytest.mark.parametrize("split", ["train", "held-out"])
@pytest.mark.parametrize("index", range(4))
def test_classes_are_the_ink_and_a_narrow_border(index: int, split: str) -> None:
    canvas = draw_canvas(5, index, height=256, width=320, split=split)
    _, classes = render_canvas(canvas, split=split)
    left = classes.numpy().copy()
    for digit in canvas.digits:
        opacity, top, first = ink_of(digit, split)
        rows, columns = np.nonzero(opacity > SOLID)
        rows, columns = rows + top, columns + first
        inside = (rows >= 0) & (rows < 256) & (columns >= 0) & (columns < 320)
        assert inside.mean() > 0.9
        rows, columns = rows[inside], columns[inside]
        assert len(rows) > 0.03 * digit.size**2
        assert (classes[rows, columns] == 1 + digit.digit).all()
        for row, column in zip(rows, columns, strict=True):
            left[max(0, row - 2) : row + 3, max(0, column - 2) : column + 3] = 0
    assert not left.any()


def test_what_is_drawn_is_seen_and_clutter_is_background() -> None:
    canvas = replace(draw_canvas(6, 0, height=160, width=192), clutter=1.0)
    bare = replace(canvas, digits=())
    image, classes = render_canvas(canvas)
    empty, none = render_canvas(bare)
    assert not none.any()
    spread = empty.float().std((1, 2)).max()
    assert spread > 2  # there is something on it
    clean = replace(canvas, clutter=0.0)
    with_digits, classes = render_canvas(clean)
    digit = clean.digits[0]
    shown = with_digits[:, classes == 1 + digit.digit].float().mean(1)
    ground = with_digits[:, classes == 0].float().mean(1)
    assert (shown - ground).abs().max() > 25
    assert image.shape == with_digits.shape


def test_most_of_a_canvas_is_background_and_digits_differ_in_size() -> None:
    sizes, counts, empty = [], [], []
    for index in range(12):
        canvas = draw_canvas(7, index)
        classes = render_canvas(canvas)[1]
        assert classes.shape == (CANVAS, CANVAS)
        empty.append(float((classes.view(16, 32, 16, 32).amax((1, 3)) == 0).float().mean()))
        sizes += [digit.size for digit in canvas.digits]
        counts.append(len(canvas.digits))
    assert np.mean(empty) > 0.75
    assert min(empty) > 0.5
    assert min(counts) >= 1
    assert max(counts) <= 8
    assert len(set(counts)) > 3
    assert min(sizes) < 30
    assert max(sizes) > 100
    assert SIZES[0] <= min(sizes) <= max(sizes) <= SIZES[1]


def test_digits_do_not_meet_and_are_as_many_as_asked() -> None:
    for index in range(20):
        canvas = draw_canvas(8, index, height=256, width=256, digits=(2, 5))
        assert 2 <= len(canvas.digits) <= 5
        for number, one in enumerate(canvas.digits):
            for other in canvas.digits[:number]:
                distance = np.hypot(*np.subtract(one.centre, other.centre))
                assert distance > APART * (one.size + other.size)
    alone = draw_canvas(8, 0, height=64, width=64)
    assert len(alone.digits) == 1


def test_a_crop_has_one_digit_and_its_class() -> None:
    seen = set()
    for index in range(30):
        image, digit = make_crop(9, index)
        canvas = draw_crop(9, index)
        assert [d.digit for d in canvas.digits] == [digit]
        assert image.shape == (3, CROP, CROP)
        classes = render_canvas(canvas)[1]
        assert set(classes.unique().tolist()) == {0, 1 + digit}
        seen.add(digit)
    assert len(seen) > 6
    assert torch.equal(make_crop(9, 3, side=64)[0], make_crop(9, 3, side=64)[0])


@pytest.fixture
def splits(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Which sets of scans are looked at."""
    seen = set()

    def looking(split: str):
        seen.add(split)
        return scans(split)

    monkeypatch.setattr(digit_canvases, "scans", looking)
    return seen


def test_training_sees_no_held_out_scan(splits: set[str]) -> None:
    from swin_digits_training import ADAPT, DENSE, TUNE, canvases
    from vit_digits_training import ClassifierSettings, crops

    for stage, settings in enumerate((DENSE, ADAPT, TUNE)):
        for phase in settings.phases:
            canvases(replace(phase, size=64, batch=2), 0, stage, 5)
    for phase in ClassifierSettings().phases:
        crops(replace(phase, batch=2), 0, 5, 48, 8)
    assert splits == {"train"}


def test_committed_files_and_evaluations_see_nothing_else(
    splits: set[str], tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import swin_digits_model
    import vit_digits_model

    for module in (swin_digits_model, vit_digits_model):
        monkeypatch.setattr(module, "FILES", {"test": range(1)})
    swin_digits_model.write_canvases(tmp_path / "swin")
    vit_digits_model.write_crops(tmp_path / "vit")
    assert splits == {"held-out"}
    train, held_out = (scans(split)[0].flatten(1) for split in ("train", "held-out"))
    assert len(train) + len(held_out) == 1797
    # the data set repeats no more than a few scans
    same = (held_out[:, None] == train[None]).all(2).any(1)
    assert same.float().mean() < 0.01
