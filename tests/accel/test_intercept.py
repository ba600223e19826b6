"""Taking attention calls: what is relied upon in diffusers, and processors of other makes."""

import gc
import inspect
import types

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.transformers import transformer_wan
from torch import nn

from accel import intercept
from accel.choice import Choice
from accel.context import Where
from accel.errors import UnsupportedModelError
from accel.estimators import BlockMassTopK
from accel.geometry import Geometry, Site
from accel.how import How
from accel.intercept import DISPATCH, Interception
from accel.layout import Layout
from accel.plan import Plan
from accel.router import Session
from accel.schedule import Schedule

LAYOUT = Layout.of((3, 4, 5))
HEADS, DIM = 2, 8


class SdpaProcessor:
    """Reaches attention through F.scaled_dot_product_attention, as timm and older diffusers do."""

    def __call__(self, attn, x):
        q, k, v = (y.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for y in attn.qkv(x).chunk(3, -1))
        k, v = k[:, : attn.kv_heads], v[:, : attn.kv_heads]
        out = F.scaled_dot_product_attention(q, k, v, *attn.arguments, **attn.settings)
        return out.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    def __init__(self, processor=None, *arguments, kv_heads=HEADS, **settings):
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(HEADS * DIM, 3 * HEADS * DIM)
        self.processor = processor or SdpaProcessor()
        self.kv_heads, self.arguments, self.settings = kv_heads, arguments, settings

    def forward(self, x):
        return self.processor(self, x)


class Block(nn.Module):
    def __init__(self, *modules):
        super().__init__()
        self.sites = nn.ModuleList(modules)

    @torch.no_grad()
    def forward(self, x):
        return [module(x) for module in self.sites]


X = torch.randn(1, LAYOUT.length, HEADS * DIM, generator=torch.Generator().manual_seed(3))


def take(*modules, keep=0.4):
    """An interception of modules under one plan, standing at a sparse step."""
    sites = {Site(str(i), HEADS, DIM): module for i, module in enumerate(modules)}
    geometry = Geometry("Block", tuple(sites))
    plan = Plan.uniform(
        "p",
        geometry,
        Choice(BlockMassTopK(keep=keep)),
        schedule=Schedule(dense_start=0.0),
        block=(16, 16),
    )
    session = Session(plan, geometry)
    session.begin(LAYOUT, Where(0, 1))
    return Interception(session, sites), session


class TestConventions:
    """What `accel.intercept` relies on in diffusers."""

    def test_the_processor_gets_the_module_first(self):
        assert list(inspect.signature(transformer_wan.WanAttnProcessor.__call__).parameters)[
            :2
        ] == [
            "self",
            "attn",
        ]

    def test_the_processor_finds_the_dispatcher_in_its_module(self):
        call = transformer_wan.WanAttnProcessor.__call__
        assert DISPATCH in call.__code__.co_names
        assert call.__globals__ is vars(transformer_wan)
        assert callable(call.__globals__[DISPATCH])

    def test_settings_of_the_dispatcher_are_in_the_known_order(self):
        names = list(inspect.signature(transformer_wan.dispatch_attention_fn).parameters)
        assert names[:8] == [
            "query",
            "key",
            "value",
            "attn_mask",
            "dropout_p",
            "is_causal",
            "scale",
            "enable_gqa",
        ]
        assert {"backend", "parallel_config"} <= set(names[8:])


class TestSdpa:
    def test_a_processor_that_calls_sdpa_is_taken(self):
        model = Block(Attention(), Attention())
        plain = model(X)
        interception, session = take(*model.sites)
        sparse = model(X)
        assert {r.calls for r in session.records.values()} == {1}
        assert len(session.records) == 2
        assert not torch.allclose(sparse[0], plain[0], atol=1e-3)
        interception.undo()
        assert all(torch.equal(a, b) for a, b in zip(model(X), plain, strict=True))
        assert type(model.sites[0].processor) is SdpaProcessor

    @pytest.mark.parametrize(
        ("attention", "why"),
        [
            pytest.param(
                lambda: Attention(None, torch.ones(1, 1, 60, 60).tril().bool()),
                "attention mask",
                id="positional mask",
            ),
            pytest.param(lambda: Attention(is_causal=True), "causal", id="causal"),
            pytest.param(
                lambda: Attention(None, None, 0.0, True), "causal", id="positional causal"
            ),
        ],
    )
    def test_what_the_kernels_cannot_do_is_left_to_sdpa(self, attention, why):
        model = Block(attention())
        plain = model(X)
        _, session = take(*model.sites)
        assert torch.equal(model(X)[0], plain[0])
        assert [why in reason for reason in session.notices] == [True]

    def test_the_usual_scale_is_no_obstacle(self):
        model = Block(Attention(scale=DIM**-0.5))
        _, session = take(*model.sites)
        model(X)
        assert not session.notices

    def test_another_scale_is_that_of_the_call(self):
        model = Block(Attention(scale=0.7))
        plain = model(X)
        _, session = take(*model.sites, keep=1.0)
        assert torch.allclose(model(X)[0], plain[0], atol=1e-5)
        assert not session.notices

    def test_fewer_key_heads(self):
        model = Block(Attention(kv_heads=1, enable_gqa=True))
        plain = model(X)
        _, session = take(*model.sites, keep=1.0)
        assert torch.allclose(model(X)[0], plain[0], atol=1e-5)
        assert not session.notices

    @pytest.mark.parametrize("settings", [{}, {"is_causal": True}, {"scale": 0.1}], ids=str)
    def test_the_compiled_call_does_the_same(self, settings):
        model = Block(Attention(**settings))
        _, session = take(*model.sites)
        eager = model(X)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(X)
        assert torch.allclose(compiled[0], eager[0], atol=1e-6)
        assert {r.calls for r in session.records.values()} == {2}
        torch.compiler.reset()

    def test_the_users_own_sdpa_stays_in_force(self, monkeypatch):
        model = Block(Attention(is_causal=True))
        interception, _ = take(*model.sites)
        assert interception.intact
        monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, *_, **__: q * 0)
        assert not model(X)[0].any()


@pytest.mark.parametrize("name", ["enter", "attend"])
def test_operations_keep_out_of_cuda_graphs(name):
    """A graph that is replayed would do what the step of its capture did."""
    assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.accel, name).default.tags


def test_sites_are_named_on_the_cpu_whatever_the_default_device():
    model = Block(Attention())
    with torch.device("meta"):
        take(*model.sites)
    assert model.sites[0].__dict__["_accel_site"].device.type == "cpu"


def test_settings_say_what_stands_in_the_way():
    free = How(None, 0.0, False, None, False)
    assert free.obstacle(None) is None
    assert free._replace(gqa=True).obstacle(None) is None
    assert "drops out" in free._replace(dropout=0.1).obstacle(None)
    assert "mask" in free._replace(mask=torch.ones(1)).obstacle(None)


def test_a_shared_processor_tells_sites_from_other_attention():
    shared = SdpaProcessor()
    model = Block(Attention(shared), Attention(shared))
    plain = model(X)
    interception, session = take(model.sites[0])
    outs = model(X)
    assert not torch.allclose(outs[0], plain[0], atol=1e-3)
    assert torch.equal(outs[1], plain[1])
    assert {site for site, _ in session.records} == {"0"}
    interception.undo()
    assert type(shared) is SdpaProcessor


def test_layers_share_a_generated_class_and_models_do_not():
    one, other = Block(Attention(), Attention()), Block(Attention())
    take(*one.sites)
    take(*other.sites)
    kinds = [type(m.processor) for m in (*one.sites, *other.sites)]
    assert kinds[0] is kinds[1] is not kinds[2]
    assert all(k.__name__ == "SdpaProcessor" for k in kinds)
    assert inspect.signature(kinds[0].__call__) == inspect.signature(SdpaProcessor.__call__)


def test_intact_notices_a_processor_that_was_replaced():
    model = Block(Attention(), Attention())
    interception, _ = take(*model.sites)
    assert interception.intact
    model.sites[1].processor = SdpaProcessor()
    assert not interception.intact


@pytest.mark.parametrize(
    "processor",
    [lambda attn, x: x, types.SimpleNamespace(), torch.sin],
    ids=["function", "no call", "builtin"],
)
def test_what_cannot_be_taken_is_named_and_undone(processor):
    model = Block(Attention(), Attention(processor))
    with pytest.raises(UnsupportedModelError, match="the attention processor of 1 is a"):
        take(*model.sites)
    assert type(model.sites[0].processor) is SdpaProcessor
    assert "_accel_site" not in model.sites[0].__dict__
    assert "__reduce_ex__" not in model.sites[0].__dict__


def collect():
    """What was generated for a model is let go with it, and is a cycle by itself."""
    gc.collect()
    gc.collect()


def test_nothing_outlives_the_model():
    collect()
    before = len(intercept._taken), len(SdpaProcessor.__subclasses__())
    model = Block(Attention())
    interception, _ = take(*model.sites)
    assert len(intercept._taken) == before[0] + 1
    interception.undo()
    del model, interception, _
    collect()
    assert (len(intercept._taken), len(SdpaProcessor.__subclasses__())) == before
