"""What `accel.enable` changes, and that nothing else changes."""

import copy
import gc
import logging
import pickle
import sys
import weakref
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    WanTransformer3DModel,
)
from diffusers.models.transformers import transformer_wan
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from tiny_denoiser import BLOCK, GRID, SITES, call, inputs, tiny_plan
from tiny_denoiser import tiny_denoiser as build
from tiny_wan import CALL
from torch.nn.functional import scaled_dot_product_attention

import accel
from accel.blocking import Blocking
from accel.choice import DENSE, Choice
from accel.estimators import AdaptiveBlockMass, BlockMassTopK, Pooled
from accel.kernels.block_mask import BlockMask
from accel.kernels.reference import sparse_attention_reference
from accel.layout import Layout
from accel.order import inverse
from accel.pattern import FirstFrames, Skip, Window
from accel.pattern_union import Union
from accel.pipelines.enable import session_of
from accel.schedule import Schedule

SPARSE = Choice(BlockMassTopK(keep=0.3))


@pytest.fixture
def model():
    return build()


def generate(pipe, seed=0, prompt="a seven moving left", **changes):
    """Latents of one generation."""
    call = {**CALL, "generator": torch.Generator().manual_seed(seed), "output_type": "latent"}
    return pipe(prompt, **{**call, **changes}).frames


def traces(model):
    """Everything by which an instance could differ from another one of its class."""
    return (
        sorted(model.__dict__),
        [(name, sorted(module.__dict__), type(module)) for name, module in model.named_modules()],
        [(type(m.processor), sorted(m.processor.__dict__)) for m in _attentions(model)],
        dict(model._forward_pre_hooks),
        dict(model._forward_pre_hooks_with_kwargs),
        list(model.state_dict()),
    )


def collect():
    """What was generated for a model is let go with it, and is a cycle by itself."""
    gc.collect()
    gc.collect()


def _namespaces():
    return {name for name in sys.modules if name.startswith("accel._")}


def _attentions(model):
    return [m for block in model.blocks for m in (block.attn1, block.attn2)]


class TestExactness:
    def test_dense_phases_are_the_untouched_model(self, model):
        plain = call(model)
        accel.enable(model, tiny_plan(SPARSE, schedule=Schedule(dense_start=0.5, dense_end=0.2)))
        for step in range(10):
            assert torch.equal(call(model, step), plain) == (step < 5 or step >= 8)

    @pytest.mark.parametrize("batch", [1, 3])
    def test_a_plan_of_full_choices_is_the_untouched_model(self, model, batch):
        arguments = inputs(batch)
        plain = call(model, **arguments)
        accel.enable(model, tiny_plan(DENSE))
        assert torch.equal(call(model, 0, **arguments), plain)
        assert {row.kernels for row in accel.summary(model).rows} == {("dense",)}

    def test_disable_leaves_nothing(self):
        model = build()
        before, plain = traces(model), call(model)
        collect()
        subclasses, namespaces = WanAttnProcessor.__subclasses__(), _namespaces()
        own_call, own_namespace = WanAttnProcessor.__call__, dict(vars(transformer_wan))
        accel.enable(model, tiny_plan(SPARSE))
        assert not torch.equal(call(model, 0), plain)
        assert _namespaces() > namespaces
        assert accel.disable(model) is model
        assert traces(model) == before
        assert _namespaces() == namespaces
        assert WanAttnProcessor.__call__ is own_call
        assert vars(transformer_wan) == own_namespace
        assert torch.equal(call(model, 0), plain)
        assert accel.disable(model) is model, "a second time does nothing"
        del model
        collect()
        assert WanAttnProcessor.__subclasses__() == subclasses

    def test_a_model_that_is_dropped_while_enabled_leaves_nothing(self):
        collect()
        subclasses, namespaces = WanAttnProcessor.__subclasses__(), _namespaces()
        model = accel.enable(build(), tiny_plan(SPARSE))
        call(model, 0)
        dropped = weakref.ref(model)
        del model
        collect()
        assert dropped() is None
        assert _namespaces() == namespaces
        assert WanAttnProcessor.__subclasses__() == subclasses

    def test_a_pipeline_after_disable_is_the_pipeline_before(self, pipe):
        plain = generate(pipe)
        before = traces(pipe.transformer)
        assert accel.enable(pipe, "sparsed") is pipe
        assert not torch.equal(generate(pipe), plain)
        accel.disable(pipe)
        assert traces(pipe.transformer) == before
        assert torch.equal(generate(pipe), plain)

    def test_an_enabled_model_is_still_its_class(self, model):
        keys = list(model.state_dict())
        accel.enable(model, tiny_plan(SPARSE))
        assert type(model) is WanTransformer3DModel
        assert all(isinstance(m.processor, WanAttnProcessor) for m in _attentions(model))
        assert list(model.state_dict()) == keys
        assert "forward" not in model.__dict__
        # an attention that is no site keeps its processor as it was
        assert {type(block.attn2.processor) for block in model.blocks} == {WanAttnProcessor}

    @pytest.mark.parametrize(
        "duplicate",
        [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
        ids=["deepcopy", "pickle"],
    )
    def test_copies_are_plain(self, model, duplicate):
        before, plain = traces(model), call(model)
        accel.enable(model, tiny_plan(SPARSE))
        sparse = call(model, 0)
        other = duplicate(model)
        assert traces(other) == before
        assert torch.equal(call(other, 0), plain)
        accel.enable(other, tiny_plan(SPARSE))
        assert torch.equal(call(other, 0), sparse)
        accel.disable(other)
        assert torch.equal(call(other, 0), plain)
        assert torch.equal(call(model, 0), sparse), "the original is still enabled"

    def test_a_copied_pipeline_is_plain(self, pipe):
        plain = generate(pipe)
        accel.enable(pipe, "sparsed")
        assert torch.equal(generate(copy.deepcopy(pipe)), plain)

    def test_the_instance_alone_is_touched(self, model):
        other = build()
        plain = call(other)
        accel.enable(model, tiny_plan(SPARSE))
        assert torch.equal(call(other, 0), plain)

    def test_keep_of_one_is_close_to_dense(self, model):
        plain = call(model)
        accel.enable(model, tiny_plan(Choice(BlockMassTopK(keep=1.0))))
        assert torch.allclose(call(model, 0), plain, rtol=0, atol=1e-5)
        assert {row.keep for row in accel.summary(model).rows} == {1.0}


class TestTwice:
    def test_the_second_plan_replaces_the_first(self, model, caplog):
        accel.enable(model, tiny_plan(Choice(Skip())))
        assert not caplog.records
        with caplog.at_level(logging.WARNING, logger="accel"):
            accel.enable(model, tiny_plan(SPARSE, name="second"))
        assert [r.message for r in caplog.records] == [
            "accel was enabled with plan 'tiny'; now it is 'second'"
        ]
        alone = accel.enable(build(), tiny_plan(SPARSE))
        assert torch.equal(call(model, 0), call(alone, 0))
        assert accel.summary(model).plan == "second"

    def test_one_disable_undoes_both(self, model):
        before, plain = traces(model), call(model)
        for _ in range(2):
            accel.enable(model, tiny_plan(SPARSE))
        accel.disable(model)
        assert traces(model) == before
        assert torch.equal(call(model, 0), plain)

    def test_a_second_plan_that_fails_leaves_the_first(self, model, monkeypatch):
        accel.enable(model, tiny_plan(SPARSE))
        sparse = call(model, 0)
        with pytest.raises(accel.PlanError):
            accel.enable(model, "sparsd")
        monkeypatch.setattr(
            "accel.pipelines.enable.self_check_inputs", lambda _: (_ for _ in ()).throw(KeyError)
        )
        with pytest.raises(KeyError):
            accel.enable(model, tiny_plan(Choice(Skip())))
        assert torch.equal(call(model, 0), sparse)

    def test_what_was_replaced_between_two_times_is_used(self, model, monkeypatch):
        accel.enable(model, tiny_plan(DENSE))
        plain = call(model, 0)
        accel.disable(model)
        dispatch = transformer_wan.dispatch_attention_fn
        monkeypatch.setattr(
            transformer_wan, "dispatch_attention_fn", lambda *a, **k: dispatch(*a, **k) * 0
        )
        accel.enable(model, tiny_plan(DENSE))
        assert not torch.equal(call(model, 0), plain)


class TestContextManager:
    def test_it_restores(self, model):
        before, plain = traces(model), call(model)
        with accel.enabled(model, tiny_plan(SPARSE)) as same:
            assert same is model
            assert not torch.equal(call(model, 0), plain)
        assert traces(model) == before
        assert torch.equal(call(model, 0), plain)

    def test_inside_another_the_outer_plan_comes_back(self, model):
        before, plain = traces(model), call(model)
        with accel.enabled(model, tiny_plan(SPARSE, name="outer")):
            outer = call(model, 0)
            enabled = traces(model)
            with accel.enabled(model, tiny_plan(Choice(Skip()), name="inner")):
                assert accel.summary(model).plan == "inner"
            assert accel.summary(model).plan == "outer"
            assert traces(model) == enabled
            with pytest.raises(KeyError), accel.enabled(model, tiny_plan(Choice(Skip()))):
                raise KeyError("interrupted")
            assert torch.equal(call(model, 0), outer)
            with accel.enabled(model, tiny_plan(Choice(Skip()))):
                accel.disable(model)
            assert torch.equal(call(model, 0), outer)
            with pytest.raises(accel.PlanError), accel.enabled(model, "sparsd"):
                pass
            assert torch.equal(call(model, 0), outer)
        assert traces(model) == before
        assert torch.equal(call(model, 0), plain)

    def test_it_restores_after_an_exception(self, model):
        before = traces(model)
        with pytest.raises(KeyError), accel.enabled(model, tiny_plan(SPARSE)):
            raise KeyError("interrupted")
        assert traces(model) == before


def masked(choices, q, k, v, layout, masks):
    """Dense attention under the block masks of `choices`, in float64: what a sparse call is."""
    outs = []
    for head, choice in enumerate(choices):
        one = [x[:, head : head + 1] for x in (q, k, v)]
        blocking = Blocking(layout, choice.order, BLOCK)
        key = (choice, head)
        if key not in masks:
            if choice.online:
                masks[key] = choice.select.select(*one, blocking=blocking).keep
            else:
                masks[key] = choice.select.mask(blocking)[None, None]
        order = blocking.indices()
        if choice.rest == "mean":
            mask = BlockMask.from_dense(
                masks[key], block=BLOCK, q_length=layout.length, kv_length=layout.length
            )
            outs.append(sparse_attention_reference(*one, mask, rest="mean", order=order))
            continue
        place = torch.arange(layout.length) if order is None else inverse(order)
        keep = masks[key][:, :, place // BLOCK[0]][:, :, :, place // BLOCK[1]]
        q64, k64, v64 = (x.double() for x in one)
        outs.append(scaled_dot_product_attention(q64, k64, v64, keep).nan_to_num(0.0))
    return torch.cat(outs, 1).to(q.dtype)


class Reference:
    """A plain model whose self-attention is computed by `masked`; masks are found once."""

    def __init__(self, plan, layout, monkeypatch):
        self.model, self.plan, self.layout = build(), plan, layout
        self.masks = {}
        self.monkeypatch = monkeypatch

    def __call__(self, branch="", **arguments):
        calls = iter(SITES)
        dispatch = transformer_wan.dispatch_attention_fn

        def replaced(query, key, value, **settings):
            if query.shape[1] != key.shape[1]:
                return dispatch(query, key, value, **settings)
            site = next(calls)
            q, k, v = (x.transpose(1, 2) for x in (query, key, value))
            masks = self.masks.setdefault((site, branch), {})
            return masked(self.plan.choices(site, 0), q, k, v, self.layout, masks).transpose(1, 2)

        with self.monkeypatch.context() as patch:
            patch.setattr(transformer_wan, "dispatch_attention_fn", replaced)
            out = call(self.model, **arguments)
        assert next(calls, None) is None, "every site was replaced"
        return out


NEAR = Window(t=1, h=1, w=1)
CHOICES = {
    "static": (Choice(NEAR), Choice(Union((NEAR, FirstFrames(1)))), Choice(Window(t=0))),
    "orders": (Choice(NEAR, order="hwt"), Choice(NEAR, order="hilbert"), Choice(NEAR)),
    "online": (SPARSE, SPARSE, Choice(Pooled(keep=0.4, value_bias=False))),
    "mean": (Choice(NEAR, rest="mean"), Choice(Pooled(keep=0.2), rest="mean"), Choice(NEAR)),
    "everything": (DENSE, Choice(Skip()), Choice(Pooled(keep=0.2), "tile(2,2,4)", "mean")),
}


class TestSparse:
    @pytest.mark.parametrize("batch", [1, 3])
    @pytest.mark.parametrize("grid", [GRID, (5, 3, 9)], ids=str)
    @pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
    def test_it_is_dense_attention_under_the_mask(self, monkeypatch, model, choices, grid, batch):
        plan = tiny_plan(*choices)
        expected = Reference(plan, Layout.of(grid), monkeypatch)
        accel.enable(model, plan)
        for step in range(3):
            arguments = inputs(batch, grid, seed=step)
            out = call(model, step, **arguments)
            assert torch.allclose(out, expected(**arguments), rtol=1e-4, atol=1e-5)
            assert not torch.allclose(out, call(expected.model, **arguments), atol=1e-4)

    def test_guidance_as_two_calls_has_masks_for_each(self, monkeypatch, model):
        plan = tiny_plan(SPARSE)
        expected = Reference(plan, Layout.of(GRID), monkeypatch)
        accel.enable(model, plan)
        for step in range(2):
            for branch in ("cond", "uncond"):
                arguments = inputs(seed=10 * step + len(branch))
                out = call(model, step, branch=branch, **arguments)
                assert torch.allclose(out, expected(branch, **arguments), rtol=1e-4, atol=1e-5)
        masks = [expected.masks[SITES[0], branch][SPARSE, 0] for branch in ("cond", "uncond")]
        assert not torch.equal(*masks), "or the test could not tell"

    def test_guidance_in_one_batch_has_masks_for_each_element(self, model):
        plan = tiny_plan(SPARSE)
        both = {name: torch.cat([inputs(seed=1)[name], inputs(seed=2)[name]]) for name in inputs()}
        accel.enable(model, plan)
        batched = call(model, 0, **both)
        for seed in (1, 2):
            alone = call(model, 0, **inputs(seed=seed))
            assert torch.allclose(batched[seed - 1], alone[0], rtol=1e-4, atol=1e-5)

    def test_a_pipeline_knows_its_branches(self, pipe):
        accel.enable(pipe, "sparsed")
        generate(pipe)
        session = session_of(pipe.transformer)
        owners = {owner for owner, *_ in session.run.masks}
        assert owners == {(site, b) for site in SITES for b in ("cond", "uncond")}
        rows = {(r.site, r.phase): r.calls for r in accel.summary(pipe).rows}
        # 4 steps of two calls, 20% of them dense: one step
        assert rows == {(s, p): n for s in SITES for p, n in (("dense", 2), ("band 0", 6))}

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_half_precision(self, model, dtype):
        model.to(dtype)
        arguments = {
            name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs().items()
        }
        plain = call(model, **arguments)
        accel.enable(model, tiny_plan(Choice(BlockMassTopK(keep=1.0))))
        out = call(model, 0, **arguments)
        assert out.dtype == dtype
        assert torch.allclose(out, plain, rtol=0, atol=0.05)


class TestRuns:
    def test_an_interrupted_generation_leaves_nothing(self, pipe):
        accel.enable(pipe, "sparsed", guard=False)
        expected = generate(pipe, seed=1)

        def interrupt(pipe, step, timestep, tensors):
            if step == 2:
                raise KeyboardInterrupt
            return tensors

        for other in (0, 5):
            with pytest.raises(KeyboardInterrupt):
                generate(pipe, seed=other, callback_on_step_end=interrupt)
            assert torch.equal(generate(pipe, seed=1), expected)

    def test_an_exception_inside_the_model_leaves_nothing(self, pipe, monkeypatch):
        accel.enable(pipe, "sparsed", guard=False)
        expected = generate(pipe, seed=1)
        attend = accel.sparse_calls.sparse_attention
        count = iter(range(100))

        def fail(*args, **kwargs):
            if next(count) == 5:
                raise MemoryError
            return attend(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr("accel.sparse_calls.sparse_attention", fail)
            with pytest.raises(MemoryError):
                generate(pipe)
        assert "blocks.1.attn1" in str(accel.summary(pipe))
        assert torch.equal(generate(pipe, seed=1), expected)

    @pytest.mark.parametrize(
        "between",
        [{"num_inference_steps": 3}, {"width": 32}, {"num_frames": 5}, {"guidance_scale": 1.0}],
        ids=lambda change: next(iter(change)),
    )
    def test_another_kind_of_run_between_changes_nothing(self, pipe, between):
        accel.enable(pipe, "adaspa")
        expected = generate(pipe, seed=1)
        generate(pipe, **between)
        assert torch.equal(generate(pipe, seed=1), expected)

    def test_one_step_is_dense_and_the_summary_says_so(self, pipe):
        plain = generate(pipe, num_inference_steps=1)
        accel.enable(pipe, "sparsed")
        assert torch.equal(generate(pipe, num_inference_steps=1), plain)
        summary = accel.summary(pipe)
        assert {(r.phase, r.keep, r.kernels) for r in summary.rows} == {("dense", 1.0, ("dense",))}
        assert "none of the run's 1 steps is sparse with schedule.dense_start 0.2" in str(summary)
        accel.disable(pipe)
        accel.enable(pipe, "sparsed", strict=True)
        with pytest.raises(accel.AccelError, match="strict: none of the run's 1 steps is sparse"):
            generate(pipe, num_inference_steps=1)

    def test_the_summary_is_that_of_the_last_run(self, pipe):
        accel.enable(pipe, "sparsed")
        generate(pipe)
        generate(pipe, num_inference_steps=3, guidance_scale=1.0)
        assert [(r.phase, r.calls) for r in accel.summary(pipe).rows[:2]] == [
            ("dense", 1),
            ("band 0", 2),
        ]


class TestSources:
    def test_a_pipeline_and_a_loop_of_ones_own_agree(self, model):
        accel.enable(model, tiny_plan(SPARSE, schedule=Schedule(dense_start=0.5)))
        said = [call(model, step, total=4) for step in range(4)]
        for step in range(4):
            with model.cache_context("cond", step_index=step, num_inference_steps=4):
                assert torch.equal(call(model), said[step])

    def test_the_scheduler_is_asked_where_the_pipeline_says_nothing(self, pipe, monkeypatch):
        accel.enable(pipe, "sparsed")
        expected = generate(pipe, guidance_scale=1.0)
        silent = type(pipe.transformer).cache_context
        monkeypatch.setattr(
            type(pipe.transformer), "cache_context", lambda self, name, **_: silent(self, name)
        )
        accel.disable(pipe)
        accel.enable(pipe, "sparsed")
        assert torch.equal(generate(pipe, guidance_scale=1.0), expected)
        assert {r.phase for r in accel.summary(pipe).rows} == {"dense", "band 0"}

    def test_another_scheduler_of_the_pipeline_is_asked(self, pipe, monkeypatch):
        silent = type(pipe.transformer).cache_context
        monkeypatch.setattr(
            type(pipe.transformer), "cache_context", lambda self, name, **_: silent(self, name)
        )
        accel.enable(pipe, "sparsed")
        pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
        generate(pipe, guidance_scale=1.0)
        summary = accel.summary(pipe)
        assert [(r.phase, r.calls) for r in summary.rows[:2]] == [("dense", 1), ("band 0", 3)]
        assert not summary.notices

    def test_a_scheduler_whose_steps_were_never_set_knows_nothing(self, pipe):
        accel.enable(pipe, "sparsed")
        pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
        call(pipe.transformer)
        assert ["the step is unknown" in why for why in accel.summary(pipe).notices] == [True]

    def test_the_denoiser_does_not_keep_its_pipeline(self, pipe):
        other = accel.enable(type(pipe)(**pipe.components), "sparsed")
        gone = weakref.ref(other)
        del other
        gc.collect()
        assert gone() is None
        call(pipe.transformer)

    def test_an_unknown_step_is_dense_with_a_notice(self, model, caplog):
        plain = call(model)
        accel.enable(model, tiny_plan(SPARSE))
        with caplog.at_level(logging.WARNING, logger="accel"):
            assert torch.equal(call(model), plain)
        assert "the step is unknown: call the model through its pipeline" in caplog.text
        assert "ran dense 1 times: the step is unknown" in str(accel.summary(model))

    def test_an_unknown_step_is_an_error_when_strict(self, model):
        accel.enable(model, tiny_plan(SPARSE), strict=True)
        with pytest.raises(accel.AccelError, match="strict: the step is unknown"):
            call(model)
        call(model, 0)


class TestLayout:
    @pytest.mark.parametrize(
        "given", [Layout.of(GRID), lambda m, x: Layout.of(GRID)], ids=["layout", "function"]
    )
    def test_a_layout_that_is_given_is_used(self, model, given):
        plan = tiny_plan(Choice(NEAR))
        expected = call(accel.enable(build(), plan), 0)
        assert torch.equal(call(accel.enable(model, plan, layout=given), 0), expected)

    def test_a_wrong_layout_is_dense_with_a_notice(self, model):
        plain = call(model)
        accel.enable(model, tiny_plan(SPARSE), layout=Layout.of((3, 5, 8)))
        assert torch.equal(call(model, 0), plain)
        notices = accel.summary(model).notices
        assert "105 tokens, but the layout ((3, 5, 8), with 0 of text) makes 120" in str(notices)

    def test_a_wrong_layout_is_an_error_when_strict(self, model):
        accel.enable(model, tiny_plan(SPARSE), layout=Layout.of((3, 5, 8)), strict=True)
        with pytest.raises(accel.AccelError, match="pass layout= to accel"):
            call(model, 0)

    def test_gradients_run_dense(self, model):
        accel.enable(model, tiny_plan(SPARSE))
        with accel.step(0, 1):
            out = model(**inputs(), return_dict=False)[0]
        out.sum().backward()
        assert model.blocks[0].attn1.to_q.weight.grad.abs().sum() > 0
        assert "needs gradients" in str(accel.summary(model))


class TestOthersHooks:
    """The caches of diffusers sit on the same modules."""

    def test_first_block_cache(self, pipe):
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.3))
        accel.enable(pipe, "sparsed")
        cached = generate(pipe)
        pipe.transformer.disable_cache()
        assert not torch.equal(generate(pipe), cached)
        accel.disable(pipe)
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.3))
        accel.enable(pipe, "sparsed")
        assert torch.equal(generate(pipe), cached)

    def test_a_root_hook_from_before_can_go_first(self, pipe):
        plain = generate(pipe)
        forward = pipe.transformer.forward
        pipe.transformer.enable_cache(
            FasterCacheConfig(
                spatial_attention_block_skip_range=2,
                current_timestep_callback=lambda: 500,
                tensor_format="BCFHW",
            )
        )
        accel.enable(pipe, "sparsed", check=False)
        pipe.transformer.disable_cache()
        accel.disable(pipe)
        assert pipe.transformer.forward == forward
        assert torch.equal(generate(pipe), plain)


class TestProcessors:
    def test_a_processor_that_was_replaced_is_taken_again(self, model, caplog):
        accel.enable(model, tiny_plan(SPARSE))
        expected = call(model, 0)
        model.set_attn_processor(WanAttnProcessor())
        with caplog.at_level(logging.WARNING, logger="accel"):
            assert torch.equal(call(model, 0), expected)
        assert "attention was replaced after accel.enable" in caplog.text
        accel.disable(model)
        assert {type(m.processor) for m in _attentions(model)} == {WanAttnProcessor}

    def test_one_processor_for_all_attention(self, model):
        expected = call(accel.enable(build(), tiny_plan(SPARSE)), 0)
        shared = WanAttnProcessor()
        model.set_attn_processor(shared)
        plain = call(model)
        accel.enable(model, tiny_plan(SPARSE))
        assert torch.equal(call(model, 0), expected)
        accel.disable(model)
        assert all(m.processor is shared for m in _attentions(model))
        assert torch.equal(call(model, 0), plain)

    @pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
    def test_the_users_dense_attention_stays_in_force(self, model, monkeypatch, compiled):
        model.set_attention_backend("_native_math")
        dispatch, given = transformer_wan.dispatch_attention_fn, []

        def spy(query, key, *args, backend=None, **settings):
            if query.shape == key.shape:  # self-attention
                given.append(getattr(backend, "value", backend))
            return dispatch(query, key, *args, backend=backend, **settings)

        # before enable, which takes the function as it finds it
        monkeypatch.setattr(transformer_wan, "dispatch_attention_fn", spy)
        accel.enable(model, tiny_plan(DENSE), check=False)
        if compiled:
            torch.compiler.reset()
            model.compile(fullgraph=True, backend="aot_eager")
        plain = call(build())
        given.clear()
        assert torch.allclose(call(model, 0), plain, atol=1e-5)
        assert given == ["_native_math"] * len(SITES)
        assert [r.calls for r in accel.summary(model).rows] == [1] * len(SITES)


def test_two_denoisers_take_one_plan_or_one_each():
    both = SimpleNamespace(transformer=build(), transformer_2=build())
    first, second = tiny_plan(SPARSE, name="first"), tiny_plan(Choice(NEAR), name="second")
    accel.enable(both, {"transformer": first, "transformer_2": second})
    assert session_of(both.transformer).plan.name == "first"
    assert session_of(both.transformer_2).plan.name == "second"
    for model in (both.transformer, both.transformer_2):
        call(model, 0)
    assert [r.site for r in accel.summary(both).rows] == [
        f"#{n}.{s}" for n in (1, 2) for s in SITES
    ]
    accel.disable(both)
    with pytest.raises(accel.PlanError, match=r"plans must be given for .*'transformer_2'"):
        accel.enable(both, {"transformer": first})
    assert "_accel" not in both.transformer.__dict__
    second_alone = SimpleNamespace(transformer=None, transformer_2=both.transformer_2)
    accel.enable(second_alone, {"transformer_2": second})
    assert session_of(both.transformer_2).plan.name == "second"


def test_sites_left_out_are_listed(model):
    plan = tiny_plan(SPARSE)
    data = plan.to_dict()
    del data["sites"][SITES[0]]
    accel.enable(model, accel.Plan.from_dict(data))
    call(model, 0)
    assert accel.summary(model).left == (SITES[0],)
    assert f"left dense by the plan: {SITES[0]}" in str(accel.summary(model))


def test_a_plan_comes_from_a_file_or_a_folder(model, tmp_path):
    plan = tiny_plan(SPARSE)
    expected = call(accel.enable(build(), plan), 0)
    for path in (plan.save(tmp_path / "a.json"), str(plan.save(tmp_path / "accel_plan.json"))):
        assert torch.equal(call(accel.enable(model, path), 0), expected)
    assert torch.equal(call(accel.enable(model, tmp_path), 0), expected)


def test_a_plan_comes_from_the_hub(model, tmp_path, monkeypatch):
    plan = tiny_plan(SPARSE)
    expected = call(accel.enable(build(), plan), 0)
    asked = []

    def download(repo_id, **_):
        asked.append(repo_id)
        return str(plan.save_pretrained(tmp_path))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert torch.equal(call(accel.enable(model, "someone/plan"), 0), expected)
    assert asked == ["someone/plan"]


class TestGuard:
    """Sparse calls that are measured to be slower than dense ones."""

    def run(self, model):
        """Ten steps of which three are dense, after the sixth as if sparse calls were slow."""
        for step in range(10):
            if step == 6:
                for (_, phase), record in session_of(model).records.items():
                    record.seconds[:] = [{"dense": 0.01}.get(phase, 0.02)] * 3
            out = call(model, step, **inputs(seed=step))
        return out

    def test_they_are_turned_off_and_it_is_said(self, model, caplog):
        plan = tiny_plan(Choice(NEAR), schedule=Schedule(dense_start=0.3))
        with caplog.at_level(logging.WARNING, logger="accel"):
            out = self.run(accel.enable(model, plan))
        assert torch.equal(out, call(build(), **inputs(seed=9)))
        assert [r.message.split(",")[0] for r in caplog.records] == [
            f"accel: sparse attention is slower than dense attention at {site} here"
            for site in SITES
        ]
        assert sorted(accel.summary(model).notices.values()) == [4, 4]

    def test_not_where_nobody_wants_it(self, model):
        plan = tiny_plan(Choice(NEAR), schedule=Schedule(dense_start=0.3))
        out = self.run(accel.enable(model, plan, guard=False))
        assert not torch.equal(out, call(build(), **inputs(seed=9)))
        assert not accel.summary(model).notices


def test_the_first_tensor_may_be_positional(model):
    accel.enable(model, tiny_plan(SPARSE))
    expected = call(model, 0)
    with torch.no_grad(), accel.step(0, 10):
        assert torch.equal(model(*inputs().values())[0], expected)
    with pytest.raises(TypeError, match="hidden_states"):
        model()


def test_adaptive_plans_refresh_once(model):
    plan = tiny_plan(
        Choice(AdaptiveBlockMass(keep=0.3)), schedule=Schedule(dense_start=0.2, refresh=(0.6,))
    )
    accel.enable(model, plan)
    for step in range(10):
        call(model, step, **inputs(seed=step))
    assert len(session_of(model).records[SITES[0], "band 0"].recall) == 2
