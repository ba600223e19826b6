"""Attention maps: when masks are made, and that maps and masks are those of the model."""

import numpy as np
import pytest
from tiny_wan import tiny_wan_config

from accel.pipelines.enable import enable, session_of, summary
from accel.pipelines.host import Host
from accel.pipelines.look import look, looked_at
from accel.pipelines.model_settings import model_config
from accel.schedule import Schedule


@pytest.mark.parametrize(
    ("schedule", "at", "making"),
    [
        (Schedule(dense_start=0.2), 6, {2}),
        (Schedule(dense_start=0.2, refresh=(0.4, 0.9)), 6, {2, 4}),
        (Schedule(dense_start=0.0, dense_end=0.2, bands=(0.3,)), 4, {0, 3}),
        (Schedule(dense_start=1.0), None, set()),
    ],
)
def test_the_middle_sparse_step_and_the_steps_that_make_masks(schedule, at, making):
    assert looked_at(schedule, 10) == (at, making)


def test_maps_hold_all_attention_and_masks_are_those_of_the_run(tiny_wan_path, tmp_path):
    host = Host(model_config(tiny_wan_config(tiny_wan_path)))
    enable(host.pipe, "sparsed")
    session = session_of(host.pipe.transformer)
    seen = look(host, [session.plan], "a seven", 0, tmp_path / "maps.npz")
    assert seen["step"] == 2
    assert [(m["site"], m["head"]) for m in seen["maps"]] == [
        (f"blocks.{layer}.attn1", head) for layer in (0, 1) for head in (0, 1)
    ]
    with np.load(tmp_path / "maps.npz") as file:
        mass, keep = file["mass-0"], file["keep-0"]
    cell, tokens = seen["maps"][0]["cell"], seen["maps"][0]["tokens"]
    assert tokens == 5 * 8 * 12
    assert mass.sum() * cell[0] * cell[1] == pytest.approx(tokens, rel=1e-4)
    # the plan is at work again, and its keep is that of the masks
    host.generate("a seven", 0)
    sparse = [r for r in summary(host.pipe).rows if r.phase == "band 0"]
    assert sparse[0].keep == pytest.approx(keep.mean())
