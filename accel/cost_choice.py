"""The price of one choice, and of the heads of one call, by a latency table."""

from collections.abc import Mapping, Sequence
from statistics import mean

import torch

from accel.blocking import Blocking
from accel.choice import Alternatives, Choice
from accel.cost_table import CostTable
from accel.estimators import Estimator
from accel.layout import Layout
from accel.masks import static_keep
from accel.order import parse_order
from accel.pattern import Share, Skip
from accel.pattern_union import Union
from accel.ranking import top_blocks
from accel.schedule import Phase

__all__ = ["Heads", "keep_of", "looks", "looks_price", "select_price", "site_price", "static_price"]

Heads = tuple[Choice, ...]
# options of alternatives that keep so much more than one another at most have one price
ALIKE = 1.25


def keep_of(choice: Choice, layout: Layout, block: tuple[int, int]) -> float | None:
    """The fraction of blocks that a choice will compute; None where only the call can tell.

    A share is rounded up to whole blocks of a row, and text comes on top, as estimators have it.
    Of alternatives it is the mean of the options, where those are about the same.
    """
    select = choice.select
    if isinstance(select, Alternatives):
        keeps = [keep_of(option, layout, block) for option in select.options]
        known = [keep for keep in keeps if keep is not None]
        alike = len(known) == len(keeps) and max(known) <= ALIKE * min(known)
        return mean(known) if alike else None
    if isinstance(select, Estimator):
        share = getattr(select, "keep", None)
        if share is None:
            return None
        blocking = Blocking(layout, choice.order, block)
        scores = torch.zeros(1, 1, blocking.q_blocks, blocking.kv_blocks)
        return float(top_blocks(scores, share, blocking).float().mean())
    return float(static_keep(choice, layout, block, torch.device("cpu")).float().mean())


def select_price(choice: Choice, table: CostTable) -> float | None:
    """Price of a first selection for all heads by the choice's estimator; 0 for a pattern, None for
    an estimator that the table does not have: nobody knows what it takes.
    """
    if not isinstance(choice.select, Estimator):
        return 0.0
    found = table.select.get(choice.select.work)
    return None if found is None else found.value


def looks_price(choice: Choice, table: CostTable, looks: int) -> float | None:
    """Price of so many masks of a site whose heads all have `choice`, in each branch; None where
    that of a selection is not known.

    A first selection finds the log-sum-exp of the rows, where the estimator does, and later ones
    use it. Of a pattern this is the look at its recall alone: its mask is made once for all sites.
    """
    if not isinstance(choice.select, Estimator) or not looks:
        return table.recall.value * looks
    first = select_price(choice, table)
    if first is None:
        return None
    later = table.again[choice.select.work].value if _finds_lse(choice, table) else first
    return (table.mask.value + table.recall.value) * looks + first + later * (looks - 1)


def looks(bands: Sequence[Heads], phases: Sequence[Phase], table: CostTable) -> list[float] | None:
    """Price of the masks of one site by band, in a run of these phases; static ones not included.
    None where the price of a selection is not known.

    As the run-time does it: an online mask is made where the choices or the refresh point are not
    those of the last one, and its recall is looked at once in every band and refresh point.
    """
    prices = [0.0] * len(bands)
    made: tuple[Heads, int] | None = None
    sampled: set[tuple[int, int]] = set()
    known: set[int] = set()  # heads whose log-sum-exp an earlier selection has found
    for phase in phases:
        if phase.band is None or all(c.dense for c in bands[phase.band]):
            continue
        heads = bands[phase.band]
        if (phase.band, phase.generation) not in sampled:
            sampled.add((phase.band, phase.generation))
            prices[phase.band] += table.recall.value
        if made == (heads, phase.generation) or not any(c.online for c in heads):
            continue
        made = heads, phase.generation
        prices[phase.band] += table.mask.value
        for choice in dict.fromkeys(c for c in heads if c.online):
            group = {head for head, c in enumerate(heads) if c == choice}
            price = select_price(choice, table)
            if price is None:
                return None
            if _finds_lse(choice, table):
                if group <= known:
                    price = table.again[choice.select.work].value  # type: ignore[union-attr]
                known |= group
            prices[phase.band] += price * len(group) / len(heads)
    return prices


def static_price(heads: Heads, table: CostTable) -> float:
    """Price of the mask of heads whose patterns are all known before the run, made once in it."""
    terms = sum(_terms(choice.select) for choice in dict.fromkeys(heads))
    return table.mask.value + terms * table.term.value


def site_price(
    heads: Heads,
    keeps: Mapping[Choice, float],
    table: CostTable,
    dense: float,
    shared: Mapping[Choice, float],
) -> float:
    """Price of one call; without its mask. It is the mean over heads.

    dense: of a call whose heads are all dense; beside sparse heads a dense one is a row of full
    counts in the kernel. shared: of heads that share an output, the part of calls in which there is
    none to share, where they are dense. The kernel goes by an order of every head or by none, so
    one that is not natural is paid by all heads.
    """
    if all(c.dense for c in heads):
        return dense
    ordered = any(not parse_order(order).is_natural for c in heads for order, _ in _ways(c))
    return mean(_head_price(c, keeps[c], table, ordered, shared.get(c, 0.0)) for c in heads)


def _head_price(
    choice: Choice, keep: float, table: CostTable, ordered: bool, shared: float
) -> float:
    if isinstance(choice.select, Share):
        return shared * table.price(1.0, "drop", ordered)
    return mean(
        0.0 if keep == 0 and rest == "drop" else table.price(keep, rest, ordered)
        for _, rest in _ways(choice)
    )


def _ways(choice: Choice) -> list[tuple[str, str]]:
    """Order and rest of a choice, or of the options of one that takes one of several."""
    options = choice.select.options if isinstance(choice.select, Alternatives) else (choice,)
    return [(option.order, option.rest) for option in options]


def _finds_lse(choice: Choice, table: CostTable) -> bool:
    return isinstance(choice.select, Estimator) and choice.select.work in table.again


def _terms(select: object) -> int:
    """Terms of a pattern, those of radial and of others with several counted as one."""
    if isinstance(select, Union):
        return sum(_terms(part) for part in select.parts)
    return 0 if isinstance(select, Skip) else 1
