"""With attention backends chosen by the user."""

import importlib.util
from unittest import mock

import pytest
import torch
from cases import FLUX, HUNYUAN, WAN
from diffusers import attention_backend
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from features import enabled_with, forward, over

import accel
from accel.choice import DENSE
from accel.schedule import Schedule

HALF = Schedule(dense_start=0.5)
# on a CPU, and where they are compiled for one
HERE = ("native", "_native_math")
THERE = ("xformers", "flash", "_flash_3", "_native_cudnn", "_native_flash", "_native_efficient")


def call(model, case, step=0, device="cpu", dtype=torch.float32):
    arguments = {
        name: value.to(device, dtype if value.is_floating_point() else value.dtype)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in case.inputs(samples=(0, 1)).items()
    }
    with accel.step(step, 10):
        return forward(model, arguments)


def dispatches(model):
    if not any(hasattr(p, "_attention_backend") for p in processors(model)):
        pytest.skip("its processors call SDPA, past diffusers' choice of backends")
    return model


def processors(model):
    return [m.processor for m in model.modules() if getattr(m, "processor", None) is not None]


@pytest.fixture(autouse=True)
def _as_before():
    """Diffusers sets the backend of the whole process along with the model's."""
    before = _AttentionBackendRegistry.get_active_backend()[0]
    yield
    _AttentionBackendRegistry.set_active_backend(before)


def spied(backend):
    """A backend that counts its calls."""
    registry = _AttentionBackendRegistry._backends
    (name,) = (key for key in registry if getattr(key, "value", key) == backend)
    return mock.patch.dict(registry, {name: mock.Mock(wraps=registry[name])}), name


@pytest.mark.feature("set_attention_backend")
@pytest.mark.parametrize("backend", HERE)
@over(few=(WAN, FLUX))
def test_dense_steps_go_to_the_models_backend(case, backend):
    plain = dispatches(case.model())
    plain.set_attention_backend(backend)
    model = case.model()
    model.set_attention_backend(backend)
    enabled_with(model, schedule=HALF)
    patched, name = spied(backend)
    with patched:
        dense = call(plain, case)
        times = _AttentionBackendRegistry._backends[name].call_count
        assert times
        assert torch.equal(call(model, case), dense)
        assert _AttentionBackendRegistry._backends[name].call_count == 2 * times
        call(model, case, 5)
        left = _AttentionBackendRegistry._backends[name].call_count - 2 * times
    # in sparse steps the sites go elsewhere; cross-attention does not
    assert times - left == len(case.sites)
    enabled_with(model, DENSE)
    model.reset_attention_backend()
    assert torch.equal(call(model, case), call(case.model(), case))


@pytest.mark.feature("attention_backend()")
@over(few=(HUNYUAN,))
def test_dense_steps_go_to_the_backend_of_the_block(case):
    model = enabled_with(dispatches(case.model()), schedule=HALF)
    patched, name = spied("_native_math")
    with patched, attention_backend("_native_math"):
        call(case.model(), case)
        times = _AttentionBackendRegistry._backends[name].call_count
        call(model, case)
        assert times
        assert _AttentionBackendRegistry._backends[name].call_count == 2 * times


@pytest.mark.gpu
@pytest.mark.feature("backends of a GPU")
@pytest.mark.parametrize("backend", THERE)
@over(few=(WAN, FLUX))
def test_backends_of_a_gpu(case, backend):
    package = {"xformers": "xformers", "flash": "flash_attn", "_flash_3": "flash_attn_interface"}
    if backend in package and importlib.util.find_spec(package[backend]) is None:
        pytest.skip(f"{package[backend]} is not installed")
    plain = dispatches(case.model()).to("cuda", torch.bfloat16)
    try:
        plain.set_attention_backend(backend)
        dense = call(plain, case, 0, "cuda", torch.bfloat16)
    except (RuntimeError, ValueError):
        pytest.skip(f"{backend} does not take this model's calls")
    model = case.model().to("cuda", torch.bfloat16)
    model.set_attention_backend(backend)
    enabled_with(model, schedule=HALF)
    assert torch.allclose(call(model, case, 0, "cuda", torch.bfloat16), dense, atol=1e-2)
    assert call(model, case, 5, "cuda", torch.bfloat16).isfinite().all()
