"""In training."""

from functools import partial

import pytest
import torch
from features import over
from test_contract import plan_of
from torch.utils.checkpoint import checkpoint

import accel
from accel.obstacles import GRADIENTS
from accel.pipelines.enable import session_of


def gradients(model, case, step=None):
    """By every weight, and by the latents where they are one tensor."""
    model.zero_grad()
    arguments = case.inputs(samples=(0, 1))
    latents = next(iter(arguments.values()))
    if isinstance(latents, torch.Tensor):
        latents.requires_grad_()
    torch.manual_seed(0)
    if step is None:
        out = model(**arguments, return_dict=False)[0]
    else:
        with accel.step(step, 10):
            out = model(**arguments, return_dict=False)[0]
    out = out if isinstance(out, torch.Tensor) else torch.stack(list(out))
    out.square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found["latents"] = getattr(latents, "grad", None)
    return {name: grad for name, grad in found.items() if grad is not None}


def training(case, checkpointing):
    plain, model = case.model().train(), case.model().train()
    accel.enable(model, plan_of(model), guard=False)
    for one in (plain, model):
        if checkpointing is not None:
            one.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=checkpointing))
    return plain, model


@pytest.mark.parametrize(
    "checkpointing",
    [
        pytest.param(None, id="plain", marks=pytest.mark.feature("training")),
        pytest.param(False, id="kept", marks=pytest.mark.feature("gradient checkpointing")),
        pytest.param(True, id="reentrant", marks=pytest.mark.feature("gradient checkpointing")),
    ],
)
@over()
def test_gradients_are_those_of_the_untouched_model(case, checkpointing):
    """Dense, and it is said."""
    plain, model = training(case, checkpointing)
    try:
        expected = gradients(plain, case)
    except RuntimeError:
        assert checkpointing
        pytest.skip("the model itself cannot be checkpointed this way")
    found = gradients(model, case, 0)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert model.training
    assert list(session_of(model).notices) == [GRADIENTS]
    with torch.no_grad(), accel.step(0, 10):
        model.eval()(**case.inputs(samples=(0, 1)))
    assert not session_of(model).notices, "and without gradients the plan is at work again"


# the compiler looks at the latents
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.feature("training, compiled")
@over(few=())
def test_a_compiled_model_gives_gradients(case):
    if "compiled whole" in case.notes:
        pytest.skip(case.notes["compiled whole"])
    plain, model = training(case, None)
    expected = gradients(plain, case)
    torch.compiler.reset()
    model.compile(backend="aot_eager")
    for name, grad in gradients(model, case, 0).items():
        # of what is not used a compiled model gives zeros
        assert torch.allclose(grad, expected.pop(name, torch.zeros(())), rtol=1e-3, atol=1e-3)
    assert not expected
    with torch.no_grad(), accel.step(0, 10):
        model.eval()(**case.inputs(samples=(0, 1)))
    assert {row.phase for row in accel.summary(model).rows} == {"band 0"}
    torch.compiler.reset()
