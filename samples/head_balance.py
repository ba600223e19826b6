"""How evenly heads are dealt to ranks by cost, against shards of neighbouring heads.

python samples/head_balance.py

The load of the slowest rank over the mean, for sites whose heads keep from 5% of their blocks to
all: the mean over 1000 sites, and the worst of them.
"""

import random

from accel.head_deal import contiguous, deal, imbalance

SITES = 1000
SHAPES = ((12, 2), (12, 4), (24, 2), (24, 4), (24, 8), (40, 2), (40, 4), (40, 8))


def main() -> None:
    generator = random.Random(0)
    print("| heads | ranks | neighbours, mean | worst | dealt, mean | worst | over 1.1 |")
    print("|---|---|---|---|---|---|---|")
    for heads, ranks in SHAPES:
        dealt, neighbours = [], []
        for _ in range(SITES):
            keeps = [generator.uniform(0.05, 1.0) for _ in range(heads)]
            dealt.append(imbalance(keeps, deal(keeps, ranks)))
            neighbours.append(imbalance(keeps, contiguous(heads, ranks)))
        columns = [f"{f(x):.2f}" for x in (neighbours, dealt) for f in (mean, max)]
        over = sum(x > 1.1 for x in dealt) / SITES
        print(f"| {heads} | {ranks} | {' | '.join(columns)} | {over:.1%} |")


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
