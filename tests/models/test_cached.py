"""With the caches of diffusers."""

import re

import pytest
import torch
from cases import FLUX, WAN
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
    TextKVCacheConfig,
)
from features import enabled_with, loop, needs, over

import accel
from accel.choice import DENSE
from accel.pipelines.enable import session_of

STEPS = 6
BLOCKS = r".*(blocks|layers)\.\d+\.(block\.)?(attn\w*|attention|ffn?|feed_forward)"


class Clock:
    """What caches ask for the timestep, from 1000 down; outside of a run there is none."""

    timestep = None

    def at(self, step):
        self.timestep = 1000.0 * (1 - step / STEPS)


def pab(clock):
    skips = {f"{kind}_attention_block_skip_range": 2 for kind in ("spatial", "temporal", "cross")}
    asked = {"current_timestep_callback": lambda: clock.timestep}
    return PyramidAttentionBroadcastConfig(**skips, **asked)


def faster_cache(clock):
    return FasterCacheConfig(
        is_guidance_distilled=True,
        spatial_attention_timestep_skip_range=(-1, 900),
        temporal_attention_timestep_skip_range=(-1, 900),
        attention_weight_callback=lambda _: 0.5,
        current_timestep_callback=lambda: clock.timestep,
    )


def first_block(clock):
    return FirstBlockCacheConfig(threshold=5.0)


def mag_cache(clock):
    return MagCacheConfig(
        threshold=1.0, num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS, retention_ratio=0.2
    )


def taylor(clock):
    return TaylorSeerCacheConfig(
        cache_interval=3,
        disable_cache_before_step=2,
        cache_identifiers=[BLOCKS],
        taylor_factors_dtype=torch.float32,
    )


def taylor_lite(clock):
    return TaylorSeerCacheConfig(
        cache_interval=3,
        disable_cache_before_step=2,
        use_lite_mode=True,
        taylor_factors_dtype=torch.float32,
    )


def sea_cache(clock):
    return SeaCacheConfig(threshold=50.0, raw_vision_callback=latents)


def latents(module, args, kwargs):
    """Each sample as [channels, t, h, w]; those that come as tokens [tokens, channels] as a row."""
    samples = list(kwargs["hidden_states"])
    return [x if x.ndim == 4 else x.mT[:, None, None] for x in samples]


def text_kv(clock):
    return TextKVCacheConfig()


CACHES = {
    "PAB": pab,
    "FasterCache": faster_cache,
    "FirstBlockCache": first_block,
    "MagCache": mag_cache,
    "SeaCache": sea_cache,
    "TaylorSeer": taylor,
    "TaylorSeer lite": taylor_lite,
    "TextKVCache": text_kv,
}
# what diffusers itself says of a model, in words for a table
UNSERVED = {
    r"Model class .* not registered": "diffusers knows nothing of its blocks for this cache",
    r"must match the size": "the cache fails on its two kinds of blocks",
    r"unsupported operand": "the cache fails on what its blocks give",
}

# what a cache may do to a model that it says nothing about
IDLE = {
    "TextKVCache": "the cache is for NucleusMoE alone",
    "SeaCache": "the cache keeps nothing of its blocks, and runs them all",
}


def cached(case, kind):
    """A model with a cache and the clock it reads, or a skip."""
    clock, model = Clock(), case.model()
    needs(model, "enable_cache", "caches")
    model.enable_cache(CACHES[kind](clock))
    return model, clock


def run(model, case, clock):
    out = loop(model, case, STEPS, at=clock.at)
    clock.timestep = None
    model._reset_stateful_cache()
    return out


def alone(case, kind):
    """The outputs without a plan, with and without the cache; a skip where the cache fails."""
    try:
        model, clock = cached(case, kind)
        out = run(model, case, clock)
    except (ValueError, RuntimeError, TypeError) as error:
        for pattern, reason in UNSERVED.items():
            if re.search(pattern, str(error)):
                pytest.skip(reason)
        raise
    model.disable_cache()
    dense = run(model, case, clock)
    if kind in IDLE and torch.equal(out, dense):
        pytest.skip(IDLE[kind])
    assert not torch.equal(out, dense), "a cache that leaves nothing out says nothing"
    return out, dense


def both_orders(case, kind, *choices):
    """A model enabled before and one enabled after the cache, with their clocks."""
    model, clock = cached(case, kind)
    yield enabled_with(model, *choices), clock
    model, clock = enabled_with(case.model(), *choices), Clock()
    model.enable_cache(CACHES[kind](clock))
    yield model, clock


kinds = pytest.mark.parametrize(
    "kind", [pytest.param(kind, id=kind, marks=pytest.mark.feature(kind)) for kind in CACHES]
)


@kinds
@over(few=(WAN,))
def test_keep_1_is_the_cache_alone(case, kind):
    out, dense = alone(case, kind)
    for model, clock in both_orders(case, kind, DENSE):
        assert torch.equal(run(model, case, clock), out)
        model.disable_cache()
        assert torch.equal(run(model, case, clock), dense)
        assert not session_of(model).notices


@kinds
@over(few=(FLUX,))
def test_a_plan_and_a_cache_in_either_order(case, kind):
    out, dense = alone(case, kind)
    whole = loop(enabled_with(case.model()), case, STEPS)
    outs = []
    for model, clock in both_orders(case, kind):
        outs.append(run(model, case, clock))
        calls = [row.calls for row in accel.summary(model).rows]
        assert min(calls) < STEPS * (2 if case.by_sample else 1), "the cache left something out"
        assert not session_of(model).notices
        model.disable_cache()
        assert torch.equal(run(model, case, clock), whole)
        accel.disable(model)
        assert torch.equal(run(model, case, clock), dense)
    assert outs[0].isfinite().all()
    assert not torch.equal(outs[0], out)
