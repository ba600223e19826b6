"""Metrics against naive versions and against what they are meant to tell apart."""

import json
import subprocess
import sys
from math import exp, inf

import numpy as np
import pytest
import torch

from accel.errors import AccelError
from accel.metrics import Classifier, capped, flicker, psnr, ssim


@pytest.fixture
def random():
    return np.random.default_rng(3)


def _video(random, frames=2, height=13, width=17):
    return random.random((frames, height, width, 3), dtype=np.float32)


def test_psnr_is_the_log_of_the_mean_squared_error(random):
    a = _video(random)
    assert psnr(a, a + np.float32(0.1)) == pytest.approx(20, abs=1e-3)


def test_psnr_of_equal_videos_is_infinite_and_reported_as_100_db(random):
    a = _video(random)
    assert psnr(a, a.copy()) == inf
    assert capped(psnr(a, a)) == 100.0


def test_psnr_refuses_videos_of_different_shapes(random):
    with pytest.raises(ValueError, match="differ in shape"):
        psnr(_video(random), _video(random, frames=3))


def _naive_ssim(a, b):
    place = range(-5, 6)
    weight = np.array([[exp(-(i * i + j * j) / 4.5) for j in place] for i in place])
    weight /= weight.sum()
    values = []
    for frame in range(a.shape[0]):
        for channel in range(3):
            for i in range(a.shape[1] - 10):
                for j in range(a.shape[2] - 10):
                    x, y = (v[frame, i : i + 11, j : j + 11, channel].astype(float) for v in (a, b))
                    mx, my = (weight * x).sum(), (weight * y).sum()
                    vx, vy = (weight * (x - mx) ** 2).sum(), (weight * (y - my) ** 2).sum()
                    cov = (weight * (x - mx) * (y - my)).sum()
                    top = (2 * mx * my + 1e-4) * (2 * cov + 9e-4)
                    values.append(top / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))
    return np.mean(values)


def test_ssim_is_that_of_a_loop_over_windows(random):
    a = _video(random)
    b = (a + 0.2 * _video(random)).astype(np.float32)
    assert ssim(a, b) == pytest.approx(_naive_ssim(a, b), abs=1e-9)
    assert ssim(a, a) == pytest.approx(1, abs=1e-12)


def test_ssim_refuses_frames_below_its_window(random):
    with pytest.raises(ValueError, match="11 x 11"):
        ssim(_video(random, height=9), _video(random, height=9))


def test_flicker_forgives_motion_and_counts_noise(random):
    rows, columns = np.meshgrid(np.arange(40), np.arange(48), indexing="ij")
    frames = [
        0.5 + 0.25 * np.sin((rows + t) / 4) + 0.25 * np.cos((columns - 2 * t) / 5) for t in range(5)
    ]
    moving = np.repeat(np.stack(frames)[..., None], 3, axis=3).astype(np.float32)
    noisy = (moving + 0.1 * random.standard_normal(moving.shape)).astype(np.float32).clip(0, 1)
    plain = float(np.abs(np.diff(moving, axis=0)).mean())
    assert flicker(moving) < 0.35 * plain
    assert flicker(noisy) > 2 * flicker(moving)
    assert flicker(moving[:1]) == 0


@pytest.fixture
def classifier(tmp_path):
    """A classifier that answers with its bias: "two" and "seven" first, whatever it sees."""
    import timm
    from safetensors.torch import save_file

    labels = ["two", "seven", "nine"]
    config = {
        "architecture": "test_resnet",
        "num_classes": 3,
        "in_chans": 3,
        "input_size": [3, 32, 32],
        "labels": labels,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "kind": "multilabel",
    }
    model = timm.create_model("test_resnet", num_classes=3)
    torch.nn.init.zeros_(model.fc.weight)
    model.fc.bias.data = torch.tensor([2.0, 1.0, 0.0])
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_classifier_reads_the_labels_that_the_prompt_names(classifier, random):
    judge = Classifier.load(classifier)
    video = _video(random, frames=3, height=24, width=40)
    assert judge.reads(video, "a Two moving left") == 1
    assert judge.reads(video, "a seven, and a two") == 1
    assert judge.reads(video, "a seven") == 0
    assert judge.reads(video, "twofold") is None


class _Brightness(torch.nn.Module):
    """Says "two" of bright frames and "nine" of dark ones."""

    def forward(self, frames):
        bright = frames.mean((1, 2, 3))
        return torch.stack([bright, torch.zeros_like(bright), -bright], 1)


def test_with_places_every_label_is_looked_for_in_its_own():
    places = {"top": (0, 0, 8, 24), "left": (8, 0, 16, 8), "top left": (0, 0, 8, 8)}
    labels = ("two", "seven", "nine")
    judge = Classifier(_Brightness(), labels, (3, 8, 8), (0.5,) * 3, (0.25,) * 3, places)
    image = np.zeros((1, 16, 24, 3), dtype=np.float32)
    image[:, :8, :8] = 1
    prompt = "a two top left and a nine left"
    assert judge.placed_in(prompt) == [("two", "top left"), ("nine", "left")]
    assert judge.reads(image, prompt) == 1
    assert judge.reads(image, "a two at the left and a two at the top left") == 0.5
    assert judge.reads(image, "a seven top, a nine right") == 0
    assert judge.reads(image, "a topless two") is None


def test_a_classifier_that_cannot_be_read_is_one_clear_error(classifier, tmp_path):
    config = json.loads((classifier / "config.json").read_text())
    (classifier / "config.json").write_text(json.dumps({**config, "kind": "regression"}))
    with pytest.raises(AccelError, match="regression"):
        Classifier.load(classifier)
    with pytest.raises(AccelError, match="cannot be loaded"):
        Classifier.load(tmp_path / "nowhere")


def test_importing_metrics_is_lean():
    code = (
        "import sys, accel.metrics; heavy = {'cv2', 'timm', 'diffusers'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
