"""PAROAttention (arXiv 2506.16054)."""

from collections.abc import Sequence
from math import ceil

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from accel.blocking import Blocking
from accel.choice import Choice
from accel.errors import PlanError
from accel.geometry import Geometry, Site
from accel.order import AXIS_ORDERS
from accel.pattern_blocks import Blocks
from accel.plan import Plan
from accel.profile import Key, Profile
from accel.ranking import competing_blocks
from accel.recipes.choosing import by_site, even_bands
from accel.recipes.registry import Demand, published
from accel.schedule import Schedule


def _demand(
    _: Geometry, weight: float, bands: int, dense_start: float, block: tuple[int, int]
) -> Demand:
    if not 0 <= weight <= 1:
        raise PlanError(f"weight is a number in [0, 1], got {weight!r}")
    return Demand(
        candidates=(),
        schedule=Schedule(dense_start=dense_start, bands=even_bands(bands, dense_start)),
        block=block,
        orders=AXIS_ORDERS,
        mass=weight,
    )


@published(demand=_demand)
def paro(
    geometry: Geometry,
    profile: Profile,
    *,
    density: float = 0.5,
    weight: float = 0.5,
    bands: int = 2,
    precision: str = "full",
    dense_start: float = 0.0,
    block: tuple[int, int] = (64, 64),
) -> Plan:
    """PAROAttention: one of six axis orders per head, and in it a fixed mask for half of the run.

    A head's order is that in which its map is sparse by whole blocks and coherent inside them
    (`accel.map_statistics.best_orders`; `weight` is the share of sparsity, not told in the paper).
    Its mask in a band has the `density` of blocks with the most softmax mass in the calibration;
    0.5, 0.3 and 0.2 are the paper's, in blocks of 64 x 64. No step is dense. `precision="int8"` is
    its 8-bit attention (arXiv 2506.16054).

    What departs: the paper gives every step of the first half of the run a mask of its own, and one
    to the second half; here each of `bands` equal parts has one. Every row of blocks keeps its
    heaviest one, so that no query is left without keys.
    """
    if type(density) not in (int, float) or not 0 < density <= 1:
        raise PlanError(f"density is a fraction in (0, 1], got {density!r}")
    layout = profile.layout
    if layout is None:
        raise PlanError("the profile does not know its layout; calibrate again")

    def pick(key: Key, site: Site) -> Sequence[Choice]:
        choices = []
        for head, order in enumerate(profile.mass_orders[site.name]):
            blocking = Blocking(layout, order, block)
            keep = _heaviest(profile.masses[key][head], density, blocking)
            choices.append(Choice(Blocks.of(keep, blocking), order=order))
        return choices

    return Plan.of(
        "paro",
        geometry,
        by_site(geometry, bands, pick),
        schedule=Schedule(dense_start=dense_start, bands=even_bands(bands, dense_start)),
        block=block,
        precision=precision,
        provenance={"recipe": "paro", "density": density, "weight": weight},
    )


def _heaviest(
    mass: Float[Tensor, "q_blocks kv_blocks"], density: float, blocking: Blocking
) -> Bool[Tensor, "q_blocks kv_blocks"]:
    """The heaviest blocks of the whole map, and of every row; text and padding take no part."""
    apart = blocking.text_blocks(mass.device)[0] | blocking.pad_blocks(mass.device)[0]
    allowed = competing_blocks(mass, blocking) & ~apart[:, None]
    mass = mass.masked_fill(~allowed, -1)
    count = ceil(density * int(allowed.sum()) - 1e-6)
    keep = torch.zeros_like(allowed)
    keep.view(-1)[mass.flatten().argsort(descending=True, stable=True)[:count]] = True
    keep.scatter_(1, mass.argmax(1, keepdim=True), True)
    return keep & allowed
