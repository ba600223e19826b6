"""The pipeline of masked diffusion language models: against a plain loop, and in batches."""

import pytest
import torch
from dllm_cases import (
    EOS,
    Plainly,
    alone,
    dense_plan,
    ending,
    every_token,
    padded,
    pipe_of,
    plan_of,
    prompts,
    recipe_of,
    run,
)
from tiny_text import dream, euro_bert, llada, qwen3

import accel
from accel.decoding import Decoding
from accel.errors import AccelError
from accel.recipes import RECIPES
from accel.token_cache import TokenCache


@pytest.fixture(scope="module")
def bert():
    return pipe_of(euro_bert(num_hidden_layers=2))


@pytest.fixture(scope="module")
def exact():
    """In float64, where runs that say the same have the same tokens."""
    return pipe_of(euro_bert().double())


@pytest.fixture(autouse=True)
def _plain(bert, exact):
    yield
    for pipe in (bert, exact):
        accel.disable(pipe)


RULES = {
    "quota": {},
    "margin": {"confidence": "margin"},
    "entropy": {"confidence": "entropy"},
    "threshold": {"rule": "threshold", "bound": 0.4},
    "threshold of margins": {"rule": "threshold", "bound": 0.2, "confidence": "margin"},
    "threshold or quota": {"rule": "threshold_or_quota", "bound": 0.4},
    "factor": {"rule": "factor", "bound": 1.4},
    "bound of entropies": {"rule": "entropy_bound", "bound": 2.5, "confidence": "entropy"},
}


class TestAgainstAPlainLoop:
    @pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
    @pytest.mark.parametrize(("length", "block"), [(13, 5), (12, 4), (9, 40)])
    def test_rules(self, exact, rule, length, block):
        for prompt in prompts(11, 1):
            want = Plainly(every_token(exact.model), prompt, length, block, **rule)
            out = exact(input_ids=prompt[None], gen_length=length, block_length=block, **rule)
            assert torch.equal(out.sequences, want.generated)
            assert out.calls == want.calls
            assert out.texts is None

    @pytest.mark.parametrize("steps", [1, 4, 5, 7, 13, 30])
    def test_steps_that_do_not_divide(self, exact, steps):
        (prompt,) = prompts(9)
        want = Plainly(every_token(exact.model), prompt, 13, 5, steps=steps)
        out = exact(input_ids=prompt, gen_length=13, block_length=5, num_inference_steps=steps)
        assert torch.equal(out.sequences, want.generated)
        assert out.calls == want.calls == min(max(steps, 3), 13)

    @pytest.mark.parametrize("per_step", [2, 3])
    def test_tokens_per_step_are_the_plans(self, exact, per_step):
        (prompt,) = prompts(9)
        decoding = Decoding(block_length=5, tokens_per_step=per_step)
        accel.enable(exact, dense_plan(exact, decoding=decoding))
        want = Plainly(every_token(exact.model), prompt, 13, 5, per_step=per_step)
        out = exact(input_ids=prompt, gen_length=13)
        assert torch.equal(out.sequences, want.generated)
        assert out.calls == want.calls

    @pytest.mark.parametrize("eos", ["allow", "never", "last"])
    def test_end_of_text(self, eos):
        pipe = pipe_of(ending(6.0))
        (prompt,) = prompts(8)
        want = Plainly(every_token(pipe.model), prompt, 12, 6, eos=eos)
        out = run(pipe, [prompt], gen_length=12, block_length=6, eos=eos)
        assert torch.equal(out, want.generated)
        assert (out == EOS).any() == (eos != "never")

    @pytest.mark.parametrize("guidance", [0.5, 2.0])
    @pytest.mark.parametrize("make", [euro_bert, dream])
    def test_guidance(self, make, guidance):
        pipe = pipe_of(make().double(), shift_logits=make is dream)
        rows = prompts(7, 3)
        for row in rows:
            logits_of = every_token(pipe.model, make is dream, guidance)
            want = Plainly(logits_of, row, 10, 4)
            out = run(pipe, [row], gen_length=10, block_length=4, guidance_scale=guidance)
            assert torch.equal(out, want.generated)
        both = run(pipe, rows, gen_length=10, block_length=4, guidance_scale=guidance)
        assert torch.equal(
            both, alone(pipe, rows, gen_length=10, block_length=4, guidance_scale=guidance)
        )

    @pytest.mark.parametrize("make", [qwen3, llada, dream], ids=lambda m: m.__name__)
    def test_models(self, make):
        shift = make is dream
        pipe = pipe_of(make().double(), shift_logits=shift)
        for row in prompts(7, 1):
            want = Plainly(every_token(pipe.model, shift), row, 10, 4)
            assert torch.equal(run(pipe, [row], gen_length=10, block_length=4), want.generated)

    @pytest.mark.parametrize("shift", [False, True])
    def test_empty_prompts(self, shift):
        pipe = pipe_of(dream().double(), shift_logits=shift)
        empty = torch.zeros(0, dtype=torch.long)
        # where all tokens are masked all are alike: in larger blocks rounding says which is first
        want = Plainly(every_token(pipe.model, shift), empty, 10, 1).generated
        assert torch.equal(run(pipe, [empty], gen_length=10, block_length=1), want)
        # the same beside others
        rows = [empty, *prompts(6), empty]
        out = run(pipe, rows, gen_length=10, block_length=1)
        assert torch.equal(out[::2], want.expand(2, -1))

    def test_stop_at_end_of_text(self):
        """What follows a finished block with an end of text is filled with it, sample by sample."""
        pipe = pipe_of(ending(3.0))
        rows = prompts(8, 5, 11, 2)
        whole = run(pipe, rows, gen_length=24, block_length=4)
        out = pipe(
            **padded(rows), gen_length=24, block_length=4, stop_at_eos=True, output_type="ids"
        )
        stopped = set()
        for got, full in zip(out.sequences.view(4, 6, 4), whole.view(4, 6, 4), strict=True):
            ended = [i for i in range(6) if (full[i] == EOS).any()]
            stop = min(ended, default=5) + 1
            stopped.add(stop)
            assert torch.equal(got[:stop], full[:stop])
            assert (got[stop:] == EOS).all()
        assert len(stopped) > 1
        assert out.calls == 4 * max(stopped)


ROWS = prompts(41, 7, 1, 23, 33, 2, 18, 29)
HOW = {"gen_length": 13, "block_length": 6}


class TestBatches:
    """A batch of prompts of many lengths is each of them alone, token for token."""

    @pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
    def test_dense(self, exact, rule):
        how = {**HOW, **rule}
        # nothing but masks is the same everywhere, up to rounding: only here
        rows = [*ROWS, torch.zeros(0, dtype=torch.long)]
        assert torch.equal(run(exact, rows, **how), alone(exact, rows, **how))

    @pytest.mark.parametrize("make", [qwen3, dream], ids=lambda m: m.__name__)
    def test_models(self, make):
        pipe = pipe_of(make(), shift_logits=make is dream)
        out = run(pipe, ROWS, **HOW)
        assert torch.equal(out, alone(pipe, ROWS, **HOW))

    @pytest.mark.parametrize("keep", [1.0, 0.3])
    def test_masks(self, bert, keep):
        before = run(bert, ROWS, **HOW)
        accel.enable(bert, plan_of(bert, keep), strict=True, guard=False)
        out = run(bert, ROWS, **HOW)
        kept = accel.summary(bert).rows
        assert {row.phase for row in kept} == {"dense", "band 0"}
        assert torch.equal(out, alone(bert, ROWS, **HOW))
        assert torch.equal(out, before) == (keep == 1)

    @pytest.mark.parametrize("name", [n for n, r in RECIPES.items() if r.text])
    def test_recipes(self, bert, name):
        accel.enable(bert, recipe_of(bert, name), strict=True, guard=False)
        assert torch.equal(run(bert, ROWS, **HOW), alone(bert, ROWS, **HOW))

    @pytest.mark.parametrize("name", ["dkv", "flashblock", "sparse_dllm", "sparsed"])
    def test_guidance(self, bert, name):
        """Every sample has states of its own with its prompt, and without."""
        how = {**HOW, "guidance_scale": 1.0}
        accel.enable(bert, recipe_of(bert, name), strict=True, guard=False)
        assert torch.equal(run(bert, ROWS[:3], **how), alone(bert, ROWS[:3], **how))

    @pytest.mark.parametrize(
        "cache",
        [
            TokenCache(keep=0.4, by_head=True, pool=3, blocks=2),
            TokenCache(feed="suffix", keep=0.5, window=5, refresh=3),
            TokenCache(feed="undecided", keep=0.6, delay=1, refresh=5, blocks=None),
            TokenCache(feed="generated", keep=0.3, blocks=None),
            TokenCache(external="frozen", keep=0.5, refresh=4),
        ],
        ids=lambda c: f"{c.feed} {c.external}",
    )
    def test_caches(self, cache):
        pipe = pipe_of(dream(n_layers=2), shift_logits=True)
        accel.enable(pipe, plan_of(pipe, 0.5, cache=cache), strict=True, guard=False)
        rows = ROWS[:4]
        assert torch.equal(run(pipe, rows, **HOW), alone(pipe, rows, **HOW))

    def test_generators_by_sample(self, exact):
        def streams(rows):
            return [torch.Generator().manual_seed(9 + i) for i in rows]

        how = {**HOW, "temperature": 0.7, "top_p": 0.9, "top_k": 30, "confidence": "random"}
        rows = range(len(ROWS))
        out = run(exact, ROWS, generator=streams(rows), **how)
        single = [run(exact, [ROWS[i]], generator=streams([i]), **how) for i in rows]
        assert torch.equal(out, torch.cat(single))
        again = run(exact, ROWS, generator=torch.Generator().manual_seed(3), **how)
        assert torch.equal(
            again, run(exact, ROWS, generator=torch.Generator().manual_seed(3), **how)
        )
        assert not torch.equal(again, out)

    def test_samples_that_wait_draw_nothing(self, exact):
        """With a threshold samples take different numbers of steps."""
        how = {**HOW, "temperature": 0.5, "rule": "threshold", "bound": 0.3}

        def streams(rows):
            return [torch.Generator().manual_seed(9 + i) for i in rows]

        out = run(exact, ROWS[:4], generator=streams(range(4)), **how)
        single = [run(exact, [ROWS[i]], generator=streams([i]), **how) for i in range(4)]
        assert torch.equal(out, torch.cat(single))

    def test_padding_is_heeded_wherever_it_stands(self, exact):
        """The mask may have its padding on the right, or within: what is real keeps its order."""
        ids = torch.tensor([[5, 0, 6, 7, 0], [8, 9, 10, 0, 0]])
        mask = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 1, 0, 0]])
        out = exact(input_ids=ids, attention_mask=mask, output_type="ids", **HOW).sequences
        rows = [torch.tensor([5, 6, 7]), torch.tensor([8, 9, 10])]
        assert torch.equal(out, alone(exact, rows, **HOW))

    def test_an_empty_prompt_beside_others_under_shifted_logits_and_a_cache(self):
        pipe = pipe_of(dream(), shift_logits=True)
        accel.enable(pipe, dense_plan(pipe, cache=TokenCache()))
        rows = [torch.zeros(0, dtype=torch.long), *prompts(5)]
        with pytest.raises(AccelError, match="an empty prompt"):
            run(pipe, rows, **HOW)
        assert run(pipe, rows[:1], **HOW).shape == (1, 13)
