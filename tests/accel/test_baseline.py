import json
from dataclasses import replace

import pytest
from cost_cases import baseline

from accel.baseline import Baseline
from accel.cost_calibration import Calibration
from accel.errors import AccelError
from accel.layout import Layout

LINE = Calibration(1.5, -2.0, runs=3)


def test_the_seconds_of_its_parts():
    made = baseline(share=0.6)
    assert made.total_share == pytest.approx(0.6)
    assert made.outside == pytest.approx(5.0)
    assert made.attention == pytest.approx({"a": 0.6, "b": 1.8})
    assert made.rest == pytest.approx(3.5 - 2.4)
    assert made.dense_seconds() == pytest.approx(40.0)
    assert made.dense_seconds(20) == pytest.approx(75.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"denoiser": 41.0}, "the denoiser is said to take 41 s of the 40 s of the generation"),
        ({"denoiser": 15.0}, "attention is said to take 20 s of the 15 s of the denoiser"),
        ({"denoiser": None, "share": 1.2}, "attention is said to take 48 s of the 40 s"),
    ],
)
def test_parts_that_exceed_their_whole_are_refused(change, words):
    with pytest.raises(AccelError, match=words):
        baseline(**change)
    near = baseline(denoiser=40.1)
    assert (near.outside, near.rest) == (0.0, pytest.approx(2.0))


def test_without_a_timed_denoiser_everything_is_in_it():
    made = baseline(denoiser=None)
    assert made.outside == 0
    assert made.dense_seconds(20) == pytest.approx(80.0)


@pytest.mark.parametrize(
    "layout",
    [
        Layout.of((4, 8, 7)),
        Layout.of((4, 8, 7), text_before=3, text_after=5, padding=2),
        Layout.of([(4, 8, 7), (1, 8, 7)], text_after=5),
    ],
    ids=["grid", "text and padding", "two grids"],
)
def test_it_survives_its_file(layout):
    made = replace(baseline(calibration=LINE, batch=2), layout=layout)
    assert Baseline.from_dict(json.loads(json.dumps(made.to_dict()))) == made


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"second": 1.0}, "no key 'second'"),
        ({"seconds": 0.0}, "seconds must be seconds above 0"),
        ({"seconds": None}, "seconds must be seconds above 0"),
        ({"denoiser": -1.0}, "denoiser must be seconds above 0"),
        ({"share": {"a": 1.5}}, "share must be parts"),
        ({"share": [1]}, "share must be of type dict"),
        ({"steps": 0}, "steps is a whole number"),
        ({"branches": 1.5}, "branches is a whole number"),
        ({"source": "hearsay"}, "source is one of"),
        ({"layout": []}, "layout: a layout needs"),
        ({"layout": [{"kind": "grid", "length": 6, "grid": [1, 2, 4]}]}, "makes 8 tokens"),
        ({"layout": [{"kind": "text", "length": 10**9, "grid": None}]}, "length is 1000000000"),
        ({"layout": [{"kind": "grid", "length": 6, "grid": ["x", 2, 3]}]}, "layout[0]"),
        ({"layout": [{"kind": "words", "length": 6, "grid": None}]}, "layout[0]"),
        ({"calibration": {"scale": 1.0}}, "calibration lacks"),
    ],
)
def test_what_a_file_may_not_hold(change, words):
    with pytest.raises(AccelError) as error:
        Baseline.from_dict({**baseline().to_dict(), **change})
    assert words in str(error.value)
