"""What the tests of features share: which models they run over, and whole loops of calls."""

from contextlib import nullcontext

import pytest
import torch
from cases import CASES, COGVIDEOX, FLUX, HUNYUAN, WAN
from test_contract import plan_of

import accel

# separate and batched guidance, video and image, text first and last, padded or not
FEW = (WAN, HUNYUAN, COGVIDEOX, FLUX)


def over(cases=CASES, few=FEW):
    """Parametrise a test over models; those that are not among the `few` are slow."""
    return pytest.mark.parametrize(
        "case",
        [
            pytest.param(case, id=str(case), marks=() if case in few else pytest.mark.slow)
            for case in cases
        ],
    )


def needs(model, attribute, what):
    """Skip where the class of a model has no `attribute`."""
    if getattr(model, attribute, None) is None:
        pytest.skip(f"the class has no {what}")


@torch.no_grad()
def forward(model, arguments):
    """The output as one tensor; Z-Image gives a list."""
    out = model(**arguments, return_dict=False)[0]
    return out if isinstance(out, torch.Tensor) else torch.stack(list(out))


def loop(model, case, steps=6, at=None):
    """The outputs of a run of ever new latents, stacked; at: is told each step before its call."""
    outs = []
    for step in range(steps):
        if at is not None:
            at(step)
        where = {"step_index": step, "num_inference_steps": steps, "sigma": 1 - step / steps}
        cached = hasattr(model, "cache_context")
        context = model.cache_context("cond", **where) if cached else nullcontext()
        with context, accel.step(step, steps):
            outs.append(forward(model, case.inputs(samples=(0, 1), seed=step)))
    return torch.stack(outs)


def enabled_with(model, *choices, **settings):
    """The model, enabled with the contract's plan, or with one choice for all heads."""
    plan = plan_of(model, *choices, **settings)
    return accel.enable(model, plan, strict=True, guard=False)
