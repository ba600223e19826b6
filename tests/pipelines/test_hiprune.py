"""HiPrune against loops over whole attention maps in float64."""

import pytest
import torch
from tiny_vit import KEEPS, build, enable, images
from token_loops import heads

import accel
from accel.errors import AccelError, UnsupportedModelError
from accel.pipelines.hiprune import select
from accel.token_choice import hierarchical

NAMES = ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_base_patch16_siglip_224"]


def chosen(objects, output, grid, budget, alpha):
    """One image by the paper's words."""
    rows, columns = grid
    ranks = sorted(range(rows * columns), key=lambda j: -float(objects[j]))
    anchors = ranks[: round(alpha * budget / 5)]
    buffers = []
    for j in anchors:
        y, x = divmod(j, columns)
        for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            if 0 <= v < rows and 0 <= u < columns and v * columns + u not in anchors + buffers:
                buffers.append(v * columns + u)
    by_output = lambda js: sorted(js, key=lambda j: -float(output[j]))  # noqa: E731
    rest = [j for j in range(rows * columns) if j not in anchors + buffers]
    return sorted((by_output(anchors) + by_output(buffers) + by_output(rest))[:budget])


def maps(model, x):
    """What every patch gets in every layer, of one image: the mean of the columns of the maps."""
    model = model.double()
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(x[None].double())))
    found = []
    for block in model.blocks:
        q, k, _ = heads(block.norm1(tokens)[0], block)
        whole = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        found.append(whole.mean((0, 1))[model.num_prefix_tokens :])
        tokens = block(tokens)
    return found


class TestChoice:
    @pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 1.0])
    @pytest.mark.parametrize("budget", [1, 8, 20, 35])
    def test_it_is_a_loop_over_patches(self, budget, alpha):
        generator = torch.Generator().manual_seed(budget)
        objects, output = (torch.rand(3, 35, generator=generator) for _ in range(2))
        found = hierarchical(objects, output, (5, 7), budget, alpha=alpha)
        for b in range(3):
            assert found[b].tolist() == chosen(objects[b], output[b], (5, 7), budget, alpha)

    def test_neighbours_do_not_wrap_around_rows(self):
        objects, output = torch.zeros(1, 35), torch.linspace(0, 1, 35)[None]
        objects[0, 7] = 1.0  # the first of the second row
        found = hierarchical(objects, output, (5, 7), 5, alpha=1.0)
        assert found[0].tolist() == [0, 7, 8, 14, 34]

    @pytest.mark.parametrize(
        ("grid", "budget", "alpha", "said"),
        [
            ((5, 6), 4, 0.1, "not those of 5 x 6"),
            ((5, 7), 0, 0.1, "from 1 to 35"),
            ((5, 7), 36, 0.1, "from 1 to 35"),
            ((5, 7), 4, 1.5, "alpha"),
        ],
    )
    def test_wrong_arguments_are_named(self, grid, budget, alpha, said):
        with pytest.raises(AccelError, match=said):
            hierarchical(torch.rand(2, 35), torch.rand(2, 35), grid, budget, alpha=alpha)


class TestEncoders:
    @torch.no_grad()
    @pytest.mark.parametrize(
        "name",
        ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_base_patch16_siglip_224"],
    )
    @pytest.mark.parametrize(("layer", "output"), [(None, -1), (0, -2)])
    def test_timm(self, name, layer, output):
        model = build(name)
        for block in model.blocks:
            block.attn.qkv.weight.mul_(4)
        x = images(model)
        found = select(model, x, 12, alpha=0.5, layer=layer, output=output)
        assert found.shape == (3, 12)
        model.double()
        for b in range(3):
            scores = maps(model, x[b])
            first = scores[1 if layer is None else layer]  # 3 eighths of 4
            assert found[b].tolist() == chosen(first, scores[output], (5, 7), 12, 0.5)

    @torch.no_grad()
    def test_an_enabled_model_runs_without_accel(self):
        model = build()
        x = images(model)
        expected = select(model, x, 9)
        enable(model, KEEPS)
        assert torch.equal(select(model, x, 9), expected)
        accel.disable(model)
        accel.enable(model, "window", guard=False)
        assert torch.equal(select(model, x, 9), expected)

    @torch.no_grad()
    @pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
    def test_transformers(self, kind):
        import transformers

        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}VisionConfig")(
            hidden_size=24,
            intermediate_size=30,
            num_hidden_layers=4,
            num_attention_heads=3,
            image_size=40,
            patch_size=8,
            attn_implementation="sdpa",
        )
        model = getattr(transformers, f"{kind}VisionModel")(config).eval()
        for layer in (
            model.encoder.layers if hasattr(model, "encoder") else model.vision_model.encoder.layers
        ):
            layer.self_attn.q_proj.weight.mul_(9)
            layer.self_attn.k_proj.weight.mul_(9)
        x = torch.randn(3, 3, 40, 40)
        found = select(model, x, 10, alpha=0.6, layer=1, output=-2)
        model.set_attn_implementation("eager")
        whole = [a.double() for a in model(x, output_attentions=True).attentions]
        for b in range(3):
            first, last = (whole[n][b].mean((0, 1))[-25:] for n in (1, -2))
            assert found[b].tolist() == chosen(first, last, (5, 5), 10, 0.6)
        with pytest.raises(UnsupportedModelError, match="attn_implementation='sdpa'"):
            select(model, x, 10)

    def test_what_is_no_encoder_is_refused(self):
        with pytest.raises(UnsupportedModelError, match="pass grid="):
            select(torch.nn.Linear(2, 2), torch.zeros(1, 3, 8, 8), 3)
        with pytest.raises(AccelError, match="one of the model's 4 layers, got 4"):
            select(build(), images(build()), 3, layer=4)
