"""What is said of a plan before it is applied."""

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_denoiser import GRID, tiny_denoiser, tiny_plan

import accel
from accel.choice import DENSE
from accel.pipelines.announce import announce
from accel.pipelines.provenance import device_name

HERE = device_name(torch.device("cpu"))
EXPECTED = {
    "speedup": 2.4,
    "measured_speedup": 2.456,
    "steps": 30,
    "device": "cpu",
    "dtype": "float32",
}


@pytest.fixture
def plan():
    return tiny_plan(DENSE, grid=GRID, expected=EXPECTED, provenance={"device": HERE})


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, logger="accel")
    return lambda: [(r.levelname, r.message) for r in caplog.records]


def test_enabling_says_the_speed_and_where(plan, said):
    accel.enable(tiny_denoiser(), plan)
    assert said() == [
        (
            "INFO",
            "plan 'tiny': speed-up of a whole generation 2.46x measured, 2.40x predicted"
            f" ({HERE}, float32, grid 3x5x7, 30 steps)",
        )
    ]


def test_what_is_not_known_is_not_said(said):
    model = tiny_denoiser()
    announce(tiny_plan(DENSE), model, model)
    assert said() == []
    announce(tiny_plan(DENSE, expected={"speedup": 1.5}), model, model)
    assert said() == [("INFO", "plan 'tiny': speed-up of a whole generation 1.50x predicted")]


@pytest.mark.parametrize(
    ("expected", "warned"),
    [
        ({"speedup": 0.9}, "0.90x predicted"),
        ({"speedup": 1.3, "measured_speedup": 0.87}, "0.87x measured"),
        ({"speedup": 0.9, "measured_speedup": 1.2}, None),  # what was measured decides
        ({"speedup": 1.0}, None),
    ],
)
def test_a_plan_that_promises_to_be_slow_is_a_warning(said, expected, warned):
    accel.enable(tiny_denoiser(), tiny_plan(DENSE, expected=expected))
    warnings = [text for level, text in said() if level == "WARNING"]
    assert len(warnings) == (warned is not None)
    if warned is not None:
        assert f"slower than the host's dense attention does: {warned}; run without" in warnings[0]


MOVED = {
    "another kind of device": ({"device": "cuda"}, {"device": "H100"}, "on H100, and", "on cpu:"),
    "another processor": ({}, {"device": "A processor, 9 threads"}, "on A processor", f"on {HERE}"),
    "another dtype": ({"dtype": "bfloat16"}, {}, "in bfloat16, and", "in float32:"),
}


@pytest.mark.parametrize(("expected", "provenance", "then", "now"), MOVED.values(), ids=MOVED)
def test_a_plan_that_was_priced_elsewhere_is_a_warning(plan, said, expected, provenance, then, now):
    plan = replace(
        plan,
        expected={**EXPECTED, **expected},
        provenance={**plan.provenance, **provenance},
    )
    model = tiny_denoiser()
    announce(plan, model, model)
    (_, (level, text)) = said()
    assert level == "WARNING"
    assert f"was priced {then}" in text
    assert f"this model is {now}" in text


def test_a_pipeline_knows_where_it_will_run(plan, said):
    model = tiny_denoiser()
    pipe = SimpleNamespace(transformer=model, _execution_device=torch.device("meta"))
    announce(plan, pipe, model)
    assert "this model is on meta" in said()[1][1]


def test_the_dtype_is_that_of_the_sites(plan, said):
    model = tiny_denoiser()
    model.patch_embedding.bfloat16()
    announce(plan, model, model)
    assert len(said()) == 1
    model.blocks.bfloat16()
    announce(plan, model, model)
    assert "in float32, and this model is in bfloat16" in said()[-1][1]
