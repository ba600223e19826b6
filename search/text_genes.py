"""What a search for a text model may turn: which tokens are fed and remembered, how they are
committed, and which blocks whole calls compute.

Every gene is a list of values in the space (`configs/space/text.yaml`); a genome picks one of each.
Values that do not go together are brought together by `repaired`, so that every genome is a plan.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from accel.choice import DENSE, Choice
from accel.decoding import Decoding
from accel.errors import AccelError, PlanError, nearest
from accel.geometry import Geometry
from accel.kernels.arguments import PRECISIONS
from accel.plan import DENSE_BY, Plan
from accel.schedule import Schedule
from accel.search.genome import Genome, ListedGenes
from accel.token_cache import TokenCache

__all__ = ["GENES", "TextGenes"]

CACHE = ("feed", "keep", "pool", "by_head", "delay", "refresh", "blocks", "external", "window")
# name -> what the gene is when a space does not have it
GENES: Mapping[str, Any] = {
    **{name: getattr(TokenCache(), name) for name in CACHE},
    "block_length": 32,
    "commit": {"rule": "quota"},
    "stop_at_eos": False,
    "masks": None,
    "dense_start": 0.2,
    "dense": "host",
    "precision": "full",
}


@dataclass(frozen=True, slots=True)
class TextGenes(ListedGenes):
    """The genes of one search: name -> its values, in an order in which neighbours are alike.

    commit: fields of a `Decoding` besides its block length; masks: a choice of blocks for whole
    calls after `dense_start` of a run, or None for dense ones; block: of these masks.
    """

    values: Mapping[str, tuple[Any, ...]]
    block: tuple[int, int] = (64, 32)

    @classmethod
    def of(cls, space: Mapping[str, Any], block: tuple[int, int]) -> "TextGenes":
        """From a space, each value of which is tried alone."""
        found = {}
        for name, values in space.items():
            if name not in GENES:
                raise AccelError(f"space.genes has no {name!r}; {nearest(str(name), GENES)}")
            if not isinstance(values, Sequence) or isinstance(values, str) or not values:
                raise AccelError(f"space.genes.{name} is a list of values, got {values!r:.80}")
            found[name] = tuple(values)
        genes = cls({name: found.get(name, (GENES[name],)) for name in GENES}, block)
        for name, values in found.items():
            for value in values:
                try:
                    genes._parts({**GENES, name: value})
                except PlanError as error:
                    raise AccelError(f"space.genes.{name} has {value!r:.80}: {error}") from error
        return genes

    @property
    def sizes(self) -> dict[str, int]:
        """The name of every gene with a choice, and how many values it has."""
        return {name: len(values) for name, values in self.values.items() if len(values) > 1}

    def nearest(self, wanted: Mapping[str, Any]) -> Genome:
        """The genome that has the values of `wanted`, and of other genes their usual ones, as far
        as the space has them; else the nearest numbers, or the first value.
        """
        full = {**GENES, **wanted}
        return tuple(_place(self.values[name], full[name]) for name in self.sizes)

    def of_genome(self, genome: Genome) -> dict[str, Any]:
        """Name -> value of every gene."""
        params = self.to_params(genome)
        return {name: values[params.get(name, 0)] for name, values in self.values.items()}

    def repaired(self, genome: Genome) -> Genome:
        """The genome with values that go together, and with the first one of genes that do nothing
        beside the others, so that plans that are alike have one genome.
        """
        found = self.of_genome(genome)
        if found["external"] == "frozen":
            found |= {"feed": "block", "blocks": 1}
        if found["keep"] == 1:
            found |= {name: self.values[name][0] for name in ("pool", "by_head")}
        if found["masks"] is None:
            found["dense_start"] = self.values["dense_start"][0]
        return tuple(_place(self.values[name], found[name]) for name in self.sizes)

    def plan(self, genome: Genome, geometry: Geometry, name: str, **provenance: Any) -> Plan:
        """The plan of a genome."""
        found = self.of_genome(genome)
        return Plan.uniform(
            name,
            geometry,
            block=self.block,
            provenance={**provenance, "genes": found},
            **self._parts(found),
        )

    def _parts(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """What a plan is made of."""
        frozen = {"feed": "block", "blocks": 1} if found["external"] == "frozen" else {}
        settings = {**{gene: found[gene] for gene in CACHE}, **frozen}
        commit = dict(found["commit"])
        if commit.get("rule", "quota") == "entropy_bound":
            commit.setdefault("confidence", "entropy")
        for gene, known in (("dense", DENSE_BY), ("precision", PRECISIONS)):
            if found[gene] not in known:
                raise PlanError(f"{gene} is {found[gene]!r}; {nearest(str(found[gene]), known)}")
        return {
            "choice": DENSE if found["masks"] is None else Choice.from_dict(found["masks"]),
            "schedule": Schedule(dense_start=found["dense_start"]),
            "cache": TokenCache(**settings),
            "decoding": Decoding.from_dict(
                {
                    "block_length": found["block_length"],
                    "stop_at_eos": found["stop_at_eos"],
                    **commit,
                }
            ),
            "dense": found["dense"],
            "precision": found["precision"],
        }


def _place(values: Sequence[Any], wanted: Any) -> int:
    """Where `wanted` is among values, or the nearest number; 0 where there is nothing like it."""
    if wanted in values:
        return values.index(wanted)
    numbers = [i for i, v in enumerate(values) if _number(v)]
    if not _number(wanted) or not numbers:
        return 0
    return min(numbers, key=lambda i: abs(values[i] - wanted))


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
