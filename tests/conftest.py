"""What all tests share: checked shapes, one thread, no network, a reason where there is no GPU."""

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jaxtyping
import pytest
import torch
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

if sys.version_info >= (3, 11):
    # what jaxtyping there is for 3.10 wraps Triton's functions too, in spite of @no_type_check
    install_import_hook("accel", "beartype.beartype")

# how long an example takes says nothing on a shared machine
settings.register_profile("accel", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("accel")

if not torch.cuda.is_available():
    # Triton kernels run in the interpreter; this must stand before anything imports triton
    os.environ.setdefault("TRITON_INTERPRET", "1")
if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def unjudged(monkeypatch):
    """No tiny model's attention is turned off for being slow, which no test could foresee."""
    monkeypatch.setattr("accel.guard.LEAST_S", 5e-3)


@pytest.fixture
def unchecked(monkeypatch):
    """As users have it: no types are checked but by accel itself."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="session")
def tiny_wan_path(tmp_path_factory):
    """The directory of a tiny random WanPipeline."""
    from tiny_wan import build_tiny_wan

    return build_tiny_wan(tmp_path_factory.mktemp("models") / "tiny-wan")


@pytest.fixture(scope="session")
def tiny_flux_path(tmp_path_factory):
    """The directory of a tiny random FluxPipeline."""
    from tiny_flux import build_tiny_flux

    return build_tiny_flux(tmp_path_factory.mktemp("models") / "tiny-flux")


@pytest.fixture
def pipe(tiny_wan_path):
    """A tiny random WanPipeline of its own."""
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(tiny_wan_path)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def tiny_llada_path(tmp_path_factory):
    """The directory of a tiny random MaskedDiffusionPipeline, with tasks."""
    from tiny_llada import build_tiny_llada

    return build_tiny_llada(tmp_path_factory.mktemp("models") / "tiny-llada")
