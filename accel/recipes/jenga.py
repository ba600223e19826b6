"""Jenga (arXiv 2505.16864)."""

from accel.choice import Choice
from accel.estimators import Joined, PooledMass
from accel.geometry import Geometry
from accel.pattern import Window
from accel.plan import Plan
from accel.recipes.registry import published
from accel.schedule import Schedule


@published
def jenga(
    geometry: Geometry,
    *,
    keeps: tuple[float, ...] = (0.25, 0.15),
    tau: float = 0.3,
    dense_start: float = 0.0,
    bands: tuple[float, ...] = (0.5,),
    refresh: tuple[float, ...] = (0.25, 0.75),
    block: tuple[int, int] = (128, 128),
) -> Plan:
    """Jenga's AttenCarve: pooled blocks united with their neighbours, in Hilbert order.

    Per query block the larger of `keep` of the visual blocks and of the fewest that reach `tau` of
    the pooled softmax, and the blocks that hold one of a token's 26 neighbours in space and time.
    Blocks of 128 tokens are compact, for the sequence runs along a Hilbert curve. `keeps`: for each
    band of the schedule; the method drops 0.75 in the first half and 0.85 in the second, and starts
    sparse (Jenga base, NeurIPS 2025).

    What departs: its first half runs at a lower resolution, and it leaves out steps, which are no
    matters of attention. It orders the tokens once for the whole network, here the kernel does in
    every layer, and it selects in every call, here once per band and at `refresh`.
    """
    near = Window(1, 1, 1)
    choices = [
        Choice(Joined(PooledMass(tau=tau, least=keep), near), order="hilbert") for keep in keeps
    ]
    return Plan.of(
        "jenga",
        geometry,
        {site.name: tuple((c,) * site.heads for c in choices) for site in geometry.sites},
        schedule=Schedule(dense_start=dense_start, bands=bands, refresh=refresh),
        block=block,
        provenance={"recipe": "jenga", "keeps": list(keeps)},
    )
