"""A vision model on calibration images, with plans and without: what it finds, and how fast.

What a trial takes is predicted from the prices of keeps; plans of the front are timed, in pairs
with the dense model. Nothing is looked at or timed twice.
"""

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

from accel.errors import AccelError
from accel.files import write_atomically
from accel.origin import read_json
from accel.pipelines.cost_files import kept
from accel.pipelines.enable import enabled
from accel.pipelines.host import Host
from accel.plan import Plan
from accel.search.keep_costs import KeepCosts
from accel.search.worth import Worth
from accel.untrusted import finite, table, typed

__all__ = ["ImageBench"]

DENSE = "dense"
TIMED = 3  # prompts that a plan is timed on: times hardly depend on what images show


class ImageBench:
    """Judges plans by prompts, which are images or groups of them.

    key: names what is found depends on, model and device; rounds: pairs of timings a prompt.
    """

    def __init__(
        self, host: Host, folder: Path, key: str, seed: int, costs: KeepCosts, rounds: int
    ) -> None:
        self._host, self._seed, self._costs, self._rounds = host, seed, costs, rounds
        self._judge = host.kind.judge(host.config)
        self._path = folder / f"measured-{key}.json"
        self._known: dict[str, dict[str, dict[str, Any]]] = kept(self._path, _read) or {}
        self._dense: dict[str, Any] = {}  # what the dense model finds, by prompt

    def dense(self, tasks: Sequence[str]) -> Worth:
        """Of the untouched model."""
        return self._worth(None, tasks, 1.0)

    def trial(self, plan: Plan, tasks: Sequence[str]) -> Worth:
        """What is found is looked at, its time predicted."""
        return self._worth(plan, tasks, self._costs.time(plan.provenance["genes"]["keep"]))

    def measure(self, plan: Plan, tasks: Sequence[str]) -> Worth:
        """With times of the plan over times of dense beside it: the median over all pairs, of a few
        prompts.
        """
        ratios = []
        for prompt in tasks[:TIMED]:
            entry = self._entry(plan, prompt)
            if "ratios" not in entry:
                entry["ratios"] = self._ratios(plan, prompt)
                self._save()
            ratios += entry["ratios"]
        return self._worth(plan, tasks, median(ratios))

    def _worth(self, plan: Plan | None, tasks: Sequence[str], seconds: float) -> Worth:
        judged = [self._entry(plan, prompt)["judged"] for prompt in tasks]
        dense = [self._entry(None, prompt)["judged"] for prompt in tasks]
        found = self._host.kind.results(judged, dense, {})
        if found["score"] is None:
            raise AccelError(
                f"nobody says what is right of the calibration images of {self._host.config.name!r}"
            )
        agreement = 1.0 if plan is None else found["agreement"]["mean"]
        return Worth(seconds, found["score"], agreement, 1.0)

    def _entry(self, plan: Plan | None, prompt: str) -> dict[str, Any]:
        of_plan = self._known.setdefault(DENSE if plan is None else plan.digest, {})
        if prompt not in of_plan:
            dense = None if plan is None else self._found(prompt)
            made = self._found(prompt) if plan is None else self._made(plan, prompt)
            judged = self._host.kind.judged(made, dense, prompt, self._judge)
            of_plan[prompt] = {"judged": judged}
            self._save()
        return of_plan[prompt]

    def _found(self, prompt: str) -> Any:
        """What the dense model finds, made once."""
        if prompt not in self._dense:
            self._dense[prompt] = self._host.generate(prompt, self._seed)
        return self._dense[prompt]

    def _made(self, plan: Plan, prompt: str) -> Any:
        with enabled(self._host.pipe, plan, check=False):
            return self._host.generate(prompt, self._seed)

    def _ratios(self, plan: Plan, prompt: str) -> list[float]:
        return [
            self._seconds(plan, prompt) / self._seconds(None, prompt) for _ in range(self._rounds)
        ]

    def _seconds(self, plan: Plan | None, prompt: str) -> float:
        """Of a second run: the first one after a change makes tables."""
        with nullcontext() if plan is None else enabled(self._host.pipe, plan, check=False):
            self._host.generate(prompt, self._seed)
            start = time.perf_counter()
            self._host.generate(prompt, self._seed)  # its classes are on the CPU at the end
            return time.perf_counter() - start

    def _save(self) -> None:
        write_atomically(self._path, json.dumps(self._known))


def _read(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Plan -> prompt -> what was judged, and times over dense ones, as untrusted input."""
    plans: Mapping[str, Any] = typed(f"{path}", read_json(path), dict)
    for plan, prompts in plans.items():
        for prompt, entry in typed(f"{path}: {plan!r:.20}", prompts, dict).items():
            what = f"{path}: {plan!r:.20} on {prompt!r:.80}"
            table(what, entry, {"judged", "ratios"}, {"judged"})
            typed(f"{what}: judged", entry["judged"], dict)
            if not all(finite(ratio) for ratio in entry.get("ratios", ())):
                raise AccelError(f"{what} has something that is not a number")
    return dict(plans)
