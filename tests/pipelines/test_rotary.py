"""Positions of their own for models that count them."""

import pytest
import torch
from tiny_text import _turned as turned
from tiny_text import dream, llada

from accel.pipelines.rotary import can_place, placed


def rotary_modules(model):
    return [m for name, m in model.named_modules() if name.endswith("rotary_emb")]


def test_tokens_are_turned_by_their_positions():
    model = llada()
    module = rotary_modules(model)[1]
    q, k = torch.randn(2, 6, 5, 8), torch.randn(2, 2, 5, 8)
    positions = torch.tensor([[3, 4, 9, 30, 31], [0, 0, 1, 2, 2]])
    with placed(model, positions):
        out = module(q, k)
    # a position that is there twice has one of its tokens
    row = slice(0, 1)
    assert torch.allclose(out[0][row], turned(q[row], positions[row]), atol=1e-6)
    assert torch.allclose(out[1][row], turned(k[row], positions[row]), atol=1e-6)


@torch.no_grad()
def test_counted_positions_are_the_model():
    model = llada()
    tokens = torch.randint(0, 90, (2, 11))
    plain = model(tokens).logits
    with placed(model, torch.arange(11).expand(2, -1)):
        assert torch.equal(model(tokens).logits, plain)
    with placed(model, 2 * torch.arange(11).expand(2, -1)):
        assert not torch.allclose(model(tokens).logits, plain, atol=1e-3)
    with placed(model, None):
        assert torch.equal(model(tokens).logits, plain)


def test_which_models_count():
    assert can_place(llada())
    assert not can_place(dream())


@pytest.mark.parametrize("error", [None, KeyError])
def test_what_was_there_comes_back(error):
    """A forward of the instance too, as offloading puts there."""
    model = llada()
    modules = rotary_modules(model)
    own = modules[0].forward
    modules[0].forward = own
    try:
        with placed(model, torch.arange(4)[None]):
            assert all("forward" in m.__dict__ for m in modules)
            if error is not None:
                raise error
    except KeyError:
        assert error is KeyError
    assert modules[0].__dict__["forward"] == own
    assert "forward" not in modules[1].__dict__
