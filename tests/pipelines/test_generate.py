"""One video: the file, what is said about the plan, and what is refused before anything loads."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from tiny_flux import tiny_flux_config
from tiny_wan import CALL, tiny_wan_config

from accel.errors import AccelError, PlanError
from accel.pipelines.adapters import geometry_of
from accel.pipelines.generate import generate
from accel.pipelines.host import Host
from accel.pipelines.model_settings import model_config
from accel.pipelines.video_files import encode_animation, load_frames, save_frames, write_video
from accel.recipes import recipe


@pytest.fixture
def config(tiny_wan_path, tmp_path):
    return {
        "model": tiny_wan_config(tiny_wan_path),
        "prompt": "a seven moving left",
        "plan": "sparsed",
        "cache": None,
        "strict": True,
        "seed": 0,
        "steps": 2,
        "out": str(tmp_path / "video.gif"),
        "min_side": 64,
    }


def test_a_plan_makes_a_gif_and_a_summary(config, tmp_path, capsys):
    generate(config)
    with Image.open(tmp_path / "video.gif") as gif:
        assert gif.n_frames == CALL["num_frames"]
        assert gif.size == (2 * CALL["width"], 2 * CALL["height"])
    said = capsys.readouterr().out
    assert "plan 'sparsed'" in said
    assert "9 frames of 48 x 32" in said


def test_an_image_becomes_a_png(config, tiny_flux_path, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config |= {"model": tiny_flux_config(tiny_flux_path), "plan": None, "out": None}
    generate({**config, "prompt": "a seven top left"})
    with Image.open(tmp_path / "image.png") as image:
        assert image.format == "PNG"
        assert image.size == (2 * 48, 2 * 32)
    assert "image.png: one frame of 48 x 32" in capsys.readouterr().out


def test_what_the_plan_promises_is_said_before_it_generates(config, tmp_path, capsys, monkeypatch):
    class Stop(Exception):
        pass

    def stop(*_, **__):
        raise Stop

    monkeypatch.setattr(Host, "generate", stop)
    plan = recipe("sparsed", geometry_of(Host(model_config(config["model"])).pipe))
    path = replace(plan, expected={"speedup": 1.37}).save(tmp_path / "plan.json")
    for given, told in (
        (str(path), "plan 'sparsed': speed-up of a whole generation 1.37x predicted\n"),
        ("sparsed", "plan 'sparsed': no speed-up is predicted, for it was not priced; "),
    ):
        with pytest.raises(Stop):
            generate({**config, "plan": given})
        said = capsys.readouterr().out
        assert told in said
        assert said.count("\n") == 1


@pytest.mark.parametrize("cache", ["magcache", {"cache": "fbcache", "threshold": 0.9}])
def test_a_cache_goes_with_a_plan_or_alone(config, tmp_path, capsys, cache):
    generate({**config, "cache": cache})
    assert "plan 'sparsed'" in capsys.readouterr().out
    generate({**config, "plan": None, "cache": cache, "out": str(tmp_path / "alone.gif")})
    assert (tmp_path / "alone.gif").is_file()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"prompt": " "}, AccelError, "there is no prompt"),
        ({"prompt": None}, AccelError, "there is no prompt"),
        ({"out": "video.avi"}, AccelError, "did you mean '.gif'"),
        ({"cache": "fbcash"}, AccelError, "did you mean 'fbcache'"),
        ({"plan": "sparsd"}, PlanError, "did you mean 'sparsed'"),
    ],
)
def test_what_cannot_work_is_one_clear_error(config, changes, error, message):
    with pytest.raises(error, match=message):
        generate({**config, **changes})


def test_unknown_and_missing_settings_of_a_model_are_named(config):
    model = config["model"]
    with pytest.raises(AccelError, match="did you mean 'dtype'"):
        generate({**config, "model": {**model, "dtyp": "float32"}})
    del model["call"]
    with pytest.raises(AccelError, match="'call'"):
        generate(config)


@pytest.fixture
def video():
    ramp = np.linspace(0, 1, 5 * 16 * 24 * 3, dtype=np.float32)
    return ramp.reshape(5, 16, 24, 3)


def test_frames_come_back_within_half_a_grey_level(video, tmp_path):
    path = save_frames(tmp_path / "deep" / "v.npz", video)
    assert np.abs(load_frames(path) - video).max() <= 0.5 / 255 + 1e-6


def test_mp4_has_every_frame(video, tmp_path):
    import cv2

    reader = cv2.VideoCapture(str(write_video(tmp_path / "v.mp4", video, fps=8)))
    shapes = []
    while (frame := reader.read()[1]) is not None:
        shapes.append(frame.shape)
    reader.release()
    assert shapes == [(16, 24, 3)] * 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["v.mp4"]


def test_a_video_is_no_png(video, tmp_path):
    with pytest.raises(AccelError, match=r"a video of 5 frames cannot .* write 'v.gif' instead"):
        write_video(tmp_path / "v.png", video, fps=8)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["gif", "webp"])
def test_small_frames_are_enlarged_by_whole_factors(video, tmp_path, kind):
    path = tmp_path / f"v.{kind}"
    path.write_bytes(encode_animation(video, kind, fps=10, min_side=40))
    with Image.open(path) as image:
        assert image.size == (72, 48)
        assert image.n_frames == 5
