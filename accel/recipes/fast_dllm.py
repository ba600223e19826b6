"""Fast-dLLM (arXiv 2505.22618)."""

from accel.choice import DENSE
from accel.decoding import Decoding
from accel.errors import nearest
from accel.geometry import Geometry
from accel.plan import Plan
from accel.recipes.registry import published
from accel.token_cache import TokenCache

CACHES = {
    "dual": TokenCache(),
    "prefix": TokenCache(feed="suffix"),
    "none": None,
}


@published(frames=False, text=True)
def fast_dllm(
    geometry: Geometry,
    *,
    cache: str = "dual",
    threshold: float | None = 0.9,
    factor: float | None = None,
    block_length: int = 32,
) -> Plan:
    """Fast-dLLM: keys and values of a block's first step serve the rest of it, and every step
    commits all tokens it is sure of.

    cache: `dual` keeps those before and after the block, `prefix` those before it, `none` nothing.
    threshold: commit what has at least this probability; or by the `factor` rule; both None: one
    token a step (arXiv 2505.22618: dual, threshold 0.9, blocks of 32).
    """
    if cache not in CACHES:
        raise ValueError(f"cache {cache!r} is unknown; {nearest(cache, CACHES)}")
    rule, bound = ("quota", None) if threshold is None else ("threshold", threshold)
    if factor is not None:
        rule, bound = "factor", factor
    return Plan.uniform(
        "fast_dllm",
        geometry,
        DENSE,
        cache=CACHES[cache],
        decoding=Decoding(block_length=block_length, rule=rule, bound=bound),
        provenance={"recipe": "fast_dllm", "cache": cache, "rule": rule, "bound": bound},
    )
