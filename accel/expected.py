"""What was predicted or measured of a plan when it was made: names and values that may be read."""

from collections.abc import Mapping
from typing import Any

from accel.errors import PlanError
from accel.untrusted import finite, typed


def check_expected(expected: Mapping[str, Any], n_bands: int) -> None:
    """Refuse, naming the entry, what would be misread; entries that nobody reads may be anything.

    dense_ratio: precision -> price of a dense call by accel's own kernel; recipe_ratio: precision
    -> price of a generation that is dense by it; speedup, measured_speedup, seconds, dense_seconds:
    of a whole generation; attention_share: part of a dense generation spent in
    the sites; attention_ratio: site -> price of a sparse call in every band; crossover: tokens
    below which sparse calls are no gain on a device, in a dtype.
    """
    ratios = typed("expected.dense_ratio", expected.get("dense_ratio", {}), dict)
    numbers = {f"dense_ratio[{word!r}]": value for word, value in ratios.items()}
    recipes = typed("expected.recipe_ratio", expected.get("recipe_ratio", {}), dict)
    numbers |= {f"recipe_ratio[{word!r}]": value for word, value in recipes.items()}
    for name in ("speedup", "measured_speedup", "seconds", "dense_seconds"):
        numbers[name] = expected.get(name, 1.0)
    for name, value in numbers.items():
        if not finite(value) or value <= 0:
            raise PlanError(
                f"expected.{name} must be a number above 0, got {value!r:.80}; leave it out to"
                " predict nothing"
            )
    crossover = typed("expected.crossover", expected.get("crossover", {}), dict)
    if crossover and (type(crossover.get("tokens")) is not int or crossover["tokens"] < 0):
        raise PlanError(
            f"expected.crossover.tokens must be a number of tokens, got"
            f" {crossover.get('tokens')!r:.80}; leave it out to predict nothing"
        )
    share = expected.get("attention_share", 0.0)
    if not finite(share) or not 0 <= share <= 1:
        raise PlanError(f"expected.attention_share must be in [0, 1], got {share!r:.80}")
    if ratios and "attention_share" not in expected:
        raise PlanError("expected.dense_ratio needs expected.attention_share beside it")
    ratios = typed("expected.attention_ratio", expected.get("attention_ratio", {}), dict)
    for site, bands in ratios.items():
        if not isinstance(bands, list) or not all(finite(r) and r >= 0 for r in bands):
            raise PlanError(
                f"expected.attention_ratio[{site!r}] must be numbers from 0, got {bands!r:.80};"
                " leave it out to predict nothing"
            )
        if len(bands) != n_bands:
            raise PlanError(
                f"expected.attention_ratio[{site!r}] has {len(bands)} bands, the schedule has"
                f" {n_bands}"
            )
