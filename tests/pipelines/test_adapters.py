import re
from types import SimpleNamespace

import pytest
import torch
from tiny_denoiser import GRID, HEAD_DIM, HEADS, SITES, inputs, tiny_denoiser

from accel.errors import UnsupportedModelError
from accel.geometry import Site
from accel.layout import Layout
from accel.pipelines.adapters import (
    Adapter,
    adapter_of,
    denoisers_of,
    geometry_of,
    register,
    self_check_inputs,
    sites_of,
)


@pytest.fixture(scope="module")
def model():
    return tiny_denoiser()


def test_the_sites_of_wan_are_its_self_attentions(model):
    assert sites_of(model) == {
        Site(f"blocks.{i}.attn1", HEADS, HEAD_DIM): block.attn1
        for i, block in enumerate(model.blocks)
    }


@pytest.mark.parametrize("grid", [GRID, (1, 4, 3), (5, 2, 9)], ids=str)
def test_the_layout_of_wan_is_what_its_attention_sees(model, grid):
    seen = []
    handle = model.blocks[0].attn1.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].shape[1])
    )
    arguments = inputs(grid=grid)
    model(**arguments)
    handle.remove()
    layout = adapter_of(model).layout(model, arguments)
    assert layout == Layout.of(grid)
    assert seen == [layout.length]


def test_a_patch_of_more_frames():
    model = tiny_denoiser(patch_size=(2, 1, 3))
    layout = adapter_of(model).layout(model, {"hidden_states": torch.zeros(1, 4, 6, 5, 12)})
    assert layout == Layout.of((3, 5, 4))


def test_the_projection_is_what_follows_the_heads(model):
    project = adapter_of(model).projection
    for site in sites_of(model):
        assert project(model, site.name).shape[1] == site.heads * site.head_dim


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "changes", [{}, {"image_dim": 16, "added_kv_proj_dim": 72}], ids=["t2v", "i2v"]
)
def test_the_probe_is_a_call_that_the_model_takes(changes, dtype):
    model = tiny_denoiser(**changes).to(dtype)
    arguments = self_check_inputs(model)
    assert arguments["hidden_states"].dtype == dtype
    assert arguments["timestep"].dtype == torch.int64
    assert model(**arguments).sample.dtype == dtype


def test_a_subclass_is_served_by_the_adapter_of_its_base(model):
    kind = type("TunedWan", (type(model),), {})
    assert adapter_of(kind.from_config(model.config)) is adapter_of(model)


def test_the_geometry_of_a_pipeline_is_that_of_its_first_denoiser(model):
    geometry = geometry_of(SimpleNamespace(transformer=model), Layout.of(GRID))
    assert geometry.model == "WanTransformer3DModel"
    assert tuple(s.name for s in geometry.sites) == SITES
    assert geometry.layout == Layout.of(GRID)
    assert geometry.site(SITES[1]) == geometry.sites[1]
    with pytest.raises(KeyError, match=r"blocks\.7"):
        geometry.site("blocks.7.attn1")


def test_denoisers(model):
    other = tiny_denoiser(num_layers=1)
    assert denoisers_of(model) == [model]
    assert denoisers_of(torch.compile(model)) == [model]
    assert denoisers_of(SimpleNamespace(transformer=model, transformer_2=other)) == [model, other]
    assert denoisers_of(SimpleNamespace(transformer=None, transformer_2=other)) == [other]
    assert denoisers_of(SimpleNamespace(transformer=model, transformer_2=None)) == [model]


def test_an_unknown_class_is_named_with_the_nearest(model):
    near = type("WanTransformer2DModel", (torch.nn.Module,), {})()
    with pytest.raises(UnsupportedModelError, match=re.escape("did you mean 'WanTransformer3DMod")):
        adapter_of(near)


def test_a_class_has_one_adapter(model):
    one = adapter_of(model)
    fields = {name: getattr(one, name) for name in Adapter.__dataclass_fields__}
    with pytest.raises(ValueError, match="'WanTransformer3DModel' has an adapter already"):
        register(Adapter(**fields))
