"""Diffusers' caches: alone and with a plan, apart for each branch, and nothing left behind."""

from types import SimpleNamespace

import pytest
import torch
from tiny_denoiser import tiny_denoiser
from tiny_wan import CALL, tiny_wan_config

import accel
from accel.choice import Choice
from accel.errors import AccelError
from accel.estimators import BlockMassTopK
from accel.pattern import Share
from accel.pipelines.adapters import geometry_of
from accel.pipelines.cache_hooks import (
    disable_cache,
    enable_cache,
    left,
    magnitude_ratios,
    reset_cache,
)
from accel.pipelines.caches import CACHES, CacheSpec
from accel.pipelines.enable import session_of
from accel.pipelines.host import Host
from accel.pipelines.model_settings import model_config
from accel.plan import Plan
from accel.schedule import Schedule

STEPS = 8
RATIOS = [1.0] * STEPS
# bold enough to leave something out of a tiny model's few steps
BOLD = {
    "pab": {},
    "faster_cache": {},
    "fbcache": {"threshold": 0.9},
    "magcache": {"threshold": 1.0},
    "taylorseer": {"cache_interval": 3},
}
SITES = ("blocks.0.attn1", "blocks.1.attn1")


def generate(pipe, seed=0, **changes):
    """Latents of one generation."""
    call = {**CALL, "num_inference_steps": STEPS, **changes}
    generator = torch.Generator().manual_seed(seed)
    return pipe("a seven moving left", generator=generator, output_type="latent", **call).frames


def bold(kind):
    return CacheSpec(kind, BOLD[kind])


def enable(pipe, kind):
    enable_cache(pipe, bold(kind), steps=STEPS, ratios=RATIOS)


class Calls:
    """Counts the calls of every attention and feed-forward, by module."""

    def __init__(self, model):
        self.of = {}
        for name, module in model.named_modules():
            if name.endswith(("attn1", "attn2", "ffn")):
                self.of[name] = 0
                # what a cache replaces is `forward`; parts of it are called only when that runs
                inner = next(m for m in module.modules() if isinstance(m, torch.nn.Linear))
                inner.register_forward_pre_hook(lambda *_, name=name: self._count(name))

    def _count(self, name):
        self.of[name] += 1


@pytest.mark.parametrize("kind", CACHES)
def test_a_cache_leaves_calls_out_and_leaves_no_trace(pipe, kind):
    plain = generate(pipe)
    calls = Calls(pipe.transformer)
    enable(pipe, kind)
    cached = generate(pipe)
    assert cached.isfinite().all()
    assert not torch.equal(cached, plain)
    assert sum(calls.of.values()) < 2 * STEPS * len(calls.of)
    disable_cache(pipe)
    assert torch.equal(generate(pipe), plain)


@pytest.mark.parametrize("kind", CACHES)
def test_a_generation_knows_nothing_of_the_one_before(pipe, kind):
    """Neither of one that came to its end, nor, after a reset, of one that was interrupted."""
    enable(pipe, kind)
    first = generate(pipe)
    generate(pipe, seed=1)
    assert torch.equal(generate(pipe), first)

    def interrupt(pipe, step, timestep, state):
        if step == 4:
            raise KeyboardInterrupt
        return state

    with pytest.raises(KeyboardInterrupt):
        generate(pipe, seed=1, callback_on_step_end=interrupt)
    reset_cache(pipe)
    assert torch.equal(generate(pipe), first)


@pytest.mark.parametrize("kind", CACHES)
def test_a_plan_and_a_cache_in_either_order(pipe, kind):
    plain = generate(pipe)
    accel.enable(pipe, "sparsed", guard=False)
    planned = generate(pipe)
    whole = {row.site: row.calls for row in accel.summary(pipe).rows if row.phase != "dense"}
    enable(pipe, kind)
    both = generate(pipe)
    summary = accel.summary(pipe)
    assert both.isfinite().all()
    assert not torch.equal(both, planned)
    assert not torch.equal(both, plain)
    assert {row.site for row in summary.rows} == set(SITES)
    assert not summary.notices
    sparse = {row.site: row.calls for row in summary.rows if row.phase != "dense"}
    assert sum(sparse.values()) < sum(whole.values())
    assert all(0 < calls <= whole[site] for site, calls in sparse.items())
    disable_cache(pipe)
    assert torch.equal(generate(pipe), planned)
    accel.disable(pipe)
    assert torch.equal(generate(pipe), plain)
    enable(pipe, kind)
    accel.enable(pipe, "sparsed", guard=False)
    assert torch.equal(generate(pipe), both)
    accel.disable(pipe)
    disable_cache(pipe)
    assert torch.equal(generate(pipe), plain)


@pytest.mark.parametrize("kind", CACHES)
def test_enabling_again_beside_a_cache_sees_every_site(pipe, kind):
    """The self-check is a call that no cache may answer from the one before it."""
    enable(pipe, kind)
    for _ in range(5):
        accel.enable(pipe, "window")


@pytest.mark.parametrize("kind", ["pab", "faster_cache"])
def test_branches_do_not_share_what_is_cached(pipe, kind):
    """Without guidance the unconditional branch is never called; the conditional one must not
    notice.
    """
    outputs = {}
    for scale in (1.0, 2.0):
        reused, seen = [], pipe.transformer.blocks[1].attn1
        enable(pipe, kind)
        forward = seen.forward
        seen.forward = lambda *args, forward=forward, reused=reused, **kwargs: _kept(
            reused, forward(*args, **kwargs)
        )
        generate(pipe, guidance_scale=scale)
        seen.forward = forward
        disable_cache(pipe)
        outputs[scale] = reused
    cond = outputs[2.0][::2]
    uncond = outputs[2.0][1::2]
    # at the first step nothing but the text differs
    assert torch.equal(cond[0], outputs[1.0][0])
    assert not any(torch.equal(a, b) for a, b in zip(cond, uncond, strict=True))
    changes = [not torch.equal(a, b) for a, b in zip(uncond[1:], uncond[:-1], strict=True)]
    assert any(changes)
    if kind == "pab":
        assert changes == [not torch.equal(a, b) for a, b in zip(cond[1:], cond[:-1], strict=True)]
        assert not all(changes)


def _kept(reused, output):
    reused.append(output)
    return output


def test_attention_of_a_cached_step_is_that_of_the_step_before(pipe):
    """PAB: every second step between a fifth and nine tenths of the run, at every site."""
    calls = Calls(pipe.transformer)
    enable(pipe, "pab")
    generate(pipe)
    # of steps 0 to 7, those at 2/8 to 7/8 are in the range; 3, 5 and 7 are served
    assert {calls.of[site] for site in SITES} == {2 * (STEPS - 3)}
    # of cross-attention, which serves six steps, 0, 1 and 6 are computed
    assert calls.of["blocks.0.attn2"] == 2 * 3


def test_taylorseer_finds_its_modules_in_wan(pipe):
    """Full steps are 0, 1, 2, 4 and 7; `lite` runs no block at all in the others."""
    for lite in (False, True):
        calls = Calls(pipe.transformer)
        spec = CacheSpec("taylorseer", {"cache_interval": 3, "lite": lite})
        enable_cache(pipe, spec, steps=STEPS)
        generate(pipe)
        assert {calls.of[f"blocks.{i}.{part}"] for i in (0, 1) for part in ("attn1", "ffn")} == {
            2 * 5
        }


def test_ratios_are_one_for_every_step(tiny_wan_path):
    model = {**tiny_wan_config(tiny_wan_path), "call": {**CALL, "num_inference_steps": 3}}
    host = Host(model_config(model))
    plain = host.generate("a one", 0)
    ratios = magnitude_ratios(host, "a one moving left", 0)
    assert len(ratios) == 3
    assert ratios[0] == 1
    assert all(0.2 < ratio < 5 and ratio != 1 for ratio in ratios[1:])
    assert not host.pipe.transformer.is_cache_enabled
    assert (host.generate("a one", 0) == plain).all()


def test_what_is_left_of_a_run_goes_from_all_to_nothing(pipe):
    seen = [left(pipe)]
    generate(pipe, callback_on_step_end=lambda pipe, *_: seen.append(left(pipe)) or {})
    # after the last step the scheduler stands beyond the run
    assert seen == [1000, *(1000 * (1 - i / STEPS) for i in range(1, STEPS)), 1000]


def test_settings_have_defaults_and_are_checked():
    assert CacheSpec("fbcache").options == {"threshold": 0.05}
    spec = CacheSpec.of({"cache": "pab", "spatial_attention_timestep_skip_range": [0, 900]})
    assert spec.options["spatial_attention_timestep_skip_range"] == (0, 900)
    assert spec.options["cross_attention_block_skip_range"] == 6
    assert CacheSpec.of(spec.to_dict()).identity == spec.identity
    assert CacheSpec("pab").identity != spec.identity
    for what, message in [
        ("fbcash", "did you mean 'fbcache'"),
        ({"cache": "fbcache", "treshold": 1}, "did you mean 'threshold'"),
        ({"cache": "fbcache", "threshold": "low"}, "threshold is 'low'; it is a number"),
        ({"cache": "pab", "spatial_attention_timestep_skip_range": [9, 1]}, "ascending"),
        ({"cache": "pab", "spatial_attention_block_skip_range": 0}, "at least 1"),
        ({"cache": "taylorseer", "lite": 1}, "it is true or false"),
        ({"threshold": 0.1}, "a cache is a name or"),
    ]:
        with pytest.raises(AccelError, match=message):
            CacheSpec.of(what)


def test_what_a_cache_cannot_serve_is_said():
    pipe = SimpleNamespace(transformer=torch.nn.Linear(2, 2), scheduler=None)
    with pytest.raises(AccelError, match="a Linear has none of diffusers' caches"):
        enable_cache(pipe, CacheSpec("pab"), steps=4)
    two = SimpleNamespace(transformer=tiny_denoiser(), transformer_2=tiny_denoiser())
    with pytest.raises(AccelError, match="steps of one denoiser"):
        enable_cache(two, bold("magcache"), steps=4, ratios=RATIOS)
    odd = SimpleNamespace(transformer=tiny_denoiser())
    odd.transformer.layers = odd.transformer.blocks
    del odd.transformer.blocks
    with pytest.raises(AccelError, match="'taylorseer' finds nothing in a WanTransformer3DModel"):
        enable_cache(odd, bold("taylorseer"), steps=4)
    assert not odd.transformer.is_cache_enabled


@pytest.mark.parametrize("kind", ["pab", "fbcache"])
def test_heads_that_share_take_over_what_was_last_computed(pipe, kind):
    """Steps and branches that a cache answers never reach the sites; what they would have left
    behind is not waited for.
    """
    heads = (Choice(Share("step")), Choice(Share("branch")))
    geometry = geometry_of(pipe)
    sites = {site.name: (heads,) for site in geometry.sites}
    accel.enable(
        pipe, Plan.of("p", geometry, sites, schedule=Schedule(dense_start=0.2)), guard=False
    )
    shared = generate(pipe)
    enable(pipe, kind)
    both = generate(pipe)
    assert both.isfinite().all()
    assert not torch.equal(both, shared)
    assert not accel.summary(pipe).notices


def test_a_plan_looks_anew_at_the_first_step_that_a_cache_computes(pipe):
    """A refresh that falls into a step which the cache answers comes with the next that is
    computed, and holds from there.
    """
    schedule = Schedule(dense_start=0.2, refresh=(3 / 8,))  # step 3 is served by PAB
    plan = Plan.uniform(
        "p", geometry_of(pipe), Choice(BlockMassTopK(keep=0.4)), schedule=schedule, block=(32, 32)
    )
    accel.enable(pipe, plan, guard=False)
    enable(pipe, "pab")
    generate(pipe)
    record = session_of(pipe.transformer).records[SITES[0], "band 0"]
    assert record.calls == 2 * 3  # steps 2, 4 and 6
    assert len(record.mask_seconds) == 2 * 2
