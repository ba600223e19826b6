"""Vision models of timm as accel finds them: nets of features, and classes that are refused."""

import gc
import weakref

import pytest
import timm
import torch
from windowed import copies_of, images, net_of, plan_of, prunable, pruned, session, windowed

import accel
from accel.errors import UnsupportedModelError
from accel.pipelines.adapters import denoisers_of, geometry_of
from accel.pipelines.segmenter import Segmenter
from accel.pipelines.window_blocks import kept_windows

SWINS = ["swin", "swinv2", "swinv2 cr"]
KINDS = ["list", "dict", "hook"]  # `list` is timm's own for Swin


@torch.no_grad()
def maps(net, x):
    """The maps of a net, channels first."""
    found = net(x)
    found = list(found.values()) if isinstance(found, dict) else found
    last = str(net.output_fmt).endswith("NHWC")
    return [one.permute(0, 3, 1, 2) if last else one for one in found]


def rows(target):
    return [(row.site, row.keep, row.kernels) for row in accel.summary(target).rows]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SWINS)
def test_a_plan_says_of_a_net_of_features_what_it_says_of_the_model(name, kind):
    x, plain, net = images(name), windowed(name), net_of(name, kind)
    before, names = maps(net, x), list(net.state_dict())
    plan = plan_of(plain, 0.5)
    assert geometry_of(net) == geometry_of(plain)
    accel.enable(plain, plan)
    with torch.no_grad():
        expected = plain.forward_intermediates(x, intermediates_only=True)
    assert accel.enable(net, plan) is net
    found = maps(net, x)
    assert list(net.state_dict()) == names
    assert all(map(torch.equal, found, expected))
    assert not torch.equal(found[0], before[0])
    assert rows(net) == rows(plain)
    accel.disable(net)
    assert all(map(torch.equal, maps(net, x), before))
    assert not any({"_accel", "forward"} & {*m.__dict__} for m in net.modules())


def test_a_net_of_some_stages_has_their_sites():
    net = net_of("swin", out_indices=(0, 1))
    plain = windowed("swin")
    sites = [site for site in prunable(plain) if "layers.2" not in site]
    assert [site.name for site in geometry_of(net).sites] == sites
    accel.enable(net, accel.recipe("sparsevit", geometry_of(net), uniform=0.5))
    pruned(plain, dict.fromkeys(sites, 0.5))
    x = images("swin")
    with torch.no_grad():
        expected = plain.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
    assert all(map(torch.equal, maps(net, x), expected))


def test_a_net_for_any_size_takes_any():
    plain, net = windowed("swin any size"), net_of("swin any size")
    accel.enable(net, plan_of(pruned(plain, 0.5), 0.5))
    for size in ((72, 52), (48, 96)):
        x = images("swin", size=size)
        with torch.no_grad():
            expected = plain.forward_intermediates(x, intermediates_only=True)
        assert all(map(torch.equal, maps(net, x), expected))
        assert rows(net) == rows(plain)


def test_a_segmenter_and_its_net_are_one():
    torch.manual_seed(4)
    net = net_of("swin")
    model = Segmenter(net, 5, 12).eval()
    x = images("swin")
    with torch.no_grad():
        dense = model(x)
        accel.enable(model, plan_of(net, 0.5))
        assert denoisers_of(model) == denoisers_of(net)
        once = model(x)
        accel.enable(net, plan_of(net, 0.25))
        other = model(x)
        assert not torch.equal(once, dense)
        assert not torch.equal(once, other)
        accel.disable(net)
        with accel.enabled(net, plan_of(net, 0.5)):
            assert torch.equal(model(x), once)
        assert torch.equal(model(x), dense)


def test_what_is_put_together_stays_the_same_while_somebody_holds_it():
    net = net_of("swin")
    core = denoisers_of(net)[0]
    accel.enable(net, plan_of(core, 0.5))
    assert denoisers_of(net) == [core]
    held = weakref.ref(core)
    del core
    assert denoisers_of(net) == [held()]
    maps(net, images("swin"))
    assert [*kept_windows(session(net))] == [*("layers.0", "layers.1", "layers.2")]
    gone = weakref.ref(net)
    del net
    gc.collect()
    assert (held(), gone()) == (None, None)


def test_copies_and_pickles_of_a_net_are_plain():
    x, net = images("swin"), net_of("swin")
    expected = maps(net, x)
    accel.enable(net, plan_of(net, 0.5))
    pruned_maps = maps(net, x)
    for other in copies_of(net):
        assert all(map(torch.equal, maps(other, x), expected))
        accel.enable(other, plan_of(other, 0.5))
        assert all(map(torch.equal, maps(other, x), pruned_maps))
    assert all(map(torch.equal, maps(net, x), pruned_maps))


@pytest.mark.parametrize("name", SWINS)
def test_a_net_that_checkpoints_its_stages_computes_the_same_windows_again(name):
    grads = []
    for again in (False, True):
        net = net_of(name)
        accel.enable(net, plan_of(net, 0.5))
        net.set_grad_checkpointing(again)
        sum(one.square().sum() for one in net(images(name))).backward()
        grads.append([p.grad for p in net.parameters()])
    assert all(a is b or torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny_vit_5m_224", "a TinyVit: convolutions mix its windows"),
        ("davit_tiny", "a DaVit: convolutions mix its windows"),
        ("efficientvit_m0", "a EfficientVitMsra: convolutions mix its windows"),
        ("maxvit_rmlp_pico_rw_256", "a MaxxVit: none of its blocks keeps to windows"),
        ("efficientformer_l1", "a EfficientFormer: none of its blocks keeps to windows"),
        ("efficientformerv2_s0", "a EfficientFormerV2: none of its blocks keeps to windows"),
        ("mvitv2_tiny", "a MultiScaleVit: it attends to pooled maps"),
        ("xcit_nano_12_p16_224", "a Xcit: it mixes channels by attention"),
        ("edgenext_xx_small", "a EdgeNeXt: it mixes channels by attention"),
        ("focalnet_tiny_srf", "a FocalNet: it has no attention"),
        ("gcvit_xxtiny", "a GlobalContextVit: accel knows nothing of how"),
        ("nest_tiny", "a Nest: accel knows nothing of how"),
        ("twins_svt_small", "a Twins: accel knows nothing of how"),
    ],
)
def test_other_windowed_classes_are_refused_with_the_reason(name, message):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(UnsupportedModelError, match=message):
        accel.enable(model, "sparsevit")


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_net_of_another_class_is_refused_with_the_remedy(wrapped):
    net = timm.create_model("test_convnext", features_only=True)
    with pytest.raises(UnsupportedModelError, match=r"only Swins .* feature_cls='getter'"):
        accel.enable(Segmenter(net, 3) if wrapped else net, "sparsevit")
