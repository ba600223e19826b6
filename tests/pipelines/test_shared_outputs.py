"""Heads that take their output over, on a whole denoiser, against the rule written out by hand."""

import pytest
import torch
from diffusers.models.transformers import transformer_wan
from tiny_denoiser import BLOCK, GRID, HEADS, SITES, call, inputs, tiny_plan
from tiny_denoiser import tiny_denoiser as build
from torch.nn.functional import scaled_dot_product_attention

import accel
from accel.blocking import Blocking
from accel.choice import DENSE, Choice
from accel.layout import Layout
from accel.pattern import Identity, Share, Skip, Window
from accel.pipelines.enable import session_of
from accel.schedule import Schedule

IDENTITY, STEP, BRANCH = Choice(Identity()), Choice(Share("step")), Choice(Share("branch"))
NEAR = Choice(Window(t=1, h=1, w=1))
LAYOUT = Layout.of(GRID)
TOTAL = 6


class ByHand:
    """A plain denoiser whose self-attention follows the choices, head by head."""

    def __init__(self, plan, monkeypatch):
        self.model, self.plan, self.monkeypatch = build(), plan, monkeypatch
        self.before, self.first = {}, {}

    def __call__(self, step, branch, **arguments):
        sites = iter(SITES)
        dispatch = transformer_wan.dispatch_attention_fn

        def replaced(query, key, value, **settings):
            if query.shape[1] != key.shape[1]:
                return dispatch(query, key, value, **settings)
            q, k, v = (x.transpose(1, 2) for x in (query, key, value))
            return self.attend(next(sites), step, branch, q, k, v).transpose(1, 2)

        with self.monkeypatch.context() as patch:
            patch.setattr(transformer_wan, "dispatch_attention_fn", replaced)
            return call(self.model, **arguments)

    def attend(self, site, step, branch, q, k, v):
        out = scaled_dot_product_attention(q, k, v)
        band = self.plan.schedule.phase(step, TOTAL).band
        for head, choice in enumerate(self.plan.choices(site, band) if band is not None else ()):
            earlier = {
                STEP: self.before.get((site, branch, step - 1)),
                BRANCH: self.first.get((site, step)),
            }.get(choice)
            if choice == IDENTITY:
                out[:, head] = v[:, head]
            elif choice == Choice(Skip()):
                out[:, head] = 0
            elif earlier is not None:
                out[:, head] = earlier[:, head]
            elif choice == NEAR:
                keep = NEAR.select.mask(Blocking(LAYOUT, "thw", BLOCK))
                place = torch.arange(LAYOUT.length)
                keep = keep[place // BLOCK[0]][:, place // BLOCK[1]]
                one = (x[:, head] for x in (q, k, v))
                out[:, head] = scaled_dot_product_attention(*one, keep)
        self.before[site, branch, step] = out
        self.first.setdefault((site, step), out)
        return out


CHOICES = {
    "identity": [(IDENTITY, NEAR, DENSE)],
    "step": [(STEP, NEAR, STEP)],
    "branch": [(BRANCH, NEAR, DENSE)],
    "all": [(STEP, BRANCH, IDENTITY), (BRANCH, NEAR, STEP)],
    "whole sites": [(STEP,) * HEADS, (IDENTITY,) * HEADS],
}


@pytest.mark.parametrize("dense_start", [0.0, 0.4])
@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
def test_outputs_are_those_of_the_rule(monkeypatch, choices, dense_start):
    schedule = Schedule(dense_start=dense_start, bands=(0.7,) if len(choices) > 1 else ())
    plan = tiny_plan(DENSE, schedule=Schedule(dense_start=dense_start))
    plan = accel.Plan.from_dict(
        {
            **plan.to_dict(),
            "schedule": schedule.to_dict(),
            "choices": [c.to_dict() for heads in choices for c in heads],
            "sites": {
                s: [[HEADS * b + h for h in range(HEADS)] for b in range(len(choices))]
                for s in SITES
            },
        }
    )
    expected = ByHand(plan, monkeypatch)
    model = accel.enable(build(), plan, strict=True, guard=False)
    for step in range(TOTAL):
        for seed, branch in enumerate(("cond", "uncond")):
            arguments = inputs(3, seed=10 * step + seed)
            out = call(model, step, TOTAL, branch, **arguments)
            torch.testing.assert_close(
                out, expected(step, branch, **arguments), rtol=1e-4, atol=1e-5
            )


def test_an_interrupted_run_hands_nothing_on():
    plan = tiny_plan(STEP, NEAR, BRANCH)
    model = accel.enable(build(), plan)
    for step in range(3):
        call(model, step, TOTAL, "cond", **inputs(seed=step))
    alone = accel.enable(build(), plan)
    for step in range(2):
        for seed, branch in enumerate(("cond", "uncond")):
            arguments = inputs(seed=20 + 2 * step + seed)
            outs = [call(m, step, TOTAL, branch, **arguments) for m in (model, alone)]
            assert torch.equal(*outs)


def test_gradients_run_dense_and_leave_no_graph():
    model = accel.enable(build(), tiny_plan(STEP, schedule=Schedule(dense_start=0.5)))
    with accel.step(1, 4):
        model(**inputs(), return_dict=False)[0].sum().backward()
    kept = session_of(model).run.outputs.before
    assert sorted(kept) == [(site, "") for site in SITES]
    assert not any(one.out.requires_grad for one in kept.values())
