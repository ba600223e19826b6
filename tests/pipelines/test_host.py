import dataclasses
import re

import numpy as np
import pytest
import tiny_flux
import torch
from tiny_wan import CALL, tiny_wan_config

from accel.errors import AccelError
from accel.pipelines.host import Host, ModelConfig, find_path
from accel.pipelines.model_settings import model_config


@pytest.fixture(scope="module")
def config(tiny_wan_path):
    values = tiny_wan_config(tiny_wan_path)
    prompts = {name: tuple(values[name]) for name in ("prompts", "calibration")}
    return ModelConfig(**{**values, **prompts})


@pytest.fixture(scope="module")
def host(config):
    return Host(config)


def test_a_video_is_frames_in_zero_to_one(host):
    video = host.generate("a seven moving left", 0)
    assert video.shape == (CALL["num_frames"], CALL["height"], CALL["width"], 3)
    assert video.dtype == np.float32
    assert 0 <= video.min() < video.max() <= 1


def test_the_seed_alone_makes_the_noise(host):
    first = host.generate("a seven moving left", 0)
    torch.rand(3)
    assert np.array_equal(host.generate("a seven moving left", 0), first)
    assert not np.array_equal(host.generate("a seven moving left", 1), first)


def test_a_call_may_be_overridden(host):
    assert host.steps == CALL["num_inference_steps"]
    video = host.generate("a two", 0, num_frames=5, num_inference_steps=1)
    assert len(video) == 5


def test_an_image_is_a_video_of_one_frame(tiny_flux_path):
    host = Host(model_config(tiny_flux.tiny_flux_config(tiny_flux_path)))
    image = host.generate("a seven top left", 0)
    assert image.shape == (1, tiny_flux.CALL["height"], tiny_flux.CALL["width"], 3)
    assert image.dtype == np.float32
    assert 0 <= image.min() < image.max() <= 1
    latents = host.latents("a seven top left", 0)
    assert latents.shape == (1, 8 * 12, 12)
    assert np.array_equal(host.latents("a seven top left", 0), latents)


def test_dtype_and_device_are_those_of_the_configuration(config):
    host = Host(dataclasses.replace(config, dtype="bfloat16", device="cpu"))
    assert host.pipe.transformer.dtype == torch.bfloat16
    assert host.device == torch.device("cpu")
    assert dataclasses.replace(config, device="auto").resolved_device().type in ("cpu", "cuda")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(
            {"path": "no-such/model"},
            "model 'tiny-wan' cannot be loaded from 'no-such/model'",
            id="path",
        ),
        pytest.param(
            {"path": "no/such/model"}, "'no/such/model', which is no folder here", id="deep path"
        ),
        pytest.param(
            {"pipeline": "diffusers.NoPipeline"}, "model 'tiny-wan' cannot be loaded", id="class"
        ),
        pytest.param(
            {"pipeline": "no_module.Pipeline"}, "No module named 'no_module'", id="module"
        ),
        pytest.param(
            {"pipeline": "WanPipeline"}, "model.pipeline is 'WanPipeline'", id="no module"
        ),
        pytest.param(
            {"dtype": "float8"}, "model.dtype is 'float8'; take one of float32", id="dtype"
        ),
        pytest.param(
            {"places": {"top": [8, 0, 8, 9]}},
            "model.places.top must be [top, left, bottom, right] in pixels, got [8, 0, 8, 9]",
            id="place",
        ),
        pytest.param({"prompts": ()}, "model.prompts must be prompts with text", id="no prompts"),
        pytest.param({"calibration": ("a", " ")}, "model.calibration must be", id="blank prompt"),
    ],
)
def test_what_cannot_be_loaded_says_why(config, changes, message):
    with pytest.raises(AccelError, match=re.escape(message)):
        Host(dataclasses.replace(config, **changes))


def test_who_looks_at_calibration_prompts_says_that_there_are_none(config):
    without = dataclasses.replace(config, calibration=())
    assert without.prompts == config.prompts
    with pytest.raises(AccelError, match=r"model\.calibration of .* is empty"):
        _ = without.calibrated_on


def test_a_call_that_the_pipeline_does_not_take_is_refused_in_one_line(host):
    with pytest.raises(AccelError, match=r"model.call.hight: .* did you mean 'height'"):
        host.generate("a two", 0, hight=64)
    with pytest.raises(AccelError, match=r"refuses .*'height': 60.*divisible by 16"):
        host.generate("a two", 0, height=60)


def test_paths_are_looked_for_here_and_in_the_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert find_path("here") == str(tmp_path / "here")
    assert find_path("accel/plan.py").endswith("accel/plan.py")
    assert find_path("owner/name") == "owner/name"
