"""Models that accel does not know: a guess, the first call as its check, and layout= by hand."""

import pytest
import torch
from cases import AURAFLOW, FLUX, WAN
from test_contract import enable, plan_of, run

import accel
from accel.errors import AccelError, UnsupportedModelError
from accel.layout import Layout
from accel.pipelines import adapters
from accel.pipelines.enable import session_of


@pytest.fixture
def unlisted(monkeypatch):
    """No class has an adapter."""
    adapters.known_classes()  # they register when they are first asked for
    monkeypatch.setattr(adapters, "_ADAPTERS", [])


def test_a_model_of_patches_alone_is_guessed(request):
    expected = run(enable(WAN.model()), WAN.inputs(), 1)
    request.getfixturevalue("unlisted")
    model = WAN.model()
    assert tuple(s.name for s in adapters.sites_of(model)) == WAN.sites
    accel.enable(model, plan_of(model), strict=True, guard=False)
    first = run(model, WAN.inputs(), 0)
    assert torch.equal(first, run(WAN.model(), WAN.inputs())), "the first call is the check"
    assert torch.allclose(run(model, WAN.inputs(), 1), expected, atol=1e-5)


@pytest.mark.usefixtures("unlisted")
class TestUnlisted:
    def test_text_beside_the_grid_is_not_guessed(self):
        model = AURAFLOW.model()
        accel.enable(model, plan_of(model), guard=False)
        for step in range(2):
            run(model, AURAFLOW.inputs(), step)
        notices = session_of(model).notices
        assert len(notices) == len(AURAFLOW.sites)
        assert all("pass layout= to accel.enable" in notice for notice in notices)

    @pytest.mark.parametrize("kind", ["layout", "list", "function"])
    def test_layout_by_hand(self, kind):
        layouts = FLUX.expected()[FLUX.sites[0]]
        by_hand = {
            "layout": layouts[0],
            "list": layouts,
            "function": lambda model, call: Layout.of(
                FLUX.grids[0], text_before=call["encoder_hidden_states"].shape[1]
            ),
        }[kind]
        model = FLUX.model()
        accel.enable(model, plan_of(model), strict=True, guard=False, layout=by_hand)
        run(model, FLUX.inputs(), 0)
        out = run(model, FLUX.inputs(), 1)
        assert not torch.allclose(out, run(FLUX.model(), FLUX.inputs()), atol=1e-3)
        assert not session_of(model).notices

    def test_packed_latents_ask_for_a_layout(self):
        model = FLUX.model()
        accel.enable(model, plan_of(model), guard=False)
        for step in range(2):
            run(model, FLUX.inputs(), step)
        (notice,) = session_of(model).notices
        assert notice == (
            "accel does not know a FluxTransformer2DModel; say where its tokens stand by layout="
        )

    def test_a_site_that_is_called_twice_is_no_site(self):
        model = WAN.model()
        accel.enable(model, plan_of(model), guard=False)
        block = model.blocks[0]
        own = type(block.attn1).forward

        def twice(*args, **kwargs):
            own(block.attn1, *args, **kwargs)
            return own(block.attn1, *args, **kwargs)

        block.attn1.forward = twice
        plain = run(model, WAN.inputs(), 0)
        assert torch.equal(run(model, WAN.inputs(), 1), plain)
        (notice,) = session_of(model).notices
        assert "did not use every site once" in notice
        assert "blocks.0.attn1 (2 times)" in notice

    def test_strict_says_so_as_an_error(self):
        model = AURAFLOW.model()
        accel.enable(model, plan_of(model), strict=True, guard=False)
        run(model, AURAFLOW.inputs(), 0)
        with pytest.raises(AccelError, match="pass layout="):
            run(model, AURAFLOW.inputs(), 1)


def test_linear_attention_is_refused_with_the_reason():
    import diffusers

    model = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
    )
    with pytest.raises(UnsupportedModelError, match="its attention is linear"):
        accel.enable(model, "sparsed")


def test_a_class_that_has_no_adapter_indeed():
    """Like Wan, and no subclass of it."""
    import diffusers

    model = diffusers.SkyReelsV2Transformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=3,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=48,
        num_layers=2,
    ).eval()
    assert type(model).__name__ not in adapters.known_classes()
    plain = run(model, WAN.inputs())
    enable(model)
    assert torch.equal(run(model, WAN.inputs(), 0), plain)
    assert not torch.allclose(run(model, WAN.inputs(), 1), plain, atol=1e-3)
    assert not session_of(model).notices
