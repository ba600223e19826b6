"""What tests of the pipeline of masked diffusion language models share."""

from dataclasses import replace
from itertools import pairwise
from math import inf

import torch
from tiny_text import MASK, VOCABULARY, euro_bert

from accel.choice import DENSE, Choice
from accel.commit import even_split
from accel.estimators import BlockMassTopK
from accel.pipelines.adapters import geometry_of
from accel.pipelines.dllm import MaskedDiffusionPipeline
from accel.plan import Plan
from accel.recipes import recipe
from accel.schedule import Schedule

EOS = 2


def pipe_of(model, **settings):
    pipe = MaskedDiffusionPipeline(model, None, **{"mask_token_id": MASK, **settings})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompts(*lengths, seed=5):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(3, MASK, (n,), generator=g) for n in lengths]


def padded(rows):
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    real = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :] = row
        real[i, longest - len(row) :] = 1
    return {"input_ids": ids, "attention_mask": real}


def run(pipe, rows, **settings):
    return pipe(**padded(rows), output_type="ids", **settings).sequences


def alone(pipe, rows, **settings):
    return torch.cat(
        [pipe(input_ids=r[None], output_type="ids", **settings).sequences for r in rows]
    )


def ending(more):
    """A model with larger logits of an end of text."""
    model = euro_bert().double()
    bonus = torch.zeros(VOCABULARY, dtype=torch.float64)
    bonus[EOS] = more
    model.lm_head.register_forward_hook(lambda module, args, out: out + bonus)
    return model


def plan_of(pipe, keep=1.0, schedule=None, **settings):
    choice = Choice(BlockMassTopK(keep=keep, by_grid=True))
    schedule = schedule or Schedule(dense_start=0.2)
    geometry = geometry_of(pipe.model)
    return Plan.uniform("p", geometry, choice, block=(16, 16), schedule=schedule, **settings)


def recipe_of(pipe, name):
    """With blocks that these few tokens have some of."""
    plan = recipe(name, geometry_of(pipe.model))
    return replace(plan, block=(16, 16)) if plan.wants_sparse else plan


def dense_plan(pipe, **settings):
    return Plan.uniform("p", geometry_of(pipe.model), DENSE, **settings)


class Plainly:
    """LLaDA's generate for one prompt, step by step (arXiv 2502.09992, and the rules of others)."""

    def __init__(self, logits_of, prompt, length, block, *, steps=None, per_step=1, **how):
        self.logits_of, self.how = logits_of, how
        self.x = torch.cat([prompt, torch.full((length,), MASK)])
        self.start, self.calls = len(prompt), 0
        edges = [*range(0, length, block), length]
        sizes = [b - a for a, b in pairwise(edges)]
        if steps is not None:
            marks = [round(steps * edge / length) for edge in edges]
            asked = [b - a for a, b in pairwise(marks)]
            steps = [max(1, min(n, own)) for n, own in zip(sizes, asked, strict=True)]
        begin = len(prompt)
        for i, size in enumerate(sizes):
            count = steps[i] if steps else -(-size // per_step)
            self.fill(i, begin, begin + size, even_split(size, count))
            begin += size

    def fill(self, index, start, stop, quotas):
        turn = 0
        while (self.x[start:stop] == MASK).any():
            logits = self.logits_of(self, index, turn, start, stop).clone()
            self.calls += 1
            logits[:, MASK] = -inf
            if self.how.get("eos") == "never":
                logits[:, EOS] = -inf
            shares = logits.double().softmax(-1)
            best = shares.topk(2, -1).values
            token = shares.argmax(-1)
            sure = {
                "probability": best[:, 0],
                "margin": best[:, 0] - best[:, 1],
                "entropy": (shares * shares.clamp(min=1e-300).log()).sum(-1),
            }[self.how.get("confidence", "probability")]
            if self.how.get("eos") == "last":
                sure = sure.masked_fill(token == EOS, -1e30)
            places = [i for i in range(stop - start) if self.x[start + i] == MASK]
            places.sort(key=lambda i: -float(sure[i]))
            ranked = [float(sure[i]) for i in places]
            n = self.count(ranked, quotas[min(turn, len(quotas) - 1)])
            for i in places[: max(n, 1)]:
                self.x[start + i] = token[i]
            turn += 1

    def count(self, ranked, quota):
        rule, bound = self.how.get("rule", "quota"), self.how.get("bound")
        above = sum(c > bound for c in ranked) if bound is not None else 0
        if rule == "quota":
            return quota
        if rule == "threshold":
            return sum(c >= bound for c in ranked)
        if rule == "threshold_or_quota":
            return above if above >= quota else quota
        if rule == "factor":
            return sum((n + 2) * (1 - c) < bound for n, c in enumerate(ranked))
        return sum(-sum(ranked[:n]) <= bound for n in range(len(ranked)))

    @property
    def generated(self):
        return self.x[None, self.start :]


@torch.no_grad()
def every_token(model, shift=False, guidance=0.0):
    """Logits of a block by a call of the whole model with all tokens."""

    def logits_of(at, index, turn, start, stop):
        logits = model(at.x[None]).logits[0]
        if guidance:
            blank = at.x.clone()
            blank[: at.start] = MASK
            without = model(blank[None]).logits[0]
            logits = without + (guidance + 1) * (logits - without)
        if shift:
            logits = torch.cat([logits[:1], logits[:-1]])
        return logits[start:stop]

    return torch.no_grad()(logits_of)
