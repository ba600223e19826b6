"""Training, copies, threads, plans and compilers with merged and fused tokens; what is refused."""

import copy
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import timm
import torch
from tiny_vit import CLASS, KEEPS, MASS, MERGE, blocks_of, build, enable, images, plan_of
from torch.utils.checkpoint import checkpoint

import accel
from accel.choice import DENSE, Choice
from accel.errors import AccelError, PlanError, UnsupportedModelError
from accel.pattern import Window
from accel.pipelines.adapters import geometry_of
from accel.plan import Plan
from accel.schedule import Schedule
from accel.token_reduction import TokenReduction


class TestTraining:
    def test_gradients_of_merging_nothing_are_the_models(self):
        plain = build("deit3_small_patch16_224", drop_path_rate=0.0)
        model, x = copy.deepcopy(plain), images(plain)
        enable(model, (0.999,) * 4)
        blocks_of(model).always = True
        for one in (plain, model):
            one(x).square().sum().backward()
        for weight, expected in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.allclose(weight.grad, expected.grad, atol=1e-3, rtol=1e-4)

    @pytest.mark.parametrize("how", [MERGE, CLASS], ids=str)
    @pytest.mark.parametrize(
        ("name", "reentrant"),
        # timm's Eva gives its blocks keywords, which a reentrant checkpoint does not take
        [
            ("vit_tiny_patch16_224", False),
            ("vit_tiny_patch16_224", True),
            ("eva02_tiny_patch14_224", False),
        ],
    )
    def test_checkpointed_blocks_reduce_as_before(self, name, how, reentrant, monkeypatch):
        """Also where two calls are made, of other images and taps, before both go backwards."""
        monkeypatch.setattr("timm.models._manipulate.use_reentrant_ckpt", lambda: reentrant)
        model = build(name)
        enable(model, KEEPS, **how)

        def gradients(checkpointed):
            model.set_grad_checkpointing(checkpointed)
            model.zero_grad()
            # a reentrant checkpoint gives gradients only where its input wants one
            first, second = (images(model, seed=s).requires_grad_() for s in (1, 2))
            loss = model(first).square().sum()
            last, taps = model.forward_intermediates(second, [1])
            (loss + last.square().sum() * 0.1 + taps[0].square().sum()).backward()
            return [p.grad.clone() for p in model.parameters() if p.grad is not None]

        expected = gradients(False)
        found = gradients(True)
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert torch.allclose(one, other, atol=1e-4, rtol=1e-4)

    def test_a_block_that_nothing_is_known_of_says_so(self):
        model = build()
        enable(model, KEEPS, **MERGE)
        model(images(model))
        with pytest.raises(AccelError, match="nothing is known"):
            checkpoint(model.blocks[2], torch.randn(3, 20, 24), use_reentrant=False)


class TestLife:
    @torch.no_grad()
    def test_copies_are_plain(self):
        plain = build()
        model, x = copy.deepcopy(plain), images(plain)
        enable(model, KEEPS, **MERGE)
        model(x)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(x), plain(x))
            assert torch.equal(
                twin.forward_intermediates(x)[1][1], plain.forward_intermediates(x)[1][1]
            )
            assert list(twin.state_dict()) == list(plain.state_dict())

    @torch.no_grad()
    def test_plans_follow_one_another(self):
        plain = build(rows=8, columns=9)
        model, x = copy.deepcopy(plain), images(plain)
        sparse = Plan.uniform(
            "sparse",
            geometry_of(model),
            Choice(Window(h=0.2, w=0.2)),
            schedule=Schedule(dense_start=0.0),
            block=(16, 16),
        )
        alone = {}
        for name, plan in (("tokens", plan_of(model, KEEPS)), ("sparse", sparse)):
            with accel.enabled(model, plan, guard=False):
                alone[name] = model(x)
        for name, plan in (("tokens", plan_of(model, KEEPS)), ("sparse", sparse)) * 2:
            accel.enable(model, plan, guard=False)
            assert torch.equal(model(x), alone[name])
        accel.disable(model)
        assert torch.equal(model(x), plain(x))
        assert not any("forward" in m.__dict__ for m in model.modules())
        assert "forward_intermediates" not in model.__dict__

    @torch.no_grad()
    def test_an_interrupted_run_leaves_nothing_behind(self):
        model = build()
        x = images(model)
        enable(model, KEEPS, **MERGE)
        expected = model(x)

        def stop(*_):
            raise KeyboardInterrupt

        hook = model.blocks[2].mlp.register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            model.forward_intermediates(images(model, batch=2, seed=5))
        hook.remove()
        assert torch.equal(model(x), expected)

    @torch.no_grad()
    def test_two_models_in_two_threads(self):
        models = [build(), build("eva02_tiny_patch14_224")]
        for model, how in zip(models, (MERGE, CLASS), strict=True):
            enable(model, KEEPS, **how)
        inputs = [images(model) for model in models]
        expected = [model(x) for model, x in zip(models, inputs, strict=True)]
        found = [[], []]

        def work(i):
            with torch.no_grad():
                found[i] += [models[i](inputs[i]) for _ in range(4)]

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for outs, out in zip(found, expected, strict=True):
            assert len(outs) == 4
            assert all(torch.equal(one, out) for one in outs)

    @torch.no_grad()
    def test_the_summary_tells_what_attention_saw(self):
        model = build()
        enable(model, KEEPS, **MERGE)
        model(images(model))
        rows = accel.summary(model).rows
        assert [row.calls for row in rows] == [1] * 4
        assert [row.kernels for row in rows] == [(k,) for k in ("merge", "dense", "merge", "merge")]
        left = [35, 28, 28, 18]
        assert [row.keep for row in rows] == pytest.approx([((n + 1) / 36) ** 2 for n in left])


BEGIN = """
import sys
sys.path.append("tests")
import torch, accel
from tiny_vit import build, images, plan_of

model = build("eva02_tiny_patch14_224", depth=2)
x, other = images(model), images(model, seed=4)

def enable(**how):
    accel.enable(model, plan_of(model, (0.8, 0.5), **how))
    torch.compiler.reset()
"""
GRAPH = """
enable(method="fuse", score="mass")
compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
with torch.no_grad():
    assert torch.allclose(compiled(x), model(x), atol=1e-5)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.allclose(compiled(other), model(other), atol=1e-5)
"""
TRAINED = """
for checkpointed in (False, True):
    enable()
    model.set_grad_checkpointing(checkpointed)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=not checkpointed)
    found = []
    for one in (model, compiled):
        model.zero_grad()
        one(x).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, atol=1e-4, rtol=1e-4), checkpointed
"""
BROKEN = """
# a graph that breaks between blocks goes on with the groups of the block before
enable(method="fuse")
model.blocks[0].mlp.register_forward_hook(torch.compiler.disable(lambda m, a, out: None))
with torch.no_grad():
    assert torch.allclose(torch.compile(model, backend="aot_eager")(x), model(x), atol=1e-5)
"""


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(GRAPH, id="one graph"),
        pytest.param(TRAINED, id="trained", marks=pytest.mark.slow),
        pytest.param(BROKEN, id="broken graph", marks=pytest.mark.slow),
    ],
)
def test_a_compiled_model_is_the_model(program):
    """In a process of its own: here functions are wrapped, which the compiler does not follow."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + program],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


class TestRefusals:
    def test_a_class_score_needs_a_class_token(self):
        model = build("vit_base_patch16_siglip_224")
        with pytest.raises(PlanError, match="no class token; use 'mass'"):
            enable(model, KEEPS, **CLASS)
        enable(model, KEEPS, **MASS)
        with pytest.raises(PlanError, match="no class token"):
            enable(model, KEEPS, **CLASS)
        assert accel.pipelines.enable.session_of(model).plan.tokens.score == "mass"

    def test_sparse_attention_beside_it(self):
        model = build()
        geometry = geometry_of(model)
        tokens = TokenReduction({geometry.sites[0].name: 0.5})
        more = {"schedule": Schedule(dense_start=0.0), "tokens": tokens}
        plan = Plan.uniform("both", geometry, Choice(Window(h=0.2, w=0.2)), **more)
        with pytest.raises(PlanError, match="not the host's"):
            accel.enable(model, plan)
        assert not any("forward" in m.__dict__ for m in model.modules())

    def test_models_that_a_part_does_nothing_in(self):
        swin = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1), embed_dim=12)
        geometry = geometry_of(swin)
        tokens = TokenReduction({geometry.sites[0].name: 0.5})
        with pytest.raises(PlanError, match="`tokens`, which does nothing in a Swin"):
            accel.enable(swin, Plan.uniform("t", geometry, DENSE, tokens=tokens))
        for name, part in (("fast_dllm", "cache"), ("sparse_dllm", "cache")):
            with pytest.raises(PlanError, match=f"`{part}`, which does nothing in a Swin"):
                accel.enable(swin, name)

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("beit_base_patch16_224", "bias for every pair of places"),
            ("vit_relpos_small_patch16_224", "bias for every pair of places"),
            ("vit_dwee_patch16_reg1_gap_256", "is a DiffAttention"),
        ],
    )
    def test_other_kinds_of_blocks(self, name, said):
        model = timm.create_model(name, depth=2, embed_dim=24, num_heads=3)
        with pytest.raises(UnsupportedModelError, match=said):
            accel.enable(model, "tome")
        assert not any("forward" in m.__dict__ for m in model.modules())

    def test_attention_that_is_not_fused(self):
        model = build()
        model.blocks[1].attn.fused_attn = False
        with pytest.raises(UnsupportedModelError, match=r"blocks\.1.*set_fused_attn"):
            accel.enable(model, plan_of(model, KEEPS), check=False)
