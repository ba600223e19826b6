"""One search: prepare, evolve, and finish."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

from tqdm import tqdm

from accel.pipelines.arm_meter import peak_memory_bytes, reset_peak_memory
from accel.pipelines.host import Host, ModelConfig
from accel.pipelines.provenance import code_digest
from accel.search.finish import Finish, Outcome
from accel.search.front import within
from accel.search.genome import Genome
from accel.search.objective import Objective
from accel.search.prepare import Known, plan_of, prepare
from accel.search.sensitivity import predicted_quality
from accel.search.settings import SearchSettings
from accel.search.study import MINIMIZE, Done, Trials, one_at_a_time, open_storage

# what makes plans of genomes and genomes of trials, besides what prices and harms depend on
CODE = tuple(Path(__file__).parent / f"{name}.py" for name in ("genome", "resolve", "run", "study"))
Repair = Callable[[Genome], Genome]


class Search:
    """The search of one model; what each stage makes is kept in `folder` and not made again."""

    def __init__(self, model: ModelConfig, settings: SearchSettings, folder: Path) -> None:
        settings.check_steps(int(model.call["num_inference_steps"]))
        self.settings = settings
        self.folder = folder
        self.host = Host(model)

    def run(self) -> Outcome:
        """Prepare once for all workers, evolve together, and finish: the first who is through."""
        with one_at_a_time(self.folder / ".prepare.lock"):
            known = prepare(self.host, self.settings, self.folder)
        trials = self._trials(known)
        self._evolve(known, trials)
        with one_at_a_time(self.folder / ".finish.lock"):
            return Finish(self.host, self.settings, self.folder, known).outcome(trials.finished)

    def _trials(self, known: Known) -> Trials:
        evolution, repair = self.settings.evolution, self._repair(known)
        if evolution.warm:
            first = warm_start(known, repair, evolution.population)
        else:
            first = cold_start(known, repair, evolution.population, self.settings.seed)
        provenance: dict[str, Any] = {
            "code": code_digest(*CODE),
            "prepared": known.digest,
            "prices and errors": known.fingerprint(),
            "levels": evolution.levels,
            "dense_starts": list(self.settings.dense_starts),
            "population": evolution.population,
            "fidelity": evolution.fidelity,
            "steps": evolution.steps,
            "prompts": evolution.prompts,
            "time_limit": evolution.time_limit,
            "floor": evolution.floor,
            "warm": evolution.warm,
            "memory": evolution.memory,
            "seed": self.settings.seed,
        }
        name = evolution.study or self.host.config.name
        if evolution.fresh:
            told = json.dumps(provenance, sort_keys=True)
            name = f"{name}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"
        return Trials(
            open_storage(evolution.storage, self.folder),
            name,
            known.genes,
            provenance,
            first,
            repair=repair,
            seed=self.settings.seed,
            lock=self.folder / ".study.lock",
            third=MINIMIZE if evolution.memory else None,
        )

    def _repair(self, known: Known) -> Repair:
        """Moves genomes to where plans are worth trying, all levels by one at a time: down until
        they are predicted to be good enough, then up until they are predicted to be faster than the
        fastest dense run by the limit.

        Where one cannot have both, time decides; where not even the highest levels are fast enough,
        the genome is left as it is.
        """
        genes, resolver, evolution = known.genes, known.resolver, self.settings.evolution
        limit = evolution.time_limit * resolver.fastest_dense

        def repaired(genome: Genome) -> Genome:
            moved = genome
            for _ in range(genes.levels):
                if predicted_quality(resolver.resolve(moved).harm) >= evolution.floor:
                    break
                moved = genes.with_levels(moved, -1)
            for _ in range(genes.levels):
                if resolver.resolve(moved).time <= limit:
                    return moved
                moved = genes.with_levels(moved, 1)
            return genome

        return repaired

    def _evolve(self, known: Known, trials: Trials) -> None:
        """Bring the study to its number of trials."""
        evolution = self.settings.evolution
        judge = Objective(
            self.host,
            self.folder,
            known.digest,
            fidelity=evolution.fidelity,
            steps=evolution.steps,
            seed=self.settings.seed,
        )
        prompts = self.host.config.calibrated_on[: evolution.prompts]
        device = self.host.device

        def evaluate(genome: Genome) -> list[float]:
            resolved = known.resolver.resolve(genome)
            plan = plan_of(known, resolved, self.settings, self.host, "trial", genome)
            time = plan.expected["seconds"] / known.dense_seconds
            reset_peak_memory(device)
            if evolution.fidelity == "profile":
                quality = plan.expected["quality"]
            else:
                quality = judge(plan, prompts)
            memory = [float(peak_memory_bytes(device))] if evolution.memory else []
            return [time, quality, *memory]

        finished = len(trials.finished)
        with tqdm(
            total=max(evolution.trials, finished),
            initial=finished,
            desc="evolving",
            unit="trial",
            disable=finished >= evolution.trials,
        ) as bar:

            def told(done: Done) -> None:
                found = trials.finished
                bar.update(len(found) - bar.n)
                bar.set_postfix_str(self._best(known, found))

            trials.run(evolution.trials, evaluate, told)

    def _best(self, known: Known, found: Sequence[Done]) -> str:
        """The best so far, for the progress bar: within the budget of time, else at two thirds."""
        fastest = known.resolver.fastest_dense
        most = 2 / 3 if self.settings.budget.time is None else self.settings.budget.time
        best = within(found, lambda d: d.values[0] / fastest, lambda d: d.values[1], most_time=most)
        return f"best {best.values[1]:.1f} dB at {best.values[0] / fastest:.2f} of dense"


def warm_start(known: Known, repair: Repair, population: int) -> list[Genome]:
    """Plans of one level everywhere, evenly spaced: the front of the calibration."""
    levels = known.genes.levels
    ranks = [1 + round(i * (levels - 2) / (population - 1)) for i in range(population)]
    return list(dict.fromkeys(repair(known.genes.uniform(level)) for level in ranks))


def cold_start(known: Known, repair: Repair, population: int, seed: int) -> list[Genome]:
    """Random genomes: what evolution begins with when nothing was calibrated for it."""
    rng = Random(f"{seed} cold")
    return list(dict.fromkeys(repair(known.genes.random(rng)) for _ in range(population)))
