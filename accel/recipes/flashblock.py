"""FlashBlock (arXiv 2602.05305)."""

from accel.choice import DENSE
from accel.decoding import Decoding
from accel.geometry import Geometry
from accel.plan import Plan
from accel.recipes.registry import published
from accel.token_cache import TokenCache


@published(frames=False, text=True)
def flashblock(geometry: Geometry, *, delay: int = 0, block_length: int = 32) -> Plan:
    """FlashBlock: what a block's tokens see outside of it is computed once, in its first step, and
    merged by log-sum-exp with what they see of each other (arXiv 2602.05305).
    """
    return Plan.uniform(
        "flashblock",
        geometry,
        DENSE,
        cache=TokenCache(external="frozen", delay=delay),
        decoding=Decoding(block_length=block_length),
        provenance={"recipe": "flashblock", "delay": delay},
    )
