"""The picture of the trade-off: what is named in it, and how."""

import re

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from accel.pipelines import trade_off_picture
from accel.pipelines.trade_off_picture import trade_off


def arm(kind, speedup, psnr, front=None):
    quality = {"mean": psnr, "worst": psnr - 2}
    return {"kind": kind, "speedup": speedup, "psnr": quality, "front": front}


@pytest.fixture
def arms():
    made = {"ours": arm("plan", 1.9, 33.0), "unfinished": arm("recipe", None, 30.0)}
    made |= {f"f-{i}": arm("front", 1 + i / 4, 40.0 - i, "f") for i in range(1, 7)}
    made |= {f"recipe{i}": arm("recipe", 1 + i % 5 / 20, 30 + i % 3 / 2) for i in range(15)}
    made |= {"pab": arm("cache", 1.3, 34.0), "ours+pab": arm("plan + cache", 2.1, 31.0)}
    return made


def named(svg):
    """Matplotlib notes the text of every path."""
    return re.findall(r"<!-- (.*?) -->", svg.decode())


def test_every_arm_that_was_measured_is_named_once(arms):
    texts = named(trade_off(arms, "ours", {"f": [f"f-{i}" for i in range(6, 0, -1)]}))
    for text in ("ours", "pab", "+pab", "1", "6", *(f"recipe{i}" for i in range(15))):
        assert texts.count(text) == 1, text
    assert "unfinished" not in texts
    for kind in ("plans", "fronts", "recipes", "caches", "plan + cache"):
        assert kind in texts


def test_caches_of_two_plans_keep_the_plans_name(arms):
    arms["other+pab"] = arm("plan + cache", 2.4, 29.0)
    texts = named(trade_off(arms, "ours", {}))
    assert {"ours+pab", "other+pab"} <= set(texts)


def test_names_hardly_cover_each_other(arms, monkeypatch):
    """Fifteen recipes at nearly one place: of all names together not a tenth is covered."""
    kept, label = [], trade_off_picture._label

    def keeping(figure, *rest):
        kept.append(figure)
        label(figure, *rest)

    monkeypatch.setattr(trade_off_picture, "_label", keeping)
    trade_off(arms, "ours", {})
    figure: Figure = kept[0]
    FigureCanvasAgg(figure).draw()
    texts = [t for t in figure.axes[0].texts if t.get_text() != "fastest dense"]
    boxes = [text.get_window_extent() for text in texts]
    covered = sum(trade_off_picture._shared(a, b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert covered < 0.1 * sum(box.width * box.height for box in boxes)


def test_a_single_arm_needs_no_legend():
    assert "recipes" not in named(trade_off({"a": arm("recipe", 2.0, 30.0)}, "a", {}))
