"""What plans cost: the seconds of a generation, from latency tables and a timed dense one.

A table (`accel.cost_table`) holds prices as ratios to the host's dense attention. The prices of
heads add up, and so do those of steps. A generation takes

    outside + steps * rest + the sum over steps and sites of  dense seconds * ratio,  + masks

where outside, rest (of a step, what is not attention) and the seconds of dense attention are those
of a dense generation (`accel.baseline`), and a line from predicted to measured seconds is laid over
it once some were measured (`accel.cost_calibration`). A selection that looks at q and k is paid in
every branch at every refresh, a static mask once in a run.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from accel.baseline import Baseline
from accel.choice import Choice
from accel.cost_choice import keep_of, looks_price, select_price
from accel.cost_measure import measure
from accel.cost_run import run_costs
from accel.cost_table import KEEPS, CostTable, Price, Shape
from accel.plan import Plan

__all__ = [
    "KEEPS",
    "Baseline",
    "CostTable",
    "Price",
    "Shape",
    "cost_sentence",
    "dense_price",
    "dense_speedup",
    "fastest_dense",
    "keep_of",
    "looks_price",
    "measure",
    "predict",
    "price",
    "select_price",
]


def predict(
    plan: Plan,
    tables: Mapping[str, CostTable],
    baseline: Baseline,
    *,
    steps: int | None = None,
    keeps: Mapping[Choice, float] | None = None,
) -> float | None:
    """Seconds of a generation with `plan`; None where a keep or a selection's price is not known.

    tables: one for each precision of the plan. steps: of the generation, unless as many as the
    baseline has. keeps: of choices, where they are known already; those that only the call can
    tell (see `keep_of`) have to be among them, as a profile has seen them.
    """
    costs = run_costs(plan, tables, baseline, steps, keeps)
    return None if costs is None else costs.seconds


def price(
    plan: Plan,
    tables: Mapping[str, CostTable],
    baseline: Baseline,
    *,
    steps: int | None = None,
    keeps: Mapping[Choice, float] | None = None,
) -> Plan:
    """`plan` with what is predicted of it in `expected`; the arguments are those of `predict`.

    A plan with a keep or a selection's price that is not known is returned as it is. In `expected`:
    seconds, and dense_seconds of the host's own dense generation; speedup, their quotient;
    attention_ratio, by site and band, of a sparse call with its part in the making of masks;
    attention_share, of a dense generation; dense_ratio, of dense calls by accel's own kernel in the
    plan's block, by precision; recipe_ratio, the same in the block of dense recipes; calibrated,
    false where prices come from a data sheet; cost, what the prediction is worth in words; and what
    it is for.
    """
    costs = run_costs(plan, tables, baseline, steps, keeps)
    if costs is None:
        return plan
    table = tables[plan.precisions[0]]
    own = {word: found.own_dense for word, found in tables.items()}
    recipes = {word: found.value for word, found in table.dense.items()}
    expected = {
        **plan.expected,
        "attention_ratio": costs.ratios,
        "attention_share": costs.share,
        "dense_ratio": {**recipes, **own},
        "recipe_ratio": {**own, **recipes},
        "seconds": costs.seconds,
        "dense_seconds": costs.dense_seconds,
        "speedup": costs.dense_seconds / costs.seconds,
        "steps": costs.steps,
        "device": table.shape.device,
        "dtype": table.shape.dtype,
        "tokens": table.shape.tokens,
        "calibrated": "roofline" not in (table.source, baseline.source),
        "cost": _worth(table, baseline),
    }
    return replace(plan, expected=expected)


def _worth(table: CostTable, baseline: Baseline) -> str:
    where = f" {table.origin.device}" if table.origin.device else ""
    if "roofline" in (table.source, baseline.source):
        return f"uncalibrated: computed from the data sheet of{where or ' the device'}"
    line = f"; {baseline.calibration}" if baseline.calibration is not None else ""
    return f"measured on{where or ' this device'}{line}"


def cost_sentence(expected: Mapping[str, Any]) -> str:
    """What the prediction of a priced plan is worth, in words; "" for a plan without."""
    return str(expected.get("cost", ""))


def dense_speedup(expected: Mapping[str, Any], precision: str) -> float | None:
    """What a priced plan expects of the dense recipe of `precision`: its speed-up over the host's
    dense. None for a precision that was not measured, and for a plan without a price.
    """
    ratios = expected.get("recipe_ratio") or expected.get("dense_ratio") or {}
    ratio, share = ratios.get(precision), expected.get("attention_share")
    return None if ratio is None or share is None else 1 / (1 - share * (1 - ratio))


def dense_price(table: CostTable) -> float:
    """Price of a dense call: 1 by the host, or less by accel's own kernel where that is faster.

    It has to be faster by a twentieth: below that, noise would decide.
    """
    own = table.own_dense
    return own if own < 0.95 else 1.0


def fastest_dense(plan: Plan, tables: Mapping[str, CostTable]) -> Plan:
    """`plan`, with its dense calls on accel's own kernel where that beats the host's attention.

    With several precisions it has to in each of them.
    """
    own = all(dense_price(tables[word]) < 1 for word in plan.precisions)
    return replace(plan, dense="kernel") if own else plan
