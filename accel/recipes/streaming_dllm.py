"""Streaming-dLLM, and DPad's window (arXiv 2508.14148)."""

from accel.choice import DENSE
from accel.decoding import Decoding
from accel.geometry import Geometry
from accel.plan import Plan
from accel.recipes.registry import published
from accel.token_cache import TokenCache


@published(frames=False, text=True)
def streaming_dllm(
    geometry: Geometry,
    *,
    window: int = 64,
    threshold: float | None = 0.9,
    block_length: int = 32,
) -> Plan:
    """Streaming-dLLM: masked tokens far behind the block are not computed at all.

    `window` of them behind the block are, and the last one, which says how long the answer is;
    a block's first step fills the cache of those before it (as Fast-dLLM's prefix cache), steps
    commit what is sure, and an answer that has ended is not gone on with. DPad (arXiv 2508.14148)
    also thins the window out by distance; here it is whole.
    """
    rule, bound = ("quota", None) if threshold is None else ("threshold", threshold)
    return Plan.uniform(
        "streaming_dllm",
        geometry,
        DENSE,
        cache=TokenCache(feed="suffix", window=window),
        decoding=Decoding(block_length=block_length, rule=rule, bound=bound, stop_at_eos=True),
        provenance={"recipe": "streaming_dllm", "window": window, "bound": bound},
    )
