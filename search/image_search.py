"""The search for a vision model: genomes of keeps, judged by what is right of some images."""

import re
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

from accel.errors import AccelError
from accel.geometry import Geometry
from accel.pipelines.adapters import geometry_of
from accel.pipelines.enable import enabled
from accel.pipelines.host import Host, ModelConfig
from accel.search.genome import Genome
from accel.search.image_bench import ImageBench
from accel.search.keep_costs import KeepCosts
from accel.search.keep_genes import KeepGenes
from accel.search.task_search import Outcome, TaskSearch, TaskSettings

__all__ = ["ImageSearch", "genes_for"]

WINDOWED = r"(layers\.\d+)\.blocks\.\d+\.attn"
PLAIN = r"(blocks)\.\d+\.attn"


def genes_for(space: Mapping[str, Any], geometry: Geometry) -> KeepGenes:
    """The genes that a space asks for: of windows, or of tokens, by its name."""
    part = space.get("name")
    pattern = {"windows": WINDOWED, "tokens": PLAIN}.get(str(part))
    if pattern is None or "genes" not in space:
        raise AccelError(
            f"space {part!r} is none of a vision model: take space=windows for one with windows,"
            " space=tokens for a plain vision transformer"
        )
    stages: dict[str, list[str]] = {}
    for site in geometry.sites:
        found = re.fullmatch(pattern, site.name)
        if found is None:
            raise AccelError(
                f"space {part!r} is not for a {geometry.model}, whose attention is called"
                f" {site.name!r}"
            )
        stages.setdefault(found[1], []).append(site.name)
    return KeepGenes.of(space["genes"], str(part), list(stages.values()))


class ImageSearch(TaskSearch):
    """The search of one vision model: a trial sees all calibration images.

    space: of `configs/space`; rounds: pairs of timings of each price, and of a plan of the front on
    each prompt.
    """

    code: ClassVar[tuple[str, ...]] = (
        *TaskSearch.code,
        *("image_bench", "image_search", "keep_costs", "keep_genes"),
    )

    def __init__(
        self, host: Host, settings: TaskSettings, folder: Path, genes: KeepGenes, rounds: int
    ) -> None:
        prompts = host.config.calibration
        self._genes, self._rounds = genes, rounds
        stands = [host.kind.stands_for(host.config, prompt) for prompt in prompts]
        super().__init__(host, settings, folder, prompts, len(prompts), images=stands)

    @classmethod
    def of(
        cls,
        model: ModelConfig,
        space: Mapping[str, Any],
        folder: Path,
        rounds: int,
        **settings: Any,
    ) -> "ImageSearch":
        """Load the model, and search what the space has for it."""
        host = Host(model)
        genes = genes_for(space, geometry_of(host.pipe))
        asked = TaskSettings(genes=genes, first=space.get("first", ()), **settings)
        return cls(host, asked, folder, genes, rounds)

    def _bench(self) -> ImageBench:
        self.costs = KeepCosts(self._genes, self.folder / f"prices-{self.key}.json", self._rounds)
        seed = self.settings.seed
        return ImageBench(self.host, self.folder, self.key, seed, self.costs, self._rounds)

    def run(self) -> Outcome:
        """Price keeps once, then search."""
        prompt, seed = self.tasks[0], self.settings.seed

        def generate(genome: Genome | None) -> None:
            on: Any = nullcontext()
            if genome is not None:
                on = enabled(self.host.pipe, self.plan(genome, "price"), check=False)
            with on:
                self.host.generate(prompt, seed)

        self.folder.mkdir(parents=True, exist_ok=True)
        self.costs.measure(generate)
        return super().run()

    def more(self, outcome: Outcome) -> Iterable[str]:
        """What every stage keeps in the chosen plan, and how far predicted times were off."""
        keeps, place = outcome.chosen.plan.provenance["genes"]["keep"], 0
        for groups in self._genes.stages:
            row = keeps[place : place + len(groups)]
            place += len(groups)
            name = groups[0][0].partition(".blocks")[0]
            yield f"{name} keeps {', '.join(f'{keep:.0%}' for keep in row)}"
        off = [
            abs(self.costs.time(point.plan.provenance["genes"]["keep"]) / point.worth.time - 1)
            for point in outcome.points
        ]
        yield f"predicted times were {sum(off) / len(off):.1%} off in the mean over the front"
