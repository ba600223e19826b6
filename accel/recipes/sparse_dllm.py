"""Sparse-dLLM (arXiv 2508.02558)."""

from accel.choice import DENSE
from accel.decoding import Decoding
from accel.geometry import Geometry
from accel.plan import Plan
from accel.recipes.registry import published
from accel.token_cache import TokenCache


@published(frames=False, text=True)
def sparse_dllm(
    geometry: Geometry,
    *,
    keep: float = 0.5,
    delay: int = 1,
    pool: int = 3,
    block_length: int = 32,
    prefix_only: bool = False,
    by_head: bool = False,
) -> Plan:
    """Sparse-dLLM: a block's later steps see the tokens outside it that its queries score highest.

    The first `delay + 1` steps of a block are whole; then `keep` of the tokens before and after it
    stay in the cache, chosen at every layer by the block's mean query, and only the block is
    computed (arXiv 2508.02558: keep 0.5, delay 1, pooling over 3, blocks of 32). prefix_only:
    tokens after the block are computed in every step, and choice is among those before it.
    """
    feed = "suffix" if prefix_only else "block"
    return Plan.uniform(
        "sparse_dllm",
        geometry,
        DENSE,
        cache=TokenCache(feed=feed, keep=keep, pool=pool, by_head=by_head, delay=delay),
        decoding=Decoding(block_length=block_length),
        provenance={"recipe": "sparse_dllm", "keep": keep, "delay": delay},
    )
