"""What is relied upon of transformers' attention interface, and what accel registers with it."""

import inspect
import sys

import pytest
import torch
from tiny_text import euro_bert, qwen3
from transformers import AttentionInterface, AttentionMaskInterface

import accel
from accel.choice import DENSE, Choice
from accel.how import How
from accel.intercept import Taken
from accel.pattern import Window
from accel.pipelines.adapters import geometry_of
from accel.plan import Plan
from accel.schedule import Schedule

TOKENS = torch.arange(3, 43).reshape(2, 20)
REAL = (torch.arange(20) >= torch.tensor([[0], [7]])).long()


def enable(model, choice=DENSE):
    plan = Plan.uniform(
        "p", geometry_of(model), choice, block=(16, 16), schedule=Schedule(dense_start=0.0)
    )
    return accel.enable(model, plan, guard=False)


@pytest.fixture
def met(monkeypatch):
    """Shapes of q and k, and the settings, of every call that reaches a site."""
    calls, attend = [], Taken.attend

    def spy(taken, q, k, v, how, *rest):
        calls.append((tuple(q.shape), tuple(k.shape), how))
        return attend(taken, q, k, v, how, *rest)

    monkeypatch.setattr(Taken, "attend", spy)
    return calls


@torch.no_grad()
def call(model, **settings):
    with accel.step(0, 10):
        return model(TOKENS, **settings).logits


def test_functions_and_masks_are_found_by_name():
    assert "sdpa" in AttentionInterface()
    assert "sdpa" in AttentionMaskInterface()
    assert "eager" not in AttentionInterface()
    for make in (euro_bert, qwen3):
        module = make().model.layers[0].self_attn
        assert hasattr(sys.modules[type(module).__module__], "eager_attention_forward")


def test_names_are_registered_by_enabling():
    enable(euro_bert())
    assert "accel_sdpa" in AttentionInterface()
    assert "accel_sdpa" in AttentionMaskInterface()
    # a name without a mask function of its own would have its padding dropped
    own = inspect.signature(AttentionMaskInterface()["sdpa"]).parameters
    assert "mask_function" in own


@pytest.mark.parametrize("make", [euro_bert, qwen3])
def test_keys_are_not_expanded(make, met):
    model = enable(make())
    met.clear()
    call(model)
    dim = model.model.layers[0].self_attn.head_dim
    assert [(q, k) for q, k, _ in met] == 3 * [((2, 6, 20, dim), (2, 2, 20, dim))]
    hows = {how[1:] for _, _, how in met}
    assert hows == {How(None, 0.0, False, dim**-0.5, True)[1:]}
    assert all(how.mask is None for _, _, how in met)


@pytest.mark.parametrize("make", [euro_bert, qwen3])
@pytest.mark.parametrize("own", ["sdpa", "eager"])
def test_padding_comes_as_one_row(make, own, met):
    model = make()
    model.set_attn_implementation(own)
    enable(model)
    met.clear()
    call(model, attention_mask=REAL)
    for _, k, how in met:
        assert how.mask.shape == (2, 1, 1, 20)
        assert torch.equal(how.valid(torch.empty(k), False), REAL.bool())


def test_a_causal_mask_stays_whole(met):
    """It is not honoured by a sparse kernel: such calls are dense, and said to be."""
    model = qwen3(is_causal=True)
    plain = call(model, attention_mask=REAL)
    enable(model, Choice(Window(w=0.2)))
    met.clear()
    assert torch.equal(call(model, attention_mask=REAL), plain)
    assert {how.mask.shape for _, _, how in met} == {(2, 1, 20, 20)}
    assert "no mask of padding keys" in str(accel.summary(model).notices)
    # without padding there is no mask, and the call says that it is causal
    with torch.no_grad():
        plain = qwen3(is_causal=True)(TOKENS).logits
    met.clear()
    assert torch.equal(call(model), plain)
    assert all(how.causal and how.mask is None for _, _, how in met)


def test_what_a_kernel_cannot_do_is_the_models_own(met):
    """Capped logits are what the attention below makes of them: torch's refuses them."""
    model = enable(euro_bert(), Choice(Window(w=0.2)))
    met.clear()
    with pytest.raises(ValueError, match="does not support `softcap`"):
        call(model, softcap=30.0)
    assert not met


def test_the_base_of_a_copy_is_the_first_one():
    """A configuration that already has accel's name, as that of an enabled model's copy has."""
    model = euro_bert()
    model.config._attn_implementation = "accel_sdpa"
    enable(model)
    accel.disable(model)
    assert model.config._attn_implementation == "sdpa"
