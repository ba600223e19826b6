"""What keeping less saves here: one group of blocks at a time is measured, and savings are added.

SparseViT times every candidate live. A table makes a trial free of that, and of the machine's mood:
``time(genome) = 1 - sum over groups of own(group, keep)``. What a group saves at a few keeps is
measured against the dense model beside it, and is linear between and beyond them. With a group
those behind it in its stage keep less too: tokens that it leaves out are missing there, and blocks
compute no more windows than those before them. So its own is what it saves less what the next
group of the stage does at that keep. How far the sum is off is told by the front, which is measured
whole.
"""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

from accel.errors import AccelError
from accel.files import write_atomically
from accel.origin import read_json
from accel.pipelines.cost_files import kept
from accel.search.genome import Genome
from accel.search.keep_genes import KeepGenes
from accel.untrusted import finite, typed

__all__ = ["KeepCosts"]

KNOTS = 3  # keeps below 1 at which a group is measured
LEAST = 0.02  # of the dense time: no sum of savings goes below


class KeepCosts:
    """The table of one model on one device.

    path: where it is kept; rounds: pairs of which each saving is the median.
    """

    def __init__(self, genes: KeepGenes, path: Path, rounds: int) -> None:
        self._genes, self._path, self._rounds = genes, path, rounds
        self._saved: dict[str, dict[float, float]] = kept(path, _read) or {}

    @property
    def knots(self) -> tuple[float, ...]:
        """The keeps that are measured: the lowest, and some between it and 1."""
        below = [keep for keep in self._genes.keeps if self._genes.least <= keep < 1]
        places = range(KNOTS) if len(below) > KNOTS else range(len(below))
        last = max(len(places) - 1, 1)
        return tuple(dict.fromkeys(below[round(i * (len(below) - 1) / last)] for i in places))

    def measure(
        self,
        run: Callable[[], Any],
        keeping: Callable[[Genome], AbstractContextManager[Any]],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Time what is missing. run: the model, until it is done; keeping: inside of which it keeps
        what a genome says, else all.
        """
        # another worker may have measured since
        self._saved = kept(self._path, _read) or {}
        jobs = [
            (i, group[0], keep)
            for i, group in enumerate(self._genes.groups)
            for keep in self.knots
            if keep not in self._saved.get(group[0], {})
        ]

        def seconds(genome: Genome | None) -> float:
            """Of a second run: the first one after a change makes tables."""
            with nullcontext() if genome is None else keeping(genome):
                run()
                start = clock()
                run()
                return clock() - start

        for i, name, keep in tqdm(jobs, desc="pricing", unit="keep", disable=not jobs):
            genome = self._from(i, keep)
            ratios = [seconds(genome) / seconds(None) for _ in range(self._rounds)]
            self._saved.setdefault(name, {})[keep] = 1 - median(ratios)
            listed = {n: {str(k): s for k, s in of.items()} for n, of in self._saved.items()}
            write_atomically(self._path, json.dumps(listed, indent=1))

    def _from(self, group: int, keep: float) -> Genome:
        """This group keeps less, and those of its stage behind it, which cannot keep more."""
        genome = [0] * len(self._genes.sizes)
        for place in range(group, self._genes.stage_end(group)):
            genome[place] = self._genes.keeps.index(keep)
        return tuple(genome)

    def time(self, keeps: Sequence[float]) -> float:
        """Predicted time, as a fraction of dense, where groups keep so much."""
        groups, saved = self._genes.groups, 0.0
        for i, keep in enumerate(keeps):
            saved += self._at(groups[i][0], keep)
            if i + 1 < self._genes.stage_end(i):
                saved -= self._at(groups[i + 1][0], keep)
        return max(LEAST, 1 - saved)

    def _at(self, name: str, keep: float) -> float:
        """Linear between what was measured, nothing at 1; below it as between the last two."""
        points = sorted({**self._saved[name], 1.0: 0.0}.items())
        low = next(
            i for i in range(len(points) - 1) if i + 2 == len(points) or keep < points[i + 1][0]
        )
        (x, at_x), (y, at_y) = points[low : low + 2]
        return at_x + (at_y - at_x) * (keep - x) / (y - x)


def _read(path: Path) -> dict[str, dict[float, float]]:
    """Group -> keep -> share of the dense time that it saves, as untrusted input."""
    found: dict[str, dict[float, float]] = {}
    for name, of_group in typed(f"{path}", read_json(path), dict).items():
        row = {}
        for keep, saved in typed(f"{path}: {name!r:.80}", of_group, dict).items():
            if not finite(saved) or not keep.replace(".", "", 1).isdigit():
                raise AccelError(f"{path}: {name!r:.80} has something that is not a number")
            row[float(keep)] = float(saved)
        found[name] = row
    return found
