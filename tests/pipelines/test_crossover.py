"""From how many tokens on block masks are worth while."""

from dataclasses import replace

import pytest
import torch
from tiny_text import MASK, euro_bert

import accel
from accel.choice import DENSE
from accel.errors import AccelError, PlanError
from accel.pipelines import crossover
from accel.pipelines.adapters import geometry_of
from accel.pipelines.dllm import MaskedDiffusionPipeline
from accel.plan import Plan
from accel.recipes import recipe
from accel.token_cache import TokenCache


@pytest.fixture
def model():
    return euro_bert()


@pytest.fixture
def plan(model):
    return recipe("sparsed", geometry_of(model), block=(16, 16))


def with_prices(monkeypatch, prices):
    asked = []

    def price_at(plan, model, tokens, *, steps):
        asked.append(tokens)
        return prices[tokens]

    monkeypatch.setattr(crossover, "price_at", price_at)
    return asked


def test_the_least_length_above_which_all_gain(monkeypatch, model, plan):
    lengths = (64, 128, 256, 512)
    asked = with_prices(monkeypatch, {64: 1.4, 128: 0.99, 256: 0.9, 512: 0.5})
    assert crossover.crossover(plan, model, steps=10, lengths=lengths) == 256
    assert asked == [512, 256, 128]
    # one that gains below one that loses is no crossover
    with_prices(monkeypatch, {64: 0.8, 128: 0.7, 256: 1.1, 512: 0.5})
    assert crossover.crossover(plan, model, steps=10, lengths=lengths) == 512
    with_prices(monkeypatch, dict.fromkeys(lengths, 0.9))
    assert crossover.crossover(plan, model, steps=10, lengths=lengths) == 64


def test_where_nothing_gains(monkeypatch, model, plan):
    asked = with_prices(monkeypatch, {64: 0.4, 128: 1.2})
    assert crossover.crossover(plan, model, steps=10, lengths=(64, 128)) == 256
    assert asked == [128]


def test_lengths_are_those_that_the_model_was_made_for(monkeypatch, model, plan):
    model.config.max_position_embeddings = 2048
    asked = with_prices(monkeypatch, dict.fromkeys(crossover.LENGTHS, 0.5))
    assert crossover.crossover(plan, model, steps=10) == 512
    assert asked == [2048, 1024, 512]


def test_a_plan_without_masks_has_none(model):
    dense = Plan.uniform("p", geometry_of(model), DENSE)
    assert crossover.crossover(dense, model, steps=10) is None
    assert crossover.with_crossover(dense, model, steps=10) is dense


def test_a_price_is_a_ratio(model, plan):
    assert 0 < crossover.price_at(plan, model, 96, steps=10) < 1000
    assert crossover.price_at(replace(plan, precision="half"), model, 96, steps=10) > 0


def test_shorter_calls_run_dense_and_say_so(monkeypatch, model, plan):
    with_prices(monkeypatch, {64: 1.4, 128: 0.5})
    known = crossover.with_crossover(plan, model, steps=10, lengths=(64, 128))
    assert known.digest == plan.digest
    assert Plan.from_dict(known.to_dict()) == known
    pipe = MaskedDiffusionPipeline(model, mask_token_id=MASK)
    pipe.set_progress_bar_config(disable=True)
    accel.enable(pipe, known, guard=False)
    keeps = {}
    for tokens in (90, 110):
        pipe(input_ids=torch.full((1, tokens), 7), gen_length=20, block_length=10)
        summary = accel.summary(pipe)
        keeps[tokens] = [row.keep for row in summary.rows if row.phase == "band 0"]
        assert bool(summary.notices) == (tokens == 90)
        assert ("gain nothing below 128 tokens" in str(summary)) == (tokens == 90)
    assert keeps[90] == []
    assert max(keeps[110]) < 0.7
    # what was found in one precision says nothing of another
    assert known.crossover("cpu", "float32") == 128
    assert known.crossover("cpu", "bfloat16") == 0
    assert known.crossover("cuda", "float32") == 0


@pytest.fixture
def resting(model, plan):
    """A pipeline, and a call of 100 tokens: fewer than the plan's crossover of 128."""
    where = {"tokens": 128, "device": "cpu", "dtype": "float32"}
    pipe = MaskedDiffusionPipeline(model, mask_token_id=MASK)
    pipe.set_progress_bar_config(disable=True)
    asked = {"input_ids": torch.full((1, 80), 7), "gen_length": 20, "block_length": 10}
    yield pipe, replace(plan, expected={"crossover": where}), asked
    accel.disable(pipe)


def test_a_run_below_the_crossover_leaves_the_model_alone(resting):
    pipe, plan, asked = resting
    dense = pipe(**asked).sequences
    seen = []

    def look(pipe, *_):
        seen.append(pipe.model.config._attn_implementation)
        return {}

    accel.enable(pipe, plan, guard=False)
    assert torch.equal(pipe(**asked, callback_on_step_end=look).sequences, dense)
    assert set(seen) == {"sdpa"}
    assert pipe.model.config._attn_implementation == "accel_sdpa"
    # attention is taken again, and runs that are long enough are sparse
    pipe(**{**asked, "gen_length": 60})
    summary = accel.summary(pipe)
    assert not summary.notices
    assert {r.phase for r in summary.rows} >= {"band 0"}
    # the summary of a run does not tell of the one before
    pipe(**asked)
    assert accel.summary(pipe).rows == ()


def test_an_interrupted_run_below_the_crossover_is_taken_again(resting):
    pipe, plan, asked = resting
    accel.enable(pipe, plan, guard=False)

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe(**asked, callback_on_step_end=stop)
    assert pipe.model.config._attn_implementation == "accel_sdpa"


def test_disabled_within_a_run_below_the_crossover(resting):
    pipe, plan, asked = resting
    accel.enable(pipe, plan, guard=False)
    pipe(**asked, callback_on_step_end=lambda pipe, *_: accel.disable(pipe) and {})
    assert pipe.model.config._attn_implementation == "sdpa"
    with pytest.raises(AccelError, match="not enabled"):
        accel.summary(pipe)


@pytest.mark.parametrize(
    "changes", [{"dense": "kernel"}, {"cache": TokenCache()}, {"expected": {}}]
)
def test_other_plans_are_followed_at_any_length(resting, changes):
    pipe, plan, asked = resting
    accel.enable(pipe, replace(plan, **changes), guard=False)
    pipe(**asked)
    assert accel.summary(pipe).rows


def test_below_the_crossover_strict_is_an_error(resting):
    pipe, plan, asked = resting
    accel.enable(pipe, plan, guard=False, strict=True)
    with pytest.raises(AccelError, match="nothing below 128 tokens"):
        pipe(**asked)


@pytest.mark.parametrize("tokens", [-1, 3.5, "many", True])
def test_what_is_no_length(plan, tokens):
    expected = {"crossover": {"tokens": tokens, "device": "cpu", "dtype": "float32"}}
    with pytest.raises(PlanError, match=r"crossover\.tokens"):
        replace(plan, expected=expected)
