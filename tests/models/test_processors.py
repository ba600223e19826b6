"""With other attention processors after enabling."""

import logging

import pytest
import torch
from cases import COGVIDEOX, FLUX, FLUX2, HUNYUAN, SD3, WAN
from diffusers import LayerSkipConfig, apply_layer_skip
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from features import enabled_with, forward, needs, over
from test_contract import plan_of
from tiny_pipelines import flux, generate

import accel
from accel.choice import DENSE
from accel.pipelines.enable import session_of

TAKEN_AGAIN = "attention was replaced after accel.enable; taking it again"


def call(model, case, step=0, **more):
    with accel.step(step, 10):
        return forward(model, {**case.inputs(), **more})


def classes(model):
    """The class of every processor, by its module's name."""
    modules = dict(model.named_modules()).items()
    return {n: type(m.processor) for n, m in modules if getattr(m, "processor", None) is not None}


@pytest.mark.feature("set_attn_processor")
@over()
def test_processors_that_were_replaced_are_taken_again(case, caplog):
    model = case.model()
    needs(model, "set_attn_processor", "set_attn_processor")
    before = classes(model)
    expected = call(enabled_with(case.model()), case)
    enabled_with(model)
    assert {n: p.__class__ for n, p in model.attn_processors.items()} == {
        f"{name}.processor": cls for name, cls in before.items()
    }, "which is what they are made anew by"
    for made_anew in (
        {name: type(p)() for name, p in model.attn_processors.items()},
        {name: p.__class__() for name, p in model.attn_processors.items()},
    ):
        model.set_attn_processor(made_anew)
        with caplog.at_level(logging.WARNING, logger="accel"):
            for step in range(2):
                assert torch.equal(call(model, case, step), expected)
    assert [r.message for r in caplog.records].count(TAKEN_AGAIN) == 1
    accel.disable(model)
    assert classes(model) == before
    assert torch.equal(call(model, case), call(case.model(), case))


@pytest.mark.feature("fuse_qkv_projections")
@over(few=(HUNYUAN, COGVIDEOX, SD3))
def test_projections_that_are_fused(case):
    plain = case.model()
    needs(plain, "fuse_qkv_projections", "fuse_qkv_projections")
    dense = call(plain, case)
    try:
        plain.fuse_qkv_projections()
        fused = call(plain, case)
    except (RuntimeError, AttributeError):
        pytest.skip("fuse_qkv_projections breaks the model itself")
    model = enabled_with(case.model(), DENSE)
    model.fuse_qkv_projections()
    assert torch.equal(call(model, case), fused)
    enabled_with(model)
    sparse = call(model, case)
    assert torch.equal(sparse, call(enabled_with(plain), case)), "fused before enabling"
    assert not torch.allclose(sparse, fused, atol=1e-3)
    model.unfuse_qkv_projections()
    assert torch.allclose(call(model, case), sparse, atol=1e-4)
    accel.disable(model)
    assert torch.equal(call(model, case), dense)


def flux_adapter(model):
    """What loading an IP-Adapter does to Flux: only its double blocks get other processors."""
    torch.manual_seed(1)
    config = model.config
    inner = config.num_attention_heads * config.attention_head_dim
    model.set_attn_processor(
        {
            name: FluxIPAdapterAttnProcessor(inner, config.joint_attention_dim, (4,))
            if name.startswith("transformer_blocks")
            else processor.__class__()
            for name, processor in model.attn_processors.items()
        }
    )
    image = torch.randn(3, 4, config.joint_attention_dim)
    return {"joint_attention_kwargs": {"ip_hidden_states": [image]}}


def sd3_adapter(model):
    torch.manual_seed(1)
    config = model.config
    inner = config.num_attention_heads * config.attention_head_dim
    model.set_attn_processor(
        {
            name: SD3IPAdapterJointAttnProcessor2_0(
                hidden_size=inner,
                ip_hidden_states_dim=inner,
                head_dim=config.attention_head_dim,
                timesteps_emb_dim=32,
            )
            for name in model.attn_processors
        }
    )
    prompt = {"ip_hidden_states": torch.randn(3, 4, inner), "temb": torch.randn(3, 32)}
    return {"joint_attention_kwargs": prompt}


ADAPTERS = {"Flux": flux_adapter, "Flux Kontext": flux_adapter, "SD3": sd3_adapter}
ADAPTERS["SD3.5"] = sd3_adapter


@pytest.mark.feature("IP-Adapter")
@over(few=(FLUX, SD3))
def test_an_image_prompt_is_attended_beside_the_sites(case):
    plain = case.model()
    needs(plain, "_load_ip_adapter_weights", "IP-Adapters")
    if case is FLUX2:
        pytest.skip("there are no IP-Adapter processors for its class")
    load = ADAPTERS[case.name]
    without = call(plain, case)
    prompted = call(plain, case, **load(plain))
    assert not torch.allclose(prompted, without, atol=1e-3)
    model = enabled_with(case.model(), DENSE)
    prompt = load(model)
    assert torch.equal(call(model, case, **prompt), prompted)
    assert {row.calls for row in accel.summary(model).rows} == {1}
    enabled_with(model)
    sparse = call(model, case, **prompt)
    assert torch.equal(sparse, call(enabled_with(plain), case, **prompt)), "loaded before enabling"
    assert not torch.allclose(sparse, prompted, atol=1e-3)
    assert not session_of(model).notices
    accel.disable(model)
    assert torch.equal(call(model, case, **prompt), prompted)
    assert classes(model) == classes(accel.disable(plain))


@pytest.mark.feature("perturbed attention guidance")
@over(few=(WAN, FLUX))
def test_attention_that_a_guider_replaces_is_left_to_it(case):
    """Its scores are skipped in one layer: the values take their place."""
    skip = {"indices": [0], "skip_attention": False, "skip_ff": False}
    config = LayerSkipConfig(**skip, skip_attention_scores=True)
    plain = case.model()
    untouched = call(plain, case)
    try:
        apply_layer_skip(plain, config)
        skipped = call(plain, case)
    except (ValueError, AttributeError):
        pytest.skip("diffusers cannot skip the attention of its blocks")
    assert not torch.equal(skipped, untouched)
    model = enabled_with(case.model(), DENSE)
    apply_layer_skip(model, config)
    assert torch.equal(call(model, case), skipped)


@pytest.mark.feature("load_ip_adapter, unload_ip_adapter")
@pytest.mark.parametrize("case", [FLUX], ids=str)
def test_an_adapter_is_loaded_and_unloaded_in_a_pipeline(case):
    """By the loader's own code, between generations of an enabled pipeline."""
    torch.manual_seed(1)
    width, inner = 16, 72
    weights = {
        "image_proj": {
            "proj.weight": torch.randn(4 * width, 6),
            "proj.bias": torch.randn(4 * width),
            "norm.weight": torch.ones(width),
            "norm.bias": torch.zeros(width),
        },
        "ip_adapter": {
            f"0.to_{letter}_ip.{part}": torch.randn(*shape)
            for letter in "kv"
            for part, shape in {"weight": (inner, width), "bias": (inner,)}.items()
        },
    }
    image = {"ip_adapter_image_embeds": [torch.randn(1, 1, 6)]}
    image |= {f"negative_{name}": value for name, value in image.items()}

    def generations(pipe, call):
        before = generate(pipe, call, 4)
        pipe.transformer._load_ip_adapter_weights([weights], low_cpu_mem_usage=False)
        prompted = generate(pipe, {**call, **image}, 4)
        pipe.unload_ip_adapter()
        return before, prompted, generate(pipe, call, 4)

    dense = generations(*flux())
    assert not torch.equal(dense[0], dense[1])
    pipe, call = flux()
    for choices, same in (((DENSE,), True), ((), False)):
        accel.enable(pipe, plan_of(pipe.transformer, *choices), strict=True, guard=False)
        found = generations(pipe, call)
        assert [torch.equal(a, b) for a, b in zip(found, dense, strict=True)] == [same] * 3
        assert torch.equal(found[0], found[2])
    accel.disable(pipe)
    assert torch.equal(generate(pipe, call, 4), dense[0])
    assert classes(pipe.transformer) == classes(case.model())
