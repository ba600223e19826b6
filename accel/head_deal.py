"""Which rank computes which heads, so that no rank waits long for the slowest.

Heads keep different shares of their blocks, and a rank takes as long as its heads together. Shards
of neighbouring heads, one after another, leave the slowest rank at 1.35 to 1.5 times the mean in
the literature. Here the dearest head goes first, each to the rank with least to do (Graham's
longest processing time), and then heads of the fullest rank are exchanged for others for as long as
that lowers it. Ranks may end up with unequally many heads. A head is never cut: where one is dearer
than the mean of the ranks, its rank is the slowest, whatever the others do.

Every rank computes the deal for itself: the same costs give the same deal, without a word between
them.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise

__all__ = ["LEAST", "Heads", "contiguous", "deal", "imbalance"]

Heads = tuple[tuple[int, ...], ...]  # by rank, ascending

# Of the cost of a dense head: one that keeps next to nothing has still to be sent there and back
LEAST = 0.02
CLOSE = 1e-9  # what rounding may make of equal loads
GOOD = 1.05  # slowest over mean, from where exchanges of two heads are not worth the search


def deal(costs: Sequence[float], ranks: int, loads: Sequence[float] = ()) -> Heads:
    """The heads of every rank.

    costs: of every head, 1 for a dense one; loads: of every rank, what it has to do besides.
    """
    if ranks < 1 or any(not cost >= 0 for cost in costs) or len(loads) not in (0, ranks):
        raise ValueError(f"costs are numbers from 0 for at least one rank, got {costs!r:.200}")
    filled = list(loads) or [0.0] * ranks
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    for head in sorted(range(len(costs)), key=lambda h: (-costs[h], h)):
        rank = min(range(ranks), key=lambda r: (round(filled[r] / CLOSE), len(dealt[r]), r))
        dealt[rank].append(head)
        filled[rank] += costs[head]
    _improve(dealt, filled, costs)
    return tuple(tuple(sorted(heads)) for heads in dealt)


def contiguous(heads: int, ranks: int) -> Heads:
    """Neighbouring heads for every rank; the first ranks have one more where they do not divide."""
    bounds = [r * (heads // ranks) + min(r, heads % ranks) for r in range(ranks + 1)]
    return tuple(tuple(range(a, b)) for a, b in pairwise(bounds))


def imbalance(costs: Sequence[float], dealt: Sequence[Sequence[int]]) -> float:
    """The load of the slowest rank over the mean; 1 where there is nothing to do."""
    loads = [_sum(heads, costs) for heads in dealt]
    return max(loads) * len(loads) / sum(loads) if sum(loads) else 1.0


def _improve(dealt: list[list[int]], filled: list[float], costs: Sequence[float]) -> None:
    """Exchange heads of the fullest rank while that lowers it: one for one or none, then two."""
    mean, most = sum(filled) / len(filled), 1
    for _ in range(16 * len(costs)):
        full = max(range(len(dealt)), key=lambda r: (filled[r], -r))
        best, found = filled[full] - CLOSE, None
        for other in range(len(dealt)):
            back = [(group, _sum(group, costs)) for group in _groups(dealt[other], most)]
            for given in _groups(dealt[full], most):
                turn = _sum(given, costs)
                if other == full or filled[full] - turn >= best:
                    continue
                for taken, cost in back:
                    worst = max(filled[full] - turn + cost, filled[other] + turn - cost)
                    if worst < best - CLOSE:
                        best, found = worst, (other, given, taken)
        if found is not None:
            other, given, taken = found
            turn = _sum(given, costs) - _sum(taken, costs)
            filled[full], filled[other] = filled[full] - turn, filled[other] + turn
            dealt[full] = [*(h for h in dealt[full] if h not in given), *taken]
            dealt[other] = [*(h for h in dealt[other] if h not in taken), *given]
        elif most == 1 and filled[full] > GOOD * mean:
            most = 2
        else:
            return


def _groups(heads: Sequence[int], most: int) -> Iterator[tuple[int, ...]]:
    for size in range(most + 1):
        yield from combinations(heads, size)


def _sum(heads: Sequence[int], costs: Sequence[float]) -> float:
    return sum((costs[head] for head in heads), 0.0)
