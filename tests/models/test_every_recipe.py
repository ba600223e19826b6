"""Recipes on every kind of model."""

import pytest
import torch
from cases import CASES
from test_contract import BLOCK, run

import accel
from accel.pipelines.adapters import geometry_of
from accel.pipelines.enable import session_of
from accel.recipes import RECIPES

# those that are calibrated need a pipeline, and make plans of the patterns that the others have
UNCALIBRATED = [name for name, made in RECIPES.items() if made.demand is None and made.frames]
FEW = ("Flux Kontext", "HunyuanVideo", "Mochi", "SD3.5", "Lumina2", "Latte")
STEPS = 4


@pytest.mark.feature("recipes")
@pytest.mark.parametrize(
    "case",
    [c if str(c) in FEW else pytest.param(c, marks=pytest.mark.slow) for c in CASES],
    ids=str,
)
def test_every_recipe_runs_sparse_and_says_nothing(case):
    """In a run with dense steps first: no fall-back, no NaN, text and references kept."""
    plain, left_out = run(case.model(), case.inputs()), []
    for name in UNCALIBRATED:
        model = case.model()
        plan = accel.recipe(name, geometry_of(model), block=BLOCK)
        accel.enable(model, plan, guard=False, strict=True, check=False)
        outs = [run(model, case.inputs(), step, STEPS) for step in range(STEPS)]
        session = session_of(model)
        assert not session.notices, (name, session.notices)
        assert all(torch.isfinite(out).all() for out in outs), name
        if plan.wants_sparse:
            sparse = [r for (_, label), r in session.records.items() if label != "dense"]
            assert sparse, name
            left_out += [name] if any(r.keep < r.calls for r in sparse) else []
        else:
            assert torch.allclose(outs[-1], plain, atol=1e-2), name
        for key, found in session.run.masks.items():
            keep = found.mask.to_dense()
            for segment in key.layout.segments:
                if segment.kind in ("text", "reference"):
                    first = segment.start // found.mask.block[1]
                    heads = [h for h, c in enumerate(key.choices) if c.select.kind not in ("skip",)]
                    end = -(-key.layout.valid_length // found.mask.block[0])
                    assert keep[:, heads, :end, first].all(), (name, key.layout)
    # on so few tokens some methods keep everything
    assert len(left_out) > len(UNCALIBRATED) / 2, left_out
