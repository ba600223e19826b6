"""Stage-wise times of window pruning: what is timed is what the model does."""

import measure_windows
import pytest
import torch
from windowed import images, windowed

import accel
from accel.pipelines.enable import session_of
from accel.pipelines.window_blocks import stages_served


@pytest.fixture
def model():
    return windowed("swin")


def test_tells_every_stage_and_the_whole_model(model):
    found = measure_windows.measure(model, images("swin"), 0.5, rounds=1)
    assert list(found) == ["layers.0", "layers.1", "layers.2", "whole model"]
    assert found["layers.0"]["windows"] == 20
    assert found["layers.0"]["kept"] == 0.5
    assert set(found["layers.0"]["parts"]) == set(measure_windows.PARTS)
    lines = measure_windows.table({0.5: found})
    assert len(lines) == 2 + len(found)
    assert not hasattr(model, "_accel")


@torch.inference_mode()
def test_parts_are_those_of_the_pruned_stage(model):
    """Both end with the same tokens; what enters a stage is what entered it in the whole model."""
    pictures = images("swin")
    with accel.enabled(model, measure_windows.keeping(model, 0.5), check=False):
        stages = stages_served(session_of(model))
        entered = measure_windows.inputs_of(model, stages, pictures)
        whole = model.forward_features(pictures)
        last = measure_windows.pruned(stages[-1], entered[-1])
        torch.testing.assert_close(model.norm(last), whole)
        for stage, x in zip(stages, entered, strict=True):
            before = x.clone()
            seconds = measure_windows.part_seconds(stage, x)
            assert torch.equal(x, before)
            assert (seconds["ranking"] > 0) == (stage.last is not None)


@pytest.mark.parametrize("name", ["resnet18", "no_such_model"])
def test_what_has_no_windows_is_refused_in_one_line(name):
    with pytest.raises(SystemExit, match=f"{name}' is no folder and no windowed model of timm"):
        measure_windows.model_of(name, 64)
