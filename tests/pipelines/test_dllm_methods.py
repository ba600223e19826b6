"""Recipes for text models against the loops of their methods, with lists of keys and values."""

from dataclasses import replace
from math import inf

import pytest
import torch
from dllm_cases import Plainly, every_token, pipe_of, prompts
from tiny_text import MASK, VOCABULARY, dream

import accel
from accel.decoding import Decoding
from accel.pipelines.adapters import geometry_of
from accel.recipes import recipe


@pytest.fixture(scope="module")
def layered():
    """A model whose layers the reference loops call one by one, without shifted logits."""
    return pipe_of(dream().double())


@pytest.fixture(autouse=True)
def _plain(layered):
    yield
    accel.disable(layered)


class Layers:
    """Tiny Dream's layers one by one, with keys and values in lists of their own."""

    def __init__(self, model):
        self.model, self.kept = model, {}

    def __call__(self, x, places, seen):
        """Logits of the tokens `x[places]`; `seen(layer, q, k, v)`: keys and values to attend to,
        each [heads, tokens, dim].
        """
        parts, places = self.model.model, torch.as_tensor(places)
        h = parts.embed_tokens(x[places])
        for number, layer in enumerate(parts.layers):
            attn, y = layer.self_attn, layer.input_layernorm(h)
            q, k, v = (
                f(y).view(len(places), -1, attn.head_dim).transpose(0, 1)
                for f in (attn.q_proj, attn.k_proj, attn.v_proj)
            )
            q, k = turned(q, places), turned(k, places)
            keys, values = seen(number, q, k, v)
            group = len(q) // len(keys)
            keys, values = (z.repeat_interleave(group, 0) for z in (keys, values))
            out = (q @ keys.mT * attn.head_dim**-0.5).softmax(-1) @ values
            h = h + attn.o_proj(out.transpose(0, 1).flatten(1))
            h = h + layer.mlp(layer.post_attention_layernorm(h))
        return self.model.lm_head(parts.norm(h))

    def whole(self, x):
        """A call with all tokens, whose keys and values are kept: [heads, tokens, dim] by layer."""
        self.queries = {}

        def seen(layer, q, k, v):
            self.queries[layer], self.kept[layer] = q, [k, v]
            return k, v

        return self(x, range(len(x)), seen)

    def some(self, x, places):
        """A call with some tokens, which replace their own keys and values among all."""

        def seen(layer, q, k, v):
            self.kept[layer] = [z.clone() for z in self.kept[layer]]
            self.kept[layer][0][:, places], self.kept[layer][1][:, places] = k, v
            return self.kept[layer]

        return self(x, places, seen)


def turned(x, places):
    half = x.shape[-1] // 2
    angle = places[:, None] * 10_000.0 ** (-torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


class TestPublishedMethods:
    """Each recipe against the method's own loop."""

    def check(self, pipe, logits_of, plan, **how):
        (row,) = prompts(19)
        want = Plainly(torch.no_grad()(logits_of), row, 22, 8, **how)
        accel.enable(pipe, plan)
        out = pipe(input_ids=row, gen_length=22, output_type="ids")
        dense = Plainly(every_token(pipe.model), row, 22, 8, **how)
        assert torch.equal(out.sequences, want.generated)
        assert out.calls == want.calls
        assert not torch.equal(out.sequences, dense.generated)

    def test_the_layers_are_the_models(self, layered):
        x = torch.cat(prompts(30))
        with torch.no_grad():
            own = Layers(layered.model).whole(x)
            assert torch.allclose(own, layered.model(x[None]).logits[0], atol=1e-10)

    @pytest.mark.parametrize("threshold", [None, 0.5])
    def test_fast_dllm_dual_cache(self, layered, threshold):
        layers = Layers(layered.model)

        def logits_of(at, index, turn, start, stop):
            if turn == 0:
                return layers.whole(at.x)[start:stop]
            return layers.some(at.x, range(start, stop))

        how = {} if threshold is None else {"rule": "threshold", "bound": threshold}
        plan = recipe("fast_dllm", geometry_of(layered.model), threshold=threshold, block_length=8)
        self.check(layered, logits_of, plan, **how)

    def test_fast_dllm_factor(self, layered):
        layers = Layers(layered.model)

        def logits_of(at, index, turn, start, stop):
            if turn == 0:
                return layers.whole(at.x)[start:stop]
            return layers.some(at.x, range(start, stop))

        plan = recipe("fast_dllm", geometry_of(layered.model), factor=1.5, block_length=8)
        self.check(layered, logits_of, plan, rule="factor", bound=1.5)

    @pytest.mark.parametrize("threshold", [None, 0.5])
    def test_fast_dllm_prefix_cache(self, layered, threshold):
        layers = Layers(layered.model)

        def logits_of(at, index, turn, start, stop):
            if turn == 0:
                return layers.whole(at.x)[start:stop]

            def seen(layer, q, k, v):
                before = layers.kept[layer]
                return [
                    torch.cat([z[:, :start], own], 1) for z, own in zip(before, (k, v), strict=True)
                ]

            return layers(at.x, range(start, len(at.x)), seen)[: stop - start]

        how = {} if threshold is None else {"rule": "threshold", "bound": threshold}
        plan = recipe(
            "fast_dllm",
            geometry_of(layered.model),
            cache="prefix",
            threshold=threshold,
            block_length=8,
        )
        self.check(layered, logits_of, plan, **how)

    @pytest.mark.parametrize(("keep", "delay"), [(0.5, 1), (0.2, 0)])
    def test_sparse_dllm(self, layered, keep, delay):
        layers, held = Layers(layered.model), {}

        def choose(start, stop):
            for layer, (k, v) in layers.kept.items():
                q = layers.queries[layer][:, start:stop].mean(1)
                q = q.view(len(k), -1, q.shape[-1]).mean(1)
                others = [i for i in range(k.shape[1]) if not start <= i < stop]
                score = torch.einsum("hd,hnd->hn", q, k).mean(0)
                score[start:stop] = -inf
                score = torch.stack([score[max(i - 1, 0) : i + 2].max() for i in range(len(score))])
                # the paper's int() and ceil differ by one token at most
                count = -int(-(keep * len(others)) // 1)
                best = sorted(others, key=lambda i: -float(score[i]))[:count]
                held[layer] = [z[:, sorted(best)] for z in (k, v)]

        def logits_of(at, index, turn, start, stop):
            if turn <= delay:
                logits = layers.whole(at.x)[start:stop]
                if turn == delay:
                    choose(start, stop)
                return logits

            def seen(layer, q, k, v):
                return [torch.cat([z, own], 1) for z, own in zip(held[layer], (k, v), strict=True)]

            return layers(at.x, range(start, stop), seen)

        plan = recipe(
            "sparse_dllm", geometry_of(layered.model), keep=keep, delay=delay, block_length=8
        )
        self.check(layered, logits_of, plan)

    def test_dkv_decode(self, layered):
        layers, steps, refresh = Layers(layered.model), [], 4
        masked = []

        def logits_of(at, index, turn, start, stop):
            step = len(steps)
            steps.append(turn)
            masked.append((at.x == MASK).nonzero()[:, 0].tolist())
            if step <= 1 or step % refresh == 0:
                return layers.whole(at.x)[start:stop]
            fed = masked[step - 1]  # still masked before the last step
            logits = layers.some(at.x, fed)
            out = logits.new_zeros(stop - start, VOCABULARY)
            for row, place in zip(logits, fed, strict=True):
                if start <= place < stop:
                    out[place - start] = row
            return out

        plan = recipe("dkv", geometry_of(layered.model), refresh=refresh)
        self.check(layered, logits_of, replace(plan, decoding=Decoding(block_length=8)))

    def test_dkv_prefill(self, layered):
        layers, steps = Layers(layered.model), []

        def logits_of(at, index, turn, start, stop):
            step = len(steps)
            steps.append(turn)
            if step <= 1 or step % 5 == 0:
                return layers.whole(at.x)[start:stop]
            logits = layers.some(at.x, range(at.start, len(at.x)))
            return logits[start - at.start : stop - at.start]

        plan = recipe("dkv", geometry_of(layered.model), variant="prefill", refresh=5)
        self.check(layered, logits_of, replace(plan, decoding=Decoding(block_length=8)))

    def test_a_window_of_masks(self, layered):
        """Streaming-dLLM: masks far behind the block are not there at all, but for the last."""
        layers = Layers(layered.model)

        def logits_of(at, index, turn, start, stop):
            last = len(at.x) - 1
            seen_places = [*range(min(stop + 3, last)), last]
            if turn == 0:
                layers.queries = {}

                def all_(layer, q, k, v):
                    layers.kept[layer] = [k, v]
                    return k, v

                return layers(at.x, seen_places, all_)[start:stop]

            def seen(layer, q, k, v):
                before = layers.kept[layer]
                return [
                    torch.cat([z[:, :start], own], 1) for z, own in zip(before, (k, v), strict=True)
                ]

            return layers(at.x, seen_places[start:], seen)[: stop - start]

        plan = recipe(
            "streaming_dllm",
            geometry_of(layered.model),
            window=3,
            threshold=0.5,
            block_length=8,
        )
        plan = replace(plan, decoding=replace(plan.decoding, stop_at_eos=False))
        self.check(layered, logits_of, plan, rule="threshold", bound=0.5)
