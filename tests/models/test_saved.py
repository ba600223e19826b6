"""Saved and copied while enabled."""

import copy
import pickle

import pytest
import torch
from cases import FLUX, HUNYUAN, SD3, WAN
from features import enabled_with, forward, over

import accel


def call(model, case):
    with accel.step(0, 10):
        return forward(model, case.inputs(samples=(0, 1)))


def check(case, twin_of):
    """`twin_of` an enabled model is the plain model, which can be enabled by itself."""
    dense = call(case.model(), case)
    model = enabled_with(case.model())
    sparse = call(model, case)
    twin = twin_of(model)
    assert type(twin) is type(model)
    assert torch.equal(call(twin, case), dense)
    assert torch.equal(call(enabled_with(twin), case), sparse)
    accel.disable(twin)
    assert torch.equal(call(twin, case), dense)
    assert torch.equal(call(model, case), sparse), "the original is still enabled"


@pytest.mark.feature("deepcopy and pickle of one that ran")
@over(few=(SD3,))
def test_copies(case):
    check(case, copy.deepcopy)
    check(case, lambda model: pickle.loads(pickle.dumps(model)))


@pytest.mark.feature("save_pretrained")
@over(few=(WAN, FLUX))
def test_save_pretrained(case, tmp_path):
    case.model().save_pretrained(tmp_path / "plain")

    def saved(model):
        model.save_pretrained(tmp_path / "enabled")
        return type(model).from_pretrained(tmp_path / "enabled").eval()

    check(case, saved)
    for path in (tmp_path / "plain").iterdir():
        assert (tmp_path / "enabled" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.feature("torch.save")
@over(few=(HUNYUAN,))
def test_torch_save(case, tmp_path):
    def saved(model):
        torch.save(model, tmp_path / "model.pt")
        return torch.load(tmp_path / "model.pt", weights_only=False)

    check(case, saved)
    model = enabled_with(case.model())
    assert list(model.state_dict()) == list(case.model().state_dict())
    fresh = case.model()
    fresh.load_state_dict(model.state_dict())
