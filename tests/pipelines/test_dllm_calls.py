"""What a call of the text pipeline takes, gives and refuses, and what it leaves behind."""

import re
import threading

import pytest
import torch
from diffusers import DiffusionPipeline
from dllm_cases import (
    EOS,
    alone,
    dense_plan,
    ending,
    padded,
    pipe_of,
    plan_of,
    prompts,
    run,
)
from tiny_text import LONGEST, MASK, dream, euro_bert, llada, llada2, qwen3
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

import accel
from accel.errors import AccelError, PlanError, UnsupportedModelError
from accel.pipelines.adapters import geometry_of
from accel.pipelines.dllm import MaskedDiffusionPipeline
from accel.pipelines.enable import session_of
from accel.recipes import recipe
from accel.schedule import Schedule
from accel.token_cache import FEEDS, TokenCache

HOW = {"gen_length": 13, "block_length": 5}


@pytest.fixture(scope="module")
def model():
    return euro_bert(num_hidden_layers=2)


@pytest.fixture
def pipe(model):
    yield pipe_of(model)
    accel.disable(model)


@pytest.fixture(scope="module")
def rows():
    return prompts(19, 6, 30)


class TestExact:
    """Plans that leave nothing out are the model, bit for bit."""

    @pytest.mark.parametrize("feed", FEEDS)
    @pytest.mark.parametrize("keep", [1.0, 0.3])
    def test_whole_calls_alone(self, pipe, rows, feed, keep):
        before = seen(pipe, rows)
        cache = TokenCache(feed=feed, keep=keep, refresh=1, pool=3, blocks=2, delay=1)
        accel.enable(pipe, dense_plan(pipe, cache=cache), strict=True)
        assert all(map(torch.equal, seen(pipe, rows), before))
        assert accel.summary(pipe).cache_bytes == 0
        assert "cached" not in {row.phase for row in accel.summary(pipe).rows}

    @pytest.mark.parametrize("how", [{}, {"guidance_scale": 1.5}], ids=["", "guidance"])
    def test_masks_that_keep_all(self, pipe, rows, how):
        before = run(pipe, rows, **HOW, **how)
        accel.enable(pipe, plan_of(pipe), strict=True, guard=False)
        assert torch.equal(run(pipe, rows, **HOW, **how), before)
        assert {row.phase for row in accel.summary(pipe).rows} == {"dense", "band 0"}
        assert all(row.keep == pytest.approx(1) for row in accel.summary(pipe).rows)

    def test_disabled(self, pipe, rows):
        before = seen(pipe, rows)
        accel.enable(pipe, plan_of(pipe, 0.3, cache=TokenCache(keep=0.3)), guard=False)
        assert not all(map(torch.equal, seen(pipe, rows), before))
        accel.disable(pipe)
        assert all(map(torch.equal, seen(pipe, rows), before))


def seen(pipe, rows, **how):
    """The logits of every call of a generation."""
    run(pipe, rows, **HOW)  # the first one tries what the model sees
    outs = []
    hook = pipe.model.register_forward_hook(lambda m, args, out: outs.append(out.logits.clone()))
    try:
        run(pipe, rows, **HOW, **how)
    finally:
        hook.remove()
    return outs


class TestRuns:
    def test_one_run_has_one_state(self, pipe, rows):
        """Steps beyond those of a block are still its steps, and masks are found as often as said:
        a rule that commits less than its quota takes more.
        """
        plan = plan_of(pipe, 0.3, Schedule(dense_start=0.0))
        accel.enable(pipe, plan, strict=True, guard=False)
        few = {"num_inference_steps": 3, "rule": "threshold", "bound": 1.0}
        out = pipe(**padded(rows), **HOW, **few, output_type="ids")
        assert out.calls == 13
        owners = {key.owner for key in session_of(pipe.model).run.masks}
        assert {branch for _, branch in owners} == {f"[{i}]" for i in range(3)}

    def test_branches_keep_separate_states(self, pipe, rows):
        """With guidance every sample has a mask with its prompt and one without."""
        accel.enable(pipe, plan_of(pipe, 0.3), strict=True, guard=False)
        run(pipe, rows, **HOW, guidance_scale=1.0)
        found = session_of(pipe.model).run.masks
        masks = {key.owner[1]: m.mask.to_dense() for key, m in found.items()}
        assert sorted(masks) == [f"[{i}]" for i in range(6)]
        apart = [torch.equal(masks[f"[{i}]"], masks[f"[{i + 3}]"]) for i in range(3)]
        assert not all(apart)

    def test_a_schedule_of_blocks(self, pipe, rows):
        plan = plan_of(pipe, 0.3, Schedule(dense_start=0.4, axis="block"))
        accel.enable(pipe, plan, strict=True, guard=False)
        run(pipe, rows, **HOW)
        calls = {row.phase: row.calls for row in accel.summary(pipe).rows}
        assert calls == {"dense": 2 + 2 + 1, "band 0": 3 + 3 + 2}
        before = [row for row in accel.summary(pipe).rows]
        run(pipe, rows, **HOW)
        again = {row.phase: row.calls for row in accel.summary(pipe).rows}
        assert (len(before), again) == (len(accel.summary(pipe).rows), calls)

    @pytest.mark.parametrize("padding", [False, True])
    def test_nothing_is_noticed(self, pipe, rows, padding):
        """The calls that try what a model sees are no part of the run."""
        pipe = pipe_of(euro_bert(num_hidden_layers=1))
        accel.enable(pipe, plan_of(pipe, 0.3), guard=False)
        # nor is a call that somebody made before
        with torch.no_grad():
            pipe.model(rows[0][None])
        assert accel.summary(pipe).notices
        run(pipe, rows if padding else rows[:1], **HOW)
        assert not accel.summary(pipe).notices
        assert sum(row.calls for row in accel.summary(pipe).rows) == 13

    @pytest.mark.parametrize(("axis", "times"), [("run", 1), ("block", 3)])
    def test_masks_are_found_once_or_for_every_block(self, pipe, rows, axis, times, monkeypatch):
        found, select = [], accel.run_masks.site_mask
        monkeypatch.setattr(
            accel.run_masks, "site_mask", lambda *a, **k: (found.append(1), select(*a, **k))[1]
        )
        plan = plan_of(pipe, 0.3, Schedule(dense_start=0.0, axis=axis))
        accel.enable(pipe, plan, strict=True, guard=False)
        for _ in range(2):
            found.clear()
            run(pipe, rows[:1], **HOW)
            assert len(found) == 2 * times

    @pytest.mark.slow
    def test_a_compiled_model(self, rows):
        """`torch.compile(model)`, which is another module around it."""
        few = {"gen_length": 4, "block_length": 2}
        plain = euro_bert(num_hidden_layers=1)
        want = run(pipe_of(plain), rows[:1], **few)
        pipe = pipe_of(torch.compile(plain, backend="eager"))
        assert torch.equal(run(pipe, rows[:1], **few), want)
        accel.enable(pipe, plan_of(pipe, 0.3, cache=TokenCache()), strict=True, guard=False)
        fast = run(pipe, rows[:1], **few)
        accel.disable(pipe)
        own = pipe_of(plain)
        accel.enable(own, plan_of(own, 0.3, cache=TokenCache()), strict=True, guard=False)
        assert torch.equal(run(own, rows[:1], **few), fast)
        torch.compiler.reset()

    def test_what_a_cache_takes_is_told(self, pipe, rows):
        accel.enable(pipe, dense_plan(pipe, cache=TokenCache(keep=0.5)))
        run(pipe, rows[:1], **HOW)
        # keys and values, sites, key heads, head dim, bytes; the block and half of what is outside
        tokens = [n + -(-(19 + 13 - n) // 2) for n in (5, 3)]
        assert accel.summary(pipe).cache_bytes == 2 * 2 * 2 * 8 * 4 * max(tokens)

    def test_the_plan_commits(self, pipe, rows):
        """Where the call does not say otherwise; another rule does not take over the bound."""
        plan = recipe("fast_dllm", geometry_of(pipe.model), cache="none", block_length=5)
        accel.enable(pipe, plan)
        own = run(pipe, rows, gen_length=13)
        accel.disable(pipe)
        said = {"block_length": 5, "rule": "threshold", "bound": 0.9}
        assert torch.equal(own, run(pipe, rows, gen_length=13, **said))
        accel.enable(pipe, plan)
        quota = run(pipe, rows, gen_length=13, rule="quota")
        other = run(pipe, rows, gen_length=13, block_length=2)
        accel.disable(pipe)
        assert torch.equal(quota, run(pipe, rows, gen_length=13, block_length=5))
        assert torch.equal(other, run(pipe, rows, gen_length=13, **{**said, "block_length": 2}))


class TestCallback:
    def test_it_sees_every_step(self, pipe, rows):
        seen = []

        def note(own, step, block, tensors):
            assert own is pipe
            seen.append((step, block, tensors["tokens"].clone(), tensors["committed"].clone()))

        out = run(
            pipe,
            rows,
            **HOW,
            callback_on_step_end=note,
            callback_on_step_end_tensor_inputs=("tokens", "committed"),
        )
        assert [s[:2] for s in seen] == [(i, i // 5) for i in range(13)]
        assert torch.equal(seen[-1][2][:, 30:], out)
        for before, (_, block, tokens, committed) in zip([None, *seen], seen, strict=False):
            assert committed.sum(1).tolist() == [1, 1, 1]
            assert not committed[:, : 30 + 5 * block].any()
            if before is not None:
                assert torch.equal(before[2] != tokens, committed)

    @pytest.mark.parametrize("feed", [None, *FEEDS])
    def test_it_changes_tokens(self, feed, rows):
        """A token that it masks is filled again, from logits of its own."""
        pipe = pipe_of(dream(n_layers=2).double(), shift_logits=True)
        cache = None if feed is None else TokenCache(feed=feed, blocks=None)
        accel.enable(pipe, dense_plan(pipe, cache=cache))
        begin, log = len(rows[0]), []

        def change(pipe, step, block, tensors):
            tokens = tensors["tokens"].clone()
            log.append(tokens[0, begin:].tolist())
            if step == 1:
                tokens[0, begin + 9] = 7  # ahead of the block
            if step == 2:
                tokens[0, begin : begin + 5] = MASK
            return {"tokens": tokens}

        out = pipe(input_ids=rows[0][None], **HOW, callback_on_step_end=change, output_type="ids")
        assert out.sequences[0, 9] == 7
        assert not (out.sequences == MASK).any()
        # three that were masked again, and one that came by itself
        assert out.calls == 13 + 3 - 1
        assert sum(token != MASK for token in log[2]) == 4

    def test_an_exception_leaves_nothing_behind(self, pipe, rows):
        plan = plan_of(pipe, 0.3, cache=TokenCache(blocks=None))
        accel.enable(pipe, plan, strict=True, guard=False)
        before = run(pipe, rows, **HOW)

        def stop(pipe, step, block, tensors):
            if step == 7:
                raise KeyboardInterrupt

        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                run(pipe, rows[::-1], **HOW, callback_on_step_end=stop)
            assert accel.text_step.current() is None
            assert torch.equal(run(pipe, rows, **HOW), before)
        assert accel.summary(pipe).rows[0].calls < 13

    def test_unknown_tensors(self, pipe, rows):
        with pytest.raises(AccelError, match=r"knows \['tokens', 'committed'\], got \['logits'\]"):
            run(pipe, rows, **HOW, callback_on_step_end_tensor_inputs=("tokens", "logits"))


class Streamer:
    def __init__(self):
        self.parts, self.ended = [], 0

    def put(self, ids):
        assert not self.ended
        self.parts.append(ids)

    def end(self):
        self.ended += 1


class TestStreamer:
    @pytest.mark.parametrize("gen_length", [13, 5, 2])
    def test_it_gets_every_token_in_order(self, pipe, rows, gen_length):
        streamer = Streamer()
        out = run(pipe, rows, gen_length=gen_length, block_length=5, streamer=streamer)
        assert torch.equal(torch.cat(streamer.parts, 1), out)
        assert [part.shape[1] for part in streamer.parts] == {
            13: [5, 5, 3],
            5: [5],
            2: [2],
        }[gen_length]
        assert streamer.ended == 1

    def test_blocks_come_as_they_are_finished(self, pipe, rows):
        streamer, put = Streamer(), []
        run(
            pipe,
            rows,
            **HOW,
            streamer=streamer,
            callback_on_step_end=lambda *_: put.append(len(streamer.parts)),
        )
        # a block is known to be finished when the next one begins
        assert put == [0] * 5 + [0, 1, 1, 1, 1] + [1, 2, 2]

    def test_no_mask_is_put(self):
        """Of samples that were stopped while others went on it gets what they end with."""
        pipe, streamer = pipe_of(ending(3.0)), Streamer()
        rows = prompts(8, 5, 11, 2)
        out = run(pipe, rows, gen_length=24, block_length=4, stop_at_eos=True, streamer=streamer)
        put = torch.cat(streamer.parts, 1)
        assert torch.equal(put, out[:, : put.shape[1]])
        assert (out[:, put.shape[1] :] == EOS).all()
        assert not (out == MASK).any()


def tokenizer(**settings):
    words = ["<pad>", "<s>", "</s>", *[f"w{i}" for i in range(3, MASK)], "<mask>"]
    own = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    own.pre_tokenizer = Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "mask_token": "<mask>"}
    return PreTrainedTokenizerFast(tokenizer_object=own, **{**special, **settings})


TEMPLATE = "{% for m in messages %}w9 {{ m['content'] }} w8 {% endfor %}"


class TestTexts:
    def test_texts_are_ids(self, model):
        pipe = pipe_of(model)
        pipe.register_modules(tokenizer=tokenizer())
        texts = ["w5 w6 w7", "w11", ""]
        ids = [torch.tensor(row, dtype=torch.long) for row in ([5, 6, 7], [11], [])]
        out = pipe(texts, **HOW)
        assert torch.equal(out.sequences, run(pipe, ids, **HOW))
        decoded = pipe.tokenizer.batch_decode(out.sequences, skip_special_tokens=True)
        assert out.texts == decoded
        assert pipe("w11", **HOW).texts == pipe(["w11"], **HOW).texts

    def test_texts_end(self):
        pipe = pipe_of(ending(4.0))
        pipe.register_modules(tokenizer=tokenizer())
        out = pipe("w5 w6", **HOW)
        end = out.sequences[0].tolist().index(EOS)
        assert out.texts[0].split() == [f"w{i}" for i in out.sequences[0, :end].tolist()]

    def test_chat_templates(self, model):
        pipe = pipe_of(model)
        pipe.register_modules(tokenizer=tokenizer(chat_template=TEMPLATE))
        want = run(pipe, [torch.tensor([9, 5, 6, 8])], **HOW)
        message = {"role": "user", "content": "w5 w6"}
        for call in (
            {"prompt": "w5 w6"},
            {"prompt": ["w5 w6"]},
            {"messages": [message]},
            {"messages": [[message]]},
        ):
            assert torch.equal(pipe(**call, **HOW).sequences, want)
        plain = pipe("w5 w6", use_chat_template=False, **HOW).sequences
        assert torch.equal(plain, run(pipe, [torch.tensor([5, 6])], **HOW))
        two = pipe(messages=[[message], [message, message]], **HOW).sequences
        assert torch.equal(two[:1], want)

    def test_output_types(self, model):
        pipe = pipe_of(model)
        pipe.register_modules(tokenizer=tokenizer())
        out = pipe("w5", **HOW)
        assert (out.sequences.shape, len(out.texts), out.calls) == ((1, 13), 1, 13)
        assert pipe("w5", output_type="ids", **HOW).texts is None
        sequences, texts = pipe("w5", return_dict=False, **HOW)
        assert torch.equal(sequences, out.sequences)
        assert texts == out.texts

    def test_the_mask_token(self, model):
        """The pipeline's own, else the tokenizer's, else the configuration's."""
        (row,) = prompts(7)
        want = run(pipe_of(model), [row], **HOW)
        assert torch.equal(run(pipe_of(model, mask_token_id=None), [row], **HOW), want)
        other = pipe_of(model, mask_token_id=50)
        assert not (run(other, [row], **HOW) == 50).any()
        other = pipe_of(model, mask_token_id=None)
        other.register_modules(tokenizer=tokenizer(mask_token="w50"))
        assert not (run(other, [row], **HOW) == 50).any()

    def test_a_saved_pipeline(self, model, tmp_path):
        pipe = MaskedDiffusionPipeline(model, tokenizer(), shift_logits=True)
        pipe.set_progress_bar_config(disable=True)
        accel.enable(pipe, plan_of(pipe, 0.3))
        pipe.save_pretrained(tmp_path)
        accel.disable(pipe)
        again = MaskedDiffusionPipeline.from_pretrained(tmp_path)
        again.set_progress_bar_config(disable=True)
        assert again.config.shift_logits
        assert torch.equal(again("w5 w7", **HOW).sequences, pipe("w5 w7", **HOW).sequences)
        assert isinstance(again, DiffusionPipeline)


class TestRefused:
    @pytest.mark.parametrize(
        ("call", "message"),
        [
            ({"gen_length": 0}, "gen_length is a number of tokens, at least 1, got 0"),
            ({"gen_length": 8.0}, "gen_length is a number of tokens, at least 1, got 8.0"),
            ({"gen_length": LONGEST}, f"are more than the {LONGEST} that the model was made for"),
            ({"block_length": 0}, "decoding.block_length is a number of tokens"),
            ({"num_inference_steps": 0}, "num_inference_steps is a whole number of at least 1"),
            ({"num_inference_steps": 2.5}, "num_inference_steps is a whole number"),
            ({"temperature": -1.0}, "temperature is a number of at least 0, got -1.0"),
            ({"temperature": float("nan")}, "temperature is a number of at least 0, got nan"),
            ({"top_k": 0}, "top_k is a number of tokens, at least 1, got 0"),
            ({"top_p": 0.0}, "top_p is a share in (0, 1], got 0.0"),
            ({"top_p": 1.5}, "top_p is a share in (0, 1], got 1.5"),
            ({"guidance_scale": -0.5}, "guidance_scale is a number of at least 0, got -0.5"),
            ({"eos": "first"}, "eos is one of allow, last, never, got 'first'"),
            ({"output_type": "np"}, "output_type is 'text' or 'ids', got 'np'"),
            ({"rule": "threshold"}, "decoding.bound is a number from 0 to 1"),
            ({"bound": 0.5}, "decoding.rule 'quota' has no bound, got 0.5"),
            ({"rule": "tresh"}, "decoding.rule 'tresh' is unknown"),
            ({"confidence": "odds"}, "decoding.confidence 'odds' is unknown"),
            ({"prompt": "w5"}, "give one of prompt, messages and input_ids"),
            ({"input_ids": None}, "give one of prompt, messages and input_ids"),
            ({"input_ids": None, "prompt": "w5"}, "this pipeline has no tokenizer"),
            (
                {"input_ids": None, "prompt": "w5", "attention_mask": torch.ones(1, 7)},
                "attention_mask belongs to input_ids",
            ),
            (
                {"attention_mask": torch.ones(1, 6)},
                "attention_mask is (1, 6), input_ids are (1, 7)",
            ),
            ({"input_ids": torch.zeros(1, 7)}, "input_ids are whole numbers [batch, tokens]"),
            ({"input_ids": torch.zeros(1, 7, 1, dtype=torch.long)}, "input_ids are whole numbers"),
            ({"input_ids": torch.zeros(0, 7, dtype=torch.long)}, "there is no prompt"),
            ({"generator": [torch.Generator()] * 2}, "2 generators for 1 prompts"),
        ],
        ids=lambda x: x if isinstance(x, str) else "call",
    )
    @pytest.mark.usefixtures("unchecked")
    def test_calls(self, pipe, call, message):
        given = {"input_ids": prompts(7)[0][None], "gen_length": 13}
        with pytest.raises(AccelError, match=re.escape(message)):
            pipe(**{**given, **call})

    @pytest.mark.parametrize("prompt", [[], [1], 5])
    @pytest.mark.usefixtures("unchecked")
    def test_prompts(self, model, prompt):
        pipe = pipe_of(model)
        pipe.register_modules(tokenizer=tokenizer())
        with pytest.raises(AccelError, match="prompt is a text, or a list of texts"):
            pipe(prompt)
        with pytest.raises(AccelError, match="messages is a conversation, or a list of them"):
            pipe(messages=[])

    def test_no_mask_token(self):
        pipe = pipe_of(qwen3(mask_token_id=None), mask_token_id=None)
        with pytest.raises(AccelError, match="names a mask token; say it by"):
            run(pipe, prompts(7), **HOW)

    @pytest.mark.parametrize("how", [{"eos": "never"}, {"eos": "last"}, {"stop_at_eos": True}])
    def test_no_end_of_text(self, how):
        pipe = pipe_of(euro_bert(eos_token_id=None))
        with pytest.raises(AccelError, match="names an end-of-text token"):
            run(pipe, prompts(7), **HOW, **how)

    def test_bounds_are_plan_errors_too(self, pipe):
        with pytest.raises(PlanError):
            run(pipe, prompts(7), rule="threshold", bound=2.0)

    def test_a_causal_model(self):
        class Causal(type(euro_bert())):
            def forward(self, input_ids, attention_mask=None, position_ids=None):
                n = input_ids.shape[1]
                mask = torch.ones(n, n, dtype=torch.bool).tril()[None, None]
                return super().forward(input_ids, mask, position_ids)

        pipe = pipe_of(Causal(euro_bert(num_hidden_layers=1).config).eval())
        with pytest.raises(AccelError, match=r"Causal is causal: .*is_causal=False"):
            run(pipe, prompts(7), **HOW)

    @pytest.mark.parametrize(
        ("dtype", "less"), [(torch.float32, 1e-7), (torch.bfloat16, 1e-5), (torch.float16, 1e-4)]
    )
    def test_what_is_seen_may_matter_less_than_rounding(self, dtype, less):
        model = euro_bert()
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight *= less
            model.model.embed_tokens.weight[:2] = model.model.embed_tokens.weight[2:4]
        model.to(dtype)
        ids = run(pipe_of(model), prompts(7, 4), **HOW)
        assert not (ids == MASK).any()

    def test_a_model_that_is_asked_not_to_be_causal(self):
        assert not (run(pipe_of(qwen3(is_causal=True)), prompts(7), **HOW) == MASK).any()

    def test_a_model_that_heeds_no_padding(self):
        pipe = pipe_of(llada())
        run(pipe, prompts(7, 7), **HOW)
        with pytest.raises(AccelError, match="TinyLlada does not heed a mask of padding"):
            run(pipe, prompts(7, 5), **HOW)

    def test_a_model_that_is_causal_where_there_is_padding(self):
        class Odd(type(euro_bert())):
            def forward(self, input_ids, attention_mask=None, position_ids=None):
                mask = None
                if attention_mask is not None:
                    n = input_ids.shape[1]
                    mask = torch.ones(n, n, dtype=torch.bool).tril()[None, None]
                return super().forward(input_ids, mask, position_ids)

        pipe = pipe_of(Odd(euro_bert(num_hidden_layers=1).config).eval())
        run(pipe, prompts(7, 7), **HOW)
        with pytest.raises(AccelError, match="Odd is causal where there is padding"):
            run(pipe, prompts(7, 5), **HOW)

    def test_a_model_without_positions(self):
        """It neither can be padded nor be fed a part of its tokens; without that it runs."""

        class Bare(type(euro_bert())):
            def forward(self, input_ids, attention_mask=None):
                return super().forward(input_ids, attention_mask)

        pipe = pipe_of(Bare(euro_bert(num_hidden_layers=1).config).eval())
        run(pipe, prompts(7, 7), **HOW)
        with pytest.raises(UnsupportedModelError, match="Bare takes no position_ids"):
            run(pipe, prompts(7, 5), **HOW)
        accel.enable(pipe, dense_plan(pipe, cache=TokenCache()))
        with pytest.raises(UnsupportedModelError, match="a plan without a cache"):
            run(pipe, prompts(7, 7), **HOW)

    def test_a_cache_where_blocks_are_causal(self):
        pipe = pipe_of(llada2())
        accel.enable(pipe, dense_plan(pipe, cache=TokenCache()))
        with pytest.raises(AccelError, match="cannot honour the attention"):
            run(pipe, prompts(7, 7), **HOW)
        assert accel.text_step.current() is None
        accel.enable(pipe, dense_plan(pipe))
        assert run(pipe, prompts(7, 7), **HOW).shape == (2, 13)


class TestManyAtOnce:
    def test_two_pipelines_in_two_threads(self, rows):
        """Each with a plan and a cache of its own, step by step in turn."""
        threads = torch.get_num_threads()
        pipes = [pipe_of(euro_bert(num_hidden_layers=1)), pipe_of(dream(n_layers=1))]
        caches = [TokenCache(keep=0.4, blocks=2), TokenCache(feed="undecided", blocks=None)]
        for pipe, cache in zip(pipes, caches, strict=True):
            plan = plan_of(pipe, 0.3, cache=cache)
            accel.enable(pipe, plan, strict=True, guard=False)
        want = [run(pipe, rows, **HOW) for pipe in pipes]
        turn, found = threading.Barrier(2), [None, None]

        def work(i):
            torch.set_num_threads(threads)

            def meet(*_):
                turn.wait(60)

            found[i] = run(pipes[i], rows, **HOW, callback_on_step_end=meet)

        workers = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert all(map(torch.equal, found, want))

    def test_two_pipelines_of_one_model(self, model, rows):
        """A run that is interrupted by another of the same model goes on as it was."""
        one, two = pipe_of(model), pipe_of(model)
        accel.enable(one, dense_plan(one, cache=TokenCache(blocks=None)))
        want = run(one, rows, **HOW)
        assert torch.equal(run(two, rows, **HOW), want)
        assert torch.equal(alone(two, rows, **HOW), want)
        accel.disable(model)
