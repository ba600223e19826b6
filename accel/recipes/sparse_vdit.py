"""Sparse-vDiT (arXiv 2506.03065)."""

from collections.abc import Sequence

from accel.choice import DENSE, Choice
from accel.geometry import Geometry, Site
from accel.pattern import Band, Skip, Stripe
from accel.plan import Plan
from accel.profile import Key, Profile
from accel.recipes.choosing import by_site, even_bands
from accel.recipes.registry import Demand, published
from accel.schedule import Schedule


def _demand(
    _: Geometry,
    bands: int,
    width: float,
    stripe_every: int,
    dense_start: float,
    block: tuple[int, int],
) -> Demand:
    return Demand(
        candidates=(
            Choice(Skip()),
            Choice(Band(width)),
            Choice(Band(width), order="hwt"),
            Choice(Stripe(axis="t", every=stripe_every)),
        ),
        schedule=Schedule(dense_start=dense_start, bands=even_bands(bands, dense_start)),
        block=block,
    )


@published(demand=_demand)
def sparse_vdit(
    geometry: Geometry,
    profile: Profile,
    *,
    weight: float = 0.5,
    limit: float = 1.0,
    unit: float = 0.02,
    bands: int = 5,
    width: float = 0.1,
    stripe_every: int = 4,
    dense_start: float = 0.0,
    block: tuple[int, int] = (128, 64),
) -> Plan:
    """Sparse-vDiT: per layer, step band and head one of five modes, by error and blocks computed.

    Full, skip, diagonal (a band), multi-diagonal (the same band with the places of all frames side
    by side) and vertical stripe (whole key frames). The loss of a mode is

        error / unit + weight * keep;

    the least one is taken, and where even that exceeds `limit` the head is full. lambda is 0.5 and
    epsilon 1 in the paper (arXiv 2506.03065), with no dense steps.

    What departs: the paper's error is a mean square, which has the scale of the activations. Here
    it is the relative squared error of the site's output times the site's heads, so that leaving
    out a head of average size costs 1, and `unit` says how much of that counts as an error of 1:
    with epsilon 1 a site is wrong by at most about `unit`. The paper does not tell its widths
    (`width`, of the sequence to either side) and key columns (the first of `stripe_every` frames),
    and it decides for every step: here in `bands` equal parts of the run.
    """

    def pick(key: Key, site: Site) -> Sequence[Choice]:
        loss = profile.errors[key] * (site.heads / unit) + weight * profile.keeps[key]
        least, mode = loss.min(0)
        return [
            DENSE if value > limit else profile.candidates[i]
            for value, i in zip(least.tolist(), mode.tolist(), strict=True)
        ]

    return Plan.of(
        "sparse_vdit",
        geometry,
        by_site(geometry, bands, pick),
        schedule=Schedule(dense_start=dense_start, bands=even_bands(bands, dense_start)),
        block=block,
        provenance={
            "recipe": "sparse_vdit",
            "lambda": weight,
            "epsilon": limit,
            "unit": unit,
            "width": width,
            "stripe_every": stripe_every,
        },
    )
