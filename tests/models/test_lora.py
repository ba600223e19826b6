"""With LoRA."""

import logging

import pytest
import torch
from cases import FLUX
from diffusers.loaders.peft import PeftAdapterMixin
from features import enabled_with, forward, over

import accel
from accel.choice import DENSE
from accel.pipelines.enable import session_of

LINEAR = r".*\.(to_q|to_k|to_v|to_out\.0|add_q_proj|qkv|to_qkv_mlp_proj)"


def adapter(name, seed):
    """Adds an adapter that does something: those that are fresh are zero."""
    peft = pytest.importorskip("peft", reason="peft is not installed")

    def add(model):
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=LINEAR)
        model.add_adapter(config, adapter_name=name)
        torch.manual_seed(seed)
        for key, weight in model.named_parameters():
            if f".lora_B.{name}." in key:
                torch.nn.init.normal_(weight, std=0.3)
        model.eval()

    return add


def call(model, case):
    with accel.step(0, 10):
        return forward(model, case.inputs(samples=(0, 1)))


def load(model):
    adapter("a", 1)(model)


def switch(model):
    load(model)
    adapter("b", 2)(model)
    model.set_adapters(["b"])


def both(model):
    switch(model)
    model.set_adapters(["a", "b"], [0.7, 0.4])


def off(model):
    load(model)
    model.disable_adapters()


def on_again(model):
    off(model)
    model.enable_adapters()


def fuse(model):
    load(model)
    model.fuse_lora()


def unfuse(model):
    fuse(model)
    model.unfuse_lora()


def delete(model):
    switch(model)
    model.set_adapters(["a"])
    model.delete_adapters("b")


def unload(model):
    load(model)
    model.unload_lora()


CHANGES = {
    "LoRA load": load,
    "LoRA switch adapters": switch,
    "LoRA several adapters": both,
    "LoRA off and on": on_again,
    "LoRA off": off,
    "LoRA fuse": fuse,
    "LoRA unfuse": unfuse,
    "LoRA delete": delete,
    "LoRA unload": unload,
}


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # a second adapter
@pytest.mark.parametrize(
    "change", [pytest.param(c, id=n, marks=pytest.mark.feature(n)) for n, c in CHANGES.items()]
)
@over(few=(FLUX,))
def test_adapters_change_under_a_plan(case, change, caplog):
    """What happens to an enabled model is what happened before enabling."""
    plain = case.model()
    if not isinstance(plain, PeftAdapterMixin):
        pytest.skip("the class takes no LoRA")
    without = call(plain, case)
    change(plain)
    dense = call(plain, case)
    model = enabled_with(case.model(), DENSE)
    with caplog.at_level(logging.WARNING, logger="accel"):
        change(model)
        assert torch.equal(call(model, case), dense)
        assert not caplog.records
    enabled_with(model)
    sparse = call(model, case)
    assert torch.equal(sparse, call(enabled_with(plain), case))
    assert not torch.allclose(sparse, dense, atol=1e-3)
    assert not session_of(model).notices
    accel.disable(model)
    assert torch.equal(call(model, case), dense)
    if change not in (off, unload, unfuse):
        assert not torch.allclose(dense, without, atol=1e-3)
