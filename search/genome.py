"""What a search may turn: a few genes for the whole model, from which every head's choice follows.

One gene for every step band and group of layers says how dear time is there: level 0 is dense, and
the highest level takes whatever is fastest. Heads are not in the genome; each is resolved by what
the calibration saw of it (`accel.search.resolve`). Further genes say when sparse attention begins
and, by group of layers, in what arithmetic it computes. About a hundred genes are what an
evolutionary search of some dozens of evaluations can move, so layers are grouped as they need be.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from accel.errors import AccelError

MAX_GENES = 100
Genome = tuple[int, ...]


class GeneNumbers:
    """Genomes as numbers of values, by the genes' sizes."""

    __slots__ = ()

    @property
    def sizes(self) -> dict[str, int]:
        """The name of every gene and how many values it has, in the order of a genome."""
        raise NotImplementedError

    def to_params(self, genome: Genome) -> dict[str, int]:
        """By gene name, as a study has it."""
        return dict(zip(self.sizes, genome, strict=True))

    def from_params(self, params: Mapping[str, int]) -> Genome:
        return tuple(params[name] for name in self.sizes)

    def random(self, rng: Random) -> Genome:
        return tuple(rng.randrange(size) for size in self.sizes.values())


class ListedGenes(GeneNumbers):
    """Genes whose values stand in an order in which neighbours are alike."""

    __slots__ = ()

    def child(self, one: Genome, other: Genome, rng: Random) -> Genome:
        """Uniform crossover of two parents; then one gene at least takes a neighbouring
        value, or every other time any other.
        """
        sizes = list(self.sizes.values())
        mixed = [rng.choice(pair) for pair in zip(one, other, strict=True)]
        moved = {i for i in range(len(sizes)) if rng.random() < 1 / len(sizes)}
        for i in moved or {rng.randrange(len(sizes))}:
            near = rng.random() < 0.5
            others = [n for n in range(sizes[i]) if n != mixed[i]]
            mixed[i] = rng.choice([n for n in others if not near or abs(n - mixed[i]) == 1])
        return tuple(mixed)


@dataclass(frozen=True, slots=True)
class Genes(GeneNumbers):
    """The genes of one search.

    groups: names of the sites of each group of layers. dense_starts: fractions of a run after which
    sparse attention may begin. precisions: what arithmetic sparse attention may use. A gene with
    one value is none.
    """

    bands: int
    groups: tuple[tuple[str, ...], ...]
    levels: int
    dense_starts: tuple[float, ...]
    precisions: tuple[str, ...]

    @classmethod
    def of(
        cls,
        sites: Sequence[str],
        bands: int,
        *,
        levels: int,
        dense_starts: Sequence[float],
        precisions: Sequence[str],
    ) -> "Genes":
        """Genes for a model, with as many groups of neighbouring layers as `MAX_GENES` allow."""
        per_group = bands + (len(precisions) > 1)
        groups = min(len(sites), (MAX_GENES - 1) // per_group)
        if groups < 1:
            raise AccelError(
                f"a search over {bands} step bands has more than {MAX_GENES} genes; take fewer"
                " points in schedule.bands"
            )
        ends = [round(i * len(sites) / groups) for i in range(groups + 1)]
        parts = tuple(tuple(sites[a:b]) for a, b in pairwise(ends))
        return cls(bands, parts, levels, tuple(dense_starts), tuple(precisions))

    @property
    def sizes(self) -> dict[str, int]:
        """The name of every gene and how many values it has, in the order of a genome."""
        found = {
            f"level.band{band}.group{group}": self.levels
            for band in range(self.bands)
            for group in range(len(self.groups))
        }
        if len(self.precisions) > 1:
            found |= {f"precision.group{g}": len(self.precisions) for g in range(len(self.groups))}
        if len(self.dense_starts) > 1:
            found["dense_start"] = len(self.dense_starts)
        return found

    @property
    def count(self) -> int:
        """How many different genomes there are."""
        number = 1
        for size in self.sizes.values():
            number *= size
        return number

    def uniform(self, level: int, dense_start: int = 0, precision: int = 0) -> Genome:
        """The genome with one level everywhere."""
        values = {"level": level, "precision": precision, "dense_start": dense_start}
        return tuple(values[name.split(".")[0]] for name in self.sizes)

    def level(self, genome: Genome, band: int, group: int) -> int:
        return genome[band * len(self.groups) + group]

    def with_levels(self, genome: Genome, change: int) -> Genome:
        """Every level moved by `change`, as far as there are levels."""
        levels = self.bands * len(self.groups)
        moved = (min(max(x + change, 0), self.levels - 1) for x in genome[:levels])
        return (*moved, *genome[levels:])

    def precision(self, genome: Genome, group: int) -> str:
        if len(self.precisions) == 1:
            return self.precisions[0]
        return self.precisions[genome[self.bands * len(self.groups) + group]]

    def dense_start(self, genome: Genome) -> float:
        return self.dense_starts[genome[-1] if len(self.dense_starts) > 1 else 0]

    def child(self, one: Genome, other: Genome, rng: Random) -> Genome:
        """Uniform crossover of two parents, then a mutation.

        Levels are ordered, and what is worth changing is how they stand to each other: all levels
        of one band, of one group of layers, or a single one, move by 1, 2, 3 … with halving
        probability, and every other time others move by as much the other way, so that the time
        spent stays about the same. Any other gene is drawn anew with probability 1 / genes.
        """
        mixed = [rng.choice(pair) for pair in zip(one, other, strict=True)]
        step = 1
        while step < self.levels and rng.random() < 0.5:
            step += 1
        up, down = self._some_levels(rng), self._some_levels(rng)
        if rng.random() < 0.5:  # one way alone
            up, down = rng.choice(((up, set()), (set(), down)))
        for i in up ^ down:
            moved = mixed[i] + (step if i in up else -step)
            mixed[i] = min(max(moved, 0), self.levels - 1)
        sizes = list(self.sizes.values())
        for i in range(self.bands * len(self.groups), len(sizes)):
            if rng.random() < 1 / len(sizes):
                mixed[i] = rng.randrange(sizes[i])
        return tuple(mixed)

    def _some_levels(self, rng: Random) -> set[int]:
        """Places of the levels of one band, of one group of layers, or of one of both."""
        groups = len(self.groups)
        band, group = rng.randrange(self.bands), rng.randrange(groups)
        of_band = {band * groups + g for g in range(groups)}
        of_group = {b * groups + group for b in range(self.bands)}
        return rng.choice((of_band, of_group, of_band & of_group))
