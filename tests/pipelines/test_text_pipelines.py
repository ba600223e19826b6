"""diffusers' own text pipelines, whose loops are theirs: LLaDA2 and DiffusionGemma."""

import copy

import pytest
import torch
from diffusers import (
    BlockRefinementScheduler,
    DiffusionGemmaPipeline,
    EntropyBoundScheduler,
    LLaDA2Pipeline,
)
from tiny_text import MASK, VOCABULARY, euro_bert, llada2
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion
from transformers.models.diffusion_gemma.configuration_diffusion_gemma import (
    DiffusionGemmaTextConfig,
)

import accel
from accel.choice import DENSE
from accel.errors import AccelError
from accel.pipelines.adapters import geometry_of
from accel.plan import Plan
from accel.recipes import recipe
from accel.token_cache import TokenCache

BLOCK = 16


class Llada2:
    """A pipeline whose model's calls are counted by their tokens."""

    def __init__(self, model):
        self.fed = []
        self.model = model
        model.register_forward_pre_hook(
            lambda module, args, kwargs: self.fed.append(args[0].shape[1] if args else 0),
            with_kwargs=True,
        )
        self.pipe = LLaDA2Pipeline(model=model, scheduler=BlockRefinementScheduler())
        self.pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(5)
        self.ids = torch.randint(3, MASK, (2, 37), generator=generator)

    def __call__(self, pad=0, **changes):
        self.fed.clear()
        mask = torch.ones_like(self.ids)
        mask[0, :pad] = 0
        call = {
            "gen_length": 50,
            "block_length": BLOCK,
            "num_inference_steps": 8,
            "mask_token_id": MASK,
            "eos_early_stop": False,
            "output_type": "seq",
            "threshold": 0.9,
            "editing_threshold": None,
            "sampling_method": "greedy",
        }
        return self.pipe(input_ids=self.ids, attention_mask=mask, **{**call, **changes}).sequences

    def enable(self, cache, **settings):
        plan = Plan.uniform("p", geometry_of(self.model), DENSE, cache=cache)
        return accel.enable(self.pipe, plan, guard=False, **settings)


@pytest.fixture
def blocks():
    return Llada2(llada2())


class TestLlada2:
    @pytest.mark.parametrize("changes", [{}, {"editing_threshold": 0.2}, {"pad": 9}], ids=str)
    def test_the_cache_is_exact_where_blocks_are_causal(self, blocks, changes):
        plain = blocks(**changes)
        whole = list(blocks.fed)
        blocks.enable(TokenCache(blocks=None), strict=True)
        assert torch.equal(blocks(**changes), plain)
        assert blocks.fed[0] == whole[0]
        assert set(blocks.fed[1:]) == {BLOCK}
        # one call more for each block but the first
        assert len(blocks.fed) == len(whole) + len(set(whole)) - 1
        assert accel.summary(blocks.pipe).cache_bytes > 0

    def test_whole_calls_between(self, blocks):
        plain = blocks()
        whole = list(blocks.fed)
        blocks.enable(TokenCache(blocks=None, refresh=1))
        assert torch.equal(blocks(), plain)
        assert blocks.fed == whole
        blocks.enable(TokenCache(blocks=None, refresh=3))
        assert torch.equal(blocks(), plain)
        assert 1 < sum(n > BLOCK for n in blocks.fed) < len(whole) / 2

    def test_disable_leaves_nothing(self, blocks):
        plain = blocks()
        whole = list(blocks.fed)
        hooks = len(blocks.model._forward_pre_hooks), len(blocks.model._forward_hooks)
        blocks.enable(TokenCache(blocks=None))
        blocks()
        accel.disable(blocks.pipe)
        assert torch.equal(blocks(), plain)
        assert blocks.fed == whole
        assert "set_timesteps" not in vars(blocks.pipe.scheduler)
        assert (len(blocks.model._forward_pre_hooks), len(blocks.model._forward_hooks)) == hooks

    def test_copies_are_plain(self, blocks):
        blocks.enable(TokenCache(blocks=None))
        twin = copy.deepcopy(blocks.model)
        assert not twin._forward_hooks
        assert len(twin._forward_pre_hooks) == 1  # the test's own

    def test_an_error_inside_leaves_the_next_run_as_it_should_be(self, blocks):
        plain = blocks()
        blocks.enable(TokenCache(blocks=None))

        def stop(pipe, step, timestep, tensors):
            if step == 11:
                raise RuntimeError("stop")
            return {}

        with pytest.raises(RuntimeError, match="stop"):
            blocks(callback_on_step_end=stop)
        assert torch.equal(blocks(), plain)

    def test_what_such_a_cache_cannot_be(self, blocks):
        blocks.enable(TokenCache(keep=0.5, blocks=None))
        with pytest.raises(AccelError, match="exact one"):
            blocks()

    def test_a_model_that_sees_all_runs_with_masks(self):
        both_ways = Llada2(euro_bert())
        plain = both_ways()
        plan = recipe("sparsed", geometry_of(both_ways.model), block=(16, 16), keep=1.0)
        accel.enable(both_ways.pipe, plan, strict=True, guard=False)
        assert torch.equal(both_ways(), plain)
        bands = {row.phase for row in accel.summary(both_ways.pipe).rows}
        assert bands == {"dense", "band 0"}


def gemma():
    text = DiffusionGemmaTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        global_head_dim=16,
        num_global_key_value_heads=1,
        max_position_embeddings=512,
        sliding_window=24,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=16,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    config = DiffusionGemmaConfig(text_config=text, vision_config=None, canvas_length=BLOCK)
    return DiffusionGemmaForBlockDiffusion(config).eval()


class Gemma(DiffusionGemmaPipeline):
    """The pipeline with token ids for a prompt: its processor is of no matter here."""

    def check_inputs(self, **_):
        pass

    def _prepare_inputs(self, *, prompt, **_):
        return prompt, torch.ones_like(prompt), {}


@pytest.fixture
def canvases():
    pipe = Gemma(model=gemma(), scheduler=EntropyBoundScheduler(), processor=None)
    pipe.set_progress_bar_config(disable=True)
    prompt = torch.randint(3, MASK, (2, 50), generator=torch.Generator().manual_seed(1))

    def generate():
        return pipe(
            prompt=prompt,
            gen_length=40,
            num_inference_steps=8,
            confidence_threshold=None,
            output_type="seq",
            generator=torch.Generator().manual_seed(2),
        ).sequences

    return pipe, generate


class TestDiffusionGemma:
    @pytest.mark.parametrize("cache", [TokenCache(), TokenCache(refresh=1), None], ids=str)
    def test_a_whole_prefix_is_exact(self, canvases, cache):
        pipe, generate = canvases
        plain = generate()
        plan = Plan.uniform("p", geometry_of(pipe.model), DENSE, cache=cache)
        accel.enable(pipe, plan, strict=True)
        assert torch.equal(generate(), plain)
        accel.disable(pipe)
        assert torch.equal(generate(), plain)
        assert not pipe.model._forward_hooks

    @pytest.mark.parametrize(
        "cache",
        [TokenCache(keep=0.5, pool=3, delay=1), TokenCache(external="frozen")],
        ids=["thinned", "frozen"],
    )
    def test_a_part_of_the_prefix(self, canvases, cache):
        pipe, generate = canvases
        plan = Plan.uniform("p", geometry_of(pipe.model), DENSE, cache=cache)
        accel.enable(pipe, plan, strict=True)
        generate()
        rows = [r for r in accel.summary(pipe).rows if r.phase == "cached"]
        assert [r.calls for r in rows] == [3 * (8 - 1 - cache.delay)] * 3
        assert all(r.keep < 0.8 for r in rows)
