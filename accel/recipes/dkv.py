"""dKV-Cache (arXiv 2505.15781)."""

from accel.choice import DENSE
from accel.errors import nearest
from accel.geometry import Geometry
from accel.plan import Plan
from accel.recipes.registry import published
from accel.token_cache import TokenCache

FEEDS = {"decode": "undecided", "prefill": "generated"}


@published(frames=False, text=True)
def dkv(geometry: Geometry, *, variant: str = "decode", refresh: int = 8) -> Plan:
    """dKV-Cache: the keys and values of a token are kept one step after it was committed, when they
    have changed most.

    `decode` feeds what was masked before the last step, and all tokens in the first two steps and
    every `refresh` steps (8 for LLaDA, 4 for Dream); `prefill` keeps the prompt alone and feeds all
    that is generated (arXiv 2505.15781).
    """
    if variant not in FEEDS:
        raise ValueError(f"variant {variant!r} is unknown; {nearest(variant, FEEDS)}")
    return Plan.uniform(
        "dkv",
        geometry,
        DENSE,
        cache=TokenCache(feed=FEEDS[variant], delay=1, refresh=refresh, blocks=None),
        provenance={"recipe": "dkv", "variant": variant, "refresh": refresh},
    )
