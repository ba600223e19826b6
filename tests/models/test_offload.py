"""With weights that are offloaded."""

import copy

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from cases import COGVIDEOX, HUNYUAN, SD3, WAN
from diffusers.hooks import apply_group_offloading
from features import enabled_with, forward, over
from test_contract import plan_of
from tiny_pipelines import cogvideox, generate, sd3

import accel
from accel.choice import DENSE
from accel.pipelines.devices import execution_device

CPU = torch.device("cpu")


def by_leaf(model, device):
    apply_group_offloading(model, onload_device=device, offload_type="leaf_level")


def by_block(model, device):
    apply_group_offloading(
        model, onload_device=device, offload_type="block_level", num_blocks_per_group=1
    )


def sequential(model, device):
    """What `enable_sequential_cpu_offload` does to a denoiser: its weights are on no device."""
    cpu_offload(model, execution_device=device)


def whole(model, device):
    """What `enable_model_cpu_offload` does to a denoiser."""
    cpu_offload_with_hook(model, device)


WAYS = {"group, leaves": by_leaf, "group, blocks": by_block, "sequential": sequential}
WAYS["model"] = whole
ways = pytest.mark.parametrize(
    "way",
    [pytest.param(way, id=name, marks=pytest.mark.feature(name)) for name, way in WAYS.items()],
)


def call(model, case, device=CPU):
    arguments = case.inputs(samples=(0, 1))
    arguments = {name: moved(value, device) for name, value in arguments.items()}
    with accel.step(0, 10):
        return forward(model, arguments).cpu()


def moved(value, device):
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, list | tuple):
        return type(value)(moved(item, device) for item in value)
    if isinstance(value, dict):
        return {name: moved(item, device) for name, item in value.items()}
    return value


@ways
@over(few=(WAN, HUNYUAN, SD3))
def test_before_and_after_enabling(case, way):
    plain = case.model()
    dense, sparse = call(plain, case), call(enabled_with(copy.deepcopy(plain)), case)
    before = case.model()
    enabled_with(before)
    way(before, CPU)
    after = case.model()
    way(after, CPU)
    enabled_with(after)
    for model in (before, after):
        assert execution_device(model) == CPU
        for _ in range(2):
            assert torch.equal(call(model, case), sparse)
        enabled_with(model, DENSE)
        assert torch.equal(call(model, case), dense)
        accel.disable(model)
        assert torch.equal(call(model, case), dense)


@pytest.mark.gpu
@ways
@over(few=(WAN, HUNYUAN, SD3))
def test_on_a_gpu(case, way):
    """The weights come to the device for their call; the plan's masks are made there."""
    device = torch.device("cuda")
    expected = call(enabled_with(case.model().to(device)), case, device)
    for first in (True, False):
        model = case.model()
        if first:
            enabled_with(model)
        way(model, device)
        if not first:
            enabled_with(model)
        assert execution_device(model).type == "cuda"
        assert torch.allclose(call(model, case, device), expected, atol=1e-5)
        assert {row.kernels for row in accel.summary(model).rows} == {("triton",)}


@pytest.mark.gpu
@pytest.mark.feature("offload of a pipeline")
@pytest.mark.parametrize(
    "way", ["enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload"]
)
@pytest.mark.parametrize("case", [SD3, COGVIDEOX], ids=str)
def test_a_pipeline_on_a_gpu(case, way):
    build, cuda = {SD3.name: sd3, COGVIDEOX.name: cogvideox}[case.name], torch.device("cuda")
    pipe, call = build()
    call = {name: moved(value, cuda) for name, value in call.items()}
    accel.enable(pipe.to(cuda), plan_of(pipe.transformer), strict=True, guard=False)
    expected = generate(pipe, call).cpu()
    other, _ = build()
    settings = {"onload_device": cuda} if way == "enable_group_offload" else {}
    getattr(other, way)(**settings)
    accel.enable(other, plan_of(other.transformer), strict=True, guard=False)
    for _ in range(2):
        assert torch.allclose(generate(other, call).cpu(), expected, atol=1e-3)


def test_hooks_are_asked_for_the_device():
    model, elsewhere = WAN.model(), torch.device("meta")
    assert execution_device(model) == CPU
    sequential(model, elsewhere)
    assert execution_device(model) == elsewhere
    grouped = WAN.model()
    by_block(grouped, CPU)
    assert execution_device(grouped) == CPU
    for module in grouped.modules():
        for hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values():
            hook.config.onload_device = elsewhere
    assert execution_device(grouped) == elsewhere
