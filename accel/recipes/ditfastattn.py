"""DiTFastAttnV2 (arXiv 2503.22796)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from accel.choice import DENSE, Choice
from accel.geometry import Geometry, Site
from accel.knapsack import multiple_choice
from accel.pattern import Band, Share
from accel.plan import Plan
from accel.profile import Key, Profile
from accel.recipes.choosing import by_site, even_bands
from accel.recipes.registry import Demand, published
from accel.schedule import Schedule


def _demand(
    geometry: Geometry,
    delta: float,
    parts: tuple[int, ...],
    bands: int,
    dense_start: float,
    block: tuple[int, int],
) -> Demand:
    arrows = [Band(1 / (2 * part)) for part in parts]
    return Demand(
        candidates=(
            *(Choice(arrow) for arrow in arrows),
            *(Choice(arrow, order="hwt") for arrow in arrows),
            Choice(Share("step")),
            Choice(Share("branch")),
        ),
        schedule=Schedule(dense_start=dense_start, bands=even_bands(bands, dense_start)),
        block=block,
        # the errors of the heads add up to delta, and each is a part 1 / heads of its site
        tolerance=delta / geometry.sites[0].heads,
    )


@published(demand=_demand)
def ditfastattn(
    geometry: Geometry,
    profile: Profile,
    *,
    delta: float = 0.2,
    cap: float = 1.5,
    parts: tuple[int, ...] = (8, 16, 32),
    bands: int = 9,
    dense_start: float = 0.02,
    block: tuple[int, int] = (128, 64),
) -> Plan:
    """DiTFastAttnV2: per layer and step band the most saving within a limit of error.

    Candidates of a head are arrows (a window of a part 1/8, 1/16 or 1/32 of the tokens, text in
    full), the same with the places of all frames side by side, its output of the step before, and
    that of the other branch of guidance. Of each layer and band an integer programme takes those
    that leave out the most blocks, while the relative squared errors of its heads add up to at most
    `delta`, and none has one of `cap * delta / heads` or more. The first step is dense, and the
    calibration is progressive (arXiv 2503.22796; sharing over branches is of arXiv 2406.08552).

    What departs: saving is counted in blocks, the estimate of the paper's code beside timed
    latencies; the decision is made in `bands` equal parts of the run instead of every step, so an
    output that is shared stays for a whole band; and the calibration goes on with the cheapest
    harmless candidates, not with the programme's solution. delta is 0.2 to 1.0 in the paper, by
    model.
    """

    def pick(key: Key, site: Site) -> Sequence[Choice]:
        errors = _with_full(profile.head_errors[key].T, 0.0)
        saved = 1 - _with_full(profile.keeps[key].T, 1.0)
        allowed = errors < cap * delta / site.heads
        allowed[:, 0] = True
        taken = multiple_choice(saved, errors, delta, allowed)
        return [DENSE if i == 0 else profile.candidates[i - 1] for i in taken]

    return Plan.of(
        "ditfastattn",
        geometry,
        by_site(geometry, bands, pick),
        schedule=Schedule(dense_start=dense_start, bands=even_bands(bands, dense_start)),
        block=block,
        provenance={"recipe": "ditfastattn", "delta": delta, "cap": cap, "parts": list(parts)},
    )


def _with_full(values: Tensor, of_full: float) -> Tensor:
    """[heads, 1 + candidates]: full attention before the candidates."""
    return torch.cat([torch.full_like(values[:, :1], of_full), values], 1)
