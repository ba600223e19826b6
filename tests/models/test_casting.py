"""With weights in other precisions."""

import copy

import pytest
import torch
from cases import COGVIDEOX, FLUX, HUNYUAN, WAN
from features import enabled_with, forward, over

import accel
from accel.choice import DENSE

ROUGH = torch.float8_e4m3fn


def call(model, case):
    with accel.step(0, 10):
        return forward(model, case.inputs(samples=(0, 1)))


def check(case, change):
    """`change` casts a model in place; before enabling and after is the same."""
    plain = case.model()
    change(plain)
    dense = call(plain, case)
    after = case.model()
    change(after)
    before = enabled_with(case.model())
    change(before)
    enabled_with(after)
    sparse = call(after, case)
    assert sparse.isfinite().all()
    assert not torch.allclose(sparse, dense, atol=1e-3)
    assert torch.equal(call(before, case), sparse)
    for model in (before, after):
        enabled_with(model, DENSE)
        assert torch.equal(call(model, case), dense)
        accel.disable(model)
        assert torch.equal(call(model, case), dense)


@pytest.mark.feature("layerwise casting")
@over(few=(WAN, FLUX))
def test_layerwise_casting(case):
    check(
        case,
        lambda model: model.enable_layerwise_casting(
            storage_dtype=ROUGH, compute_dtype=torch.float32
        ),
    )


@pytest.mark.feature("bfloat16")
@over(few=(HUNYUAN, COGVIDEOX))
def test_half_precision(case):
    plain = case.model().to(torch.bfloat16)

    def run(model):
        arguments = {n: lowered(v) for n, v in case.inputs(samples=(0, 1)).items()}
        with accel.step(0, 10):
            return forward(model, arguments)

    try:
        dense = run(plain)
    except RuntimeError:
        pytest.skip("the model itself mixes its precisions")
    model = enabled_with(copy.deepcopy(plain), DENSE)
    assert torch.equal(run(model), dense)
    enabled_with(model)
    out = run(model)
    assert out.dtype == dense.dtype
    assert out.isfinite().all()
    # as near to the float32 plan as dense attention is to float32's, within what rounding does
    exact = call(enabled_with(case.model()), case), call(case.model(), case)
    error = [(a.float() - b).abs().mean() for a, b in zip((out, dense), exact, strict=True)]
    assert error[0] < 2 * error[1] + 1e-3


def lowered(value):
    if isinstance(value, torch.Tensor):
        return value.bfloat16() if value.is_floating_point() else value
    if isinstance(value, list | tuple):
        return type(value)(lowered(item) for item in value)
    return value


@pytest.mark.filterwarnings("ignore")  # torchao's, of other releases of torch
@pytest.mark.feature("torchao int8 weights")
@over(few=(WAN, FLUX))
def test_torchao(case):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    config = quantization.Int8WeightOnlyConfig()
    check(case, lambda model: quantization.quantize_(model, config))


@pytest.mark.gpu
@pytest.mark.feature("layerwise casting on a GPU")
@over(few=(WAN, FLUX))
def test_layerwise_casting_on_a_gpu(case):
    model = case.model().to("cuda")
    model.enable_layerwise_casting(storage_dtype=ROUGH, compute_dtype=torch.bfloat16)
    enabled_with(model)
    arguments = {
        name: value.to("cuda", torch.bfloat16 if value.is_floating_point() else value.dtype)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in case.inputs(samples=(0, 1)).items()
    }
    with accel.step(0, 10):
        assert forward(model, arguments).isfinite().all()
