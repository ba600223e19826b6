"""What a search for a vision model may turn: how much is kept at each depth, and by what score.

One gene for every group of neighbouring blocks says what they keep: of windows (SparseViT has one
for each pair of blocks, unshifted and shifted) or of tokens. Within a stage keeps do not grow with
depth; a genome in which they do is sorted. One more gene says how it is chosen what is kept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from accel.choice import DENSE
from accel.errors import AccelError, PlanError, nearest
from accel.geometry import Geometry
from accel.plan import PARTS, Plan
from accel.schedule import Schedule
from accel.search.genome import Genome, ListedGenes
from accel.untrusted import finite
from accel.window_keeps import checked_keeps

__all__ = ["KeepGenes"]

SPACE = {"keep", "how", "group"}


@dataclass(frozen=True, slots=True)
class KeepGenes(ListedGenes):
    """The genes of one search.

    part: of the plan, `windows` or `tokens`. stages: of each stage its groups, and of each of these
    the sites. keeps: that a group may have, falling. hows: other fields of the part, tried as one.
    least: a group keeps at least this share of what the one before it keeps.
    """

    part: str
    stages: tuple[tuple[tuple[str, ...], ...], ...]
    keeps: tuple[float, ...]
    hows: tuple[Mapping[str, Any], ...]
    least: float = 0.0

    @classmethod
    def of(
        cls, space: Mapping[str, Any], part: str, stages: Sequence[Sequence[str]]
    ) -> "KeepGenes":
        """From a space: keep, a list of keeps; how, a list of tables; group, blocks of a gene.

        stages: the sites of each stage, in the model's order.
        """
        for name in space:
            if name not in SPACE:
                raise AccelError(f"space.genes has no {name!r}; {nearest(str(name), SPACE)}")
        keeps = space.get("keep")
        if not isinstance(keeps, Sequence) or isinstance(keeps, str) or len(keeps) < 2:
            raise AccelError(f"space.genes.keep is a list of keeps, got {keeps!r:.80}")
        try:
            checked = [*checked_keeps("space.genes.keep", {str(k): k for k in keeps}).values()]
        except PlanError as error:
            raise AccelError(str(error)) from error
        # a merge can at most halve what there is
        least = 0.5 if part == "tokens" else 0.0
        if 1.0 not in checked or not any(least <= keep < 1 for keep in checked):
            between = f"between {least} and 1" if least else "below 1"
            raise AccelError(
                f"space.genes.keep is {list(keeps)}; 1.0 is among keeps, and one {between}, so that"
                " a group can be left as it is, and be the only one that is not"
            )
        size = space.get("group", 2)
        if type(size) is not int or size < 1:
            raise AccelError(f"space.genes.group is a number of blocks, got {size!r}")
        grouped = tuple(
            tuple(tuple(stage[i : i + size]) for i in range(0, len(stage), size))
            for stage in stages
        )
        listed: Sequence[Mapping[str, Any]] = space.get("how") or ({},)
        hows = tuple(dict(how) for how in listed)
        for how in hows:
            try:
                PARTS[part].from_dict({"keeps": {}, **how})
            except PlanError as error:
                raise AccelError(f"space.genes.how has {how!r:.80}: {error}") from error
        return cls(part, grouped, tuple(sorted(checked, reverse=True)), hows, least)

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The sites of every gene of a keep."""
        return tuple(group for stage in self.stages for group in stage)

    def stage_end(self, group: int) -> int:
        """The number after the last group of this one's stage."""
        ends = accumulate(len(stage) for stage in self.stages)
        return next(end for end in ends if group < end)

    @property
    def values(self) -> Mapping[str, Any]:
        """What tells one space from another."""
        return {"part": self.part, "groups": self.stages, "keeps": self.keeps, "hows": self.hows}

    @property
    def sizes(self) -> dict[str, int]:
        found = {f"keep of {group[0]}": len(self.keeps) for group in self.groups}
        if len(self.hows) > 1:
            found["how"] = len(self.hows)
        return found

    def nearest(self, wanted: Mapping[str, Any]) -> Genome:
        """keep: one for all, or one for each stage, or of a stage a list with one for each group;
        how: fields of the part.
        """
        for name in wanted:
            if name not in ("keep", "how"):
                known = nearest(str(name), ("keep", "how"))
                raise AccelError(f"space.first has no {name!r}; {known}")
        keep = wanted.get("keep", 1.0)
        by_stage = keep if isinstance(keep, Sequence) else [keep] * len(self.stages)
        if len(by_stage) != len(self.stages):
            raise AccelError(
                f"space.first has keeps for {len(by_stage)} stages, the model has"
                f" {len(self.stages)}"
            )
        genome = []
        for groups, of_stage in zip(self.stages, by_stage, strict=True):
            row = of_stage if isinstance(of_stage, Sequence) else [of_stage] * len(groups)
            if len(row) != len(groups):
                raise AccelError(
                    f"space.first has {len(row)} keeps for the {len(groups)} groups of blocks from"
                    f" {groups[0][0]} on"
                )
            genome += [self._level(value) for value in row]
        if len(self.hows) > 1:
            how = wanted.get("how", self.hows[0])
            if how not in self.hows:
                raise AccelError(f"space.first has the how {how!r:.80}, not one of {[*self.hows]}")
            genome.append(self.hows.index(how))
        return tuple(genome)

    def _level(self, keep: Any) -> int:
        if not finite(keep) or not 0 < keep <= 1:
            raise AccelError(f"space.first has the keep {keep!r:.80}; it is above 0, and at most 1")
        return min(range(len(self.keeps)), key=lambda i: abs(self.keeps[i] - keep))

    def repaired(self, genome: Genome) -> Genome:
        """With keeps that do not grow within a stage, and fall no faster than they may."""
        found, place = list(genome), 0
        for groups in self.stages:
            levels = sorted(found[place : place + len(groups)])
            before = 1.0
            for i, level in enumerate(levels):
                while self.keeps[level] < self.least * before - 1e-9:
                    level -= 1
                levels[i], before = level, self.keeps[level]
            found[place : place + len(groups)] = levels
            place += len(groups)
        return tuple(found)

    def keeps_of(self, genome: Genome) -> list[float]:
        """The keep of every group."""
        return [self.keeps[level] for level in genome[: len(self.groups)]]

    def plan(self, genome: Genome, geometry: Geometry, name: str, **provenance: Any) -> Plan:
        """The plan of a genome; groups that keep all are not named."""
        found = self.keeps_of(genome)
        keeps = {
            site: keep
            for group, keep in zip(self.groups, found, strict=True)
            for site in self._lowered(group)
            if keep < 1
        }
        how = self.hows[genome[-1]] if len(self.hows) > 1 else self.hows[0]
        part = PARTS[self.part].from_dict({"keeps": keeps, **how})
        return Plan.uniform(
            name,
            geometry,
            DENSE,
            schedule=Schedule(dense_start=0.0),
            provenance={**provenance, "genes": {"keep": found, "how": dict(how)}},
            **{self.part: part},
        )

    def _lowered(self, group: tuple[str, ...]) -> tuple[str, ...]:
        """Which blocks of a group bring about its keep: of windows all, of tokens the first, since
        what is left behind it is what the others get.
        """
        return group if self.part == "windows" else group[:1]
