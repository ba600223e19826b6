"""The search for a vision model: genomes of keeps, judged by what is right of some images."""

import hashlib
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from accel.errors import AccelError, PlanError
from accel.pipelines.adapters import adapter_of, denoisers_of, geometry_of
from accel.pipelines.enable import enabled
from accel.pipelines.host import Host, ModelConfig
from accel.pipelines.token_blocks import TokenInterception
from accel.pipelines.vision_images import ImageFolder
from accel.pipelines.window_blocks import WindowInterception, window_stages
from accel.search.genome import Genome
from accel.search.image_bench import ImageBench
from accel.search.keep_costs import KeepCosts
from accel.search.keep_genes import KeepGenes
from accel.search.study import one_at_a_time
from accel.search.task_search import Outcome, TaskSearch, TaskSettings

__all__ = ["ImageSearch", "genes_for"]

PARTS = {"windows": WindowInterception, "tokens": TokenInterception}


def genes_for(space: Mapping[str, Any], pipe: Any) -> KeepGenes:
    """The genes that a space asks for: of windows, or of tokens, by its name. Blocks that cannot
    leave windows out have none.
    """
    part = str(space.get("name"))
    if part not in PARTS or "genes" not in space:
        raise AccelError(
            f"space {part!r} is none of a vision model: take space=windows for one with windows,"
            " space=tokens for a plain vision transformer"
        )
    (model,) = denoisers_of(pipe)
    if adapter_of(model).intercept is not PARTS[part]:
        (other,) = {*PARTS} - {part}
        raise AccelError(f"space {part!r} is not for a {type(model).__name__}; take space={other}")
    names = [site.name for site in geometry_of(model).sites]
    stages = [names]
    if part == "windows":
        found = window_stages(model, names)
        stages = [[b.site for b in stage.blocks if b.host.obstacle is None] for stage in found]
    genes = KeepGenes.of(space["genes"], part, [stage for stage in stages if stage])
    return _fitting(genes, model)


def _fitting(genes: KeepGenes, model: nn.Module) -> KeepGenes:
    """Without what this model cannot do: to go by a class token, where it has none."""
    least = (len(genes.keeps) - 1,) * len(genes.groups)
    hows, reason = [], ""
    for how in genes.hows:
        only = replace(genes, hows=(how,))
        try:
            plan = only.plan(only.repaired(least), geometry_of(model), "fits")
            with enabled(model, plan, check=False):
                hows.append(how)
        except PlanError as error:
            reason = str(error)
    if not hows:
        raise AccelError(f"nothing of space.genes.how is for a {type(model).__name__}: {reason}")
    return replace(genes, hows=tuple(hows))


class ImageSearch(TaskSearch):
    """The search of one vision model: a trial sees all calibration images.

    The model is set up as comparisons set up those of plans, with scaled_dot_product_attention
    wherever timm has it, so that a plan gains nothing by that.

    space: of `configs/space`; rounds: pairs of timings of each price, and of a plan of the front on
    each of a few prompts.
    """

    code: ClassVar[tuple[str, ...]] = (
        *TaskSearch.code,
        *("image_bench", "image_search", "keep_costs", "keep_genes"),
    )

    def __init__(
        self, host: Host, settings: TaskSettings, folder: Path, genes: KeepGenes, rounds: int
    ) -> None:
        prompts = host.config.calibrated_on
        self._genes, self._rounds = genes, rounds
        stands = [host.kind.stands_for(host.config, prompt) for prompt in prompts]
        setup = host.kind.setup("fused", {}) or {}
        host.kind.set_up(host, setup)
        folders = [p for p in (host.config.images, host.config.calibration_images) if p]
        answers = [ImageFolder.of(path).answers for path in folders]
        told = {"images": stands, "answers": answers, "setup": setup, "rounds": rounds}
        super().__init__(host, settings, folder, prompts, len(prompts), **told)

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
        genes = genes_for(space, host.pipe)
        # what the space has for other models is left out, what it has not is an error
        other = [how for how in space["genes"].get("how") or () if how not in genes.hows]
        first = [wanted for wanted in space.get("first") or () if wanted.get("how") not in other]
        asked = TaskSettings(genes=genes, first=first, **settings)
        return cls(host, asked, folder, genes, rounds)

    def _bench(self) -> ImageBench:
        groups = hashlib.sha256(repr(self._genes.groups).encode()).hexdigest()[:6]
        path = self.folder / f"prices-{self.key}-{groups}.json"
        self.costs = KeepCosts(self._genes, path, self._rounds)
        seed = self.settings.seed
        return ImageBench(self.host, self.folder, self.key, seed, self.costs, self._rounds)

    def run(self) -> Outcome:
        """Price keeps once, then search."""
        prompt, seed = self.tasks[0], self.settings.seed

        def keeping(genome: Genome) -> AbstractContextManager[Any]:
            return enabled(self.host.pipe, self.plan(genome, "price"), check=False)

        self.folder.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(self.folder / ".prepare.lock"):
            self.costs.measure(lambda: self.host.generate(prompt, seed), keeping)
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
