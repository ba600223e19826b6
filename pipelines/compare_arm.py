"""One arm of a comparison: a process with its own pipeline that obeys commands, a JSON line each.

    python -m accel.pipelines.compare_arm arms/sparsed/spec.json

On stdin {"do": "start"}, {"do": "generate", ...}, {"do": "look", ...}; on stdout one answer each,
{"ok": ...} or {"error": ...}. Whatever libraries print goes to stderr. It ends with its stdin, in
the middle of a generation too: a comparison that was killed leaves nobody behind.
"""

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from accel.choice import Choice
from accel.errors import AccelError
from accel.files import write_atomically
from accel.pipelines.adapters import by_denoiser, denoisers_of
from accel.pipelines.arm_commands import serve, until_closed
from accel.pipelines.arm_meter import StepClock, middle_of, peak_memory_bytes, reset_peak_memory
from accel.pipelines.arm_plan import (
    origin_of_plan,
    predictions_of,
    recipe_plans,
    steps_of_all,
)
from accel.pipelines.cache_hooks import disable_cache, enable_cache, magnitude_ratios, reset_cache
from accel.pipelines.caches import CACHES, CacheSpec
from accel.pipelines.enable import disable, enable, session_of, summary
from accel.pipelines.host import Host
from accel.pipelines.look import look
from accel.pipelines.model_settings import model_config
from accel.pipelines.pricing import load_or_measure_baseline, priced, warm_up_steps
from accel.pipelines.provenance import device_name
from accel.pipelines.seen_keeps import SeenKeeps
from accel.plan import Plan
from accel.recipes import RECIPES
from accel.schedule import Schedule


class Arm:
    """The pipeline of one arm.

    plan: a plan file, the name of a recipe, or None for an arm without one; cache: what
    `CacheSpec.of` reads, or None; folder: keeps what plans and caches are calibrated by, for all
    arms of a comparison; precision: what a recipe computes in where it does not say, "" for the
    model's own; parameters: those of a recipe that are given; setup: what is done to the model
    first.
    """

    def __init__(
        self,
        model: dict[str, Any],
        plan: str | None,
        cache: Any = None,
        folder: str = "",
        precision: str = "",
        parameters: Mapping[str, Any] | None = None,
        setup: Mapping[str, Any] | None = None,
    ) -> None:
        self._config = model_config(model)
        self._plan = plan
        self._cache = None if cache is None else CacheSpec.of(cache)
        self._folder = Path(folder)
        self._precision = precision
        self._parameters = parameters or {}
        self._setup = setup or {}
        self._ratios: list[float] | None = None
        self._keeps: dict[Choice, float] = {}
        self._host: Host | None = None

    @property
    def host(self) -> Host:
        if self._host is None:
            raise AccelError("the arm was not started")
        return self._host

    @property
    def schedule(self) -> Schedule:
        """When steps are dense; always, without a plan."""
        plans = self.plans
        return plans[0].schedule if plans else Schedule(dense_start=1.0)

    @property
    def plans(self) -> list[Plan]:
        if self._plan is None:
            return []
        return [session_of(model).plan for model in denoisers_of(self.host.pipe)]

    def start(self) -> dict[str, Any]:
        """Load, calibrate, enable, and generate once with few steps, one of every band."""
        begun = time.perf_counter()
        self._host = Host(self._config)
        if self._setup:
            self._host.kind.set_up(self._host, self._setup)
        loaded = time.perf_counter()
        plan = self._calibrated()
        calibrated = time.perf_counter()
        if plan is not None:
            enable(self._host.pipe, plan, guard=False)
        self._enable_cache()
        first_s = self._warm_up()
        enabled = self.plans[0] if self.plans else None
        made = None if enabled is None else origin_of_plan(enabled)
        here = None if enabled is None else self._place()
        warm_s = time.perf_counter() - calibrated
        return {
            "load_s": loaded - begun,
            "calibration_s": calibrated - loaded,
            "warm_up_s": warm_s,
            # what the first generation takes over another one
            "compile_s": first_s - self._warm_up() if "compile" in self._setup else None,
            "about": self._host.kind.about(self._host),
            "device": device_name(self.host.device),
            "plan": None if enabled is None else enabled.name,
            "digest": None if enabled is None else enabled.digest,
            "made_at": made,
            "call": here,
            "note": "" if self._cache is None else CACHES[self._cache.kind].note,
            # what a plan expects of another call is no prediction of this one
            **self._predictions(enabled if made in (None, here) else None),
        }

    def price(self, folder: str) -> dict[str, Any]:
        """Predict this arm's speed from costs measured here; its plans go on with the prediction.

        Sites at which dense is predicted to be faster then run dense, and dense calls go to accel's
        own kernel where that is. It has run other things since it was warm, and is warmed up again.
        folder: keeps the timed dense generation and the costs, for all arms.
        """
        plans = self.plans
        self._disable_cache()  # prices are those of what is computed
        disable(self.host.pipe)
        path = Path(folder) / "baseline.json"
        prompt = (self._config.calibration or self._config.prompts)[0]
        baseline = load_or_measure_baseline(self.host, prompt, 0, path)
        # how much some selections keep is known since they have run
        keeps, where = self._keeps, Path(folder)
        plans = [priced(self.host, plan, baseline, where, keeps=keeps) for plan in plans]
        enable(self.host.pipe, by_denoiser(self.host.pipe, plans), check=False, guard=False)
        self._enable_cache()
        self._warm_up()
        return {
            "attention_share": baseline.total_share,
            **self._predictions(plans[0]),
        }

    def generate(
        self, prompt: str, seed: int, steps: int | None = None, save: str | None = None
    ) -> dict[str, Any]:
        """One generation with its times in seconds; what it made goes to the file `save`.

        steps: about how many, of a shorter generation.
        """
        kind, total = self.host.kind, self.host.steps if steps is None else steps
        shorter = {} if steps is None else kind.shortened(self._config.call, steps)
        if self._cache is not None:
            reset_cache(self.host.pipe)
        clock = StepClock(self.host.device)
        taken = []
        for _ in range(kind.repeats):
            begun = clock.now()
            made = self.host.generate(prompt, seed, **kind.callback(clock), **shorter)
            taken.append(clock.now() - begun)
        dense = kind.dense_steps(self.schedule, total)[1:]
        answer = {
            "seconds": median(taken),
            "steps": len(clock.steps) + 1,
            "step_seconds": {
                "all": middle_of(clock.steps),
                "dense": middle_of(s for s, d in zip(clock.steps, dense, strict=False) if d),
                "sparse": middle_of(s for s, d in zip(clock.steps, dense, strict=False) if not d),
            },
            "peak_memory_bytes": peak_memory_bytes(self.host.device),
            "summary": None if self._plan is None else summary(self.host.pipe).to_dict(),
            **kind.counts(made),
        }
        if save is not None:
            kind.save(Path(save), made, self.host, prompt)
            reset_peak_memory(self.host.device)
        return answer

    def look(self, prompt: str, seed: int, save: str) -> dict[str, Any]:
        """Attention maps of a few heads with what the plan keeps of them; see `look`."""
        return look(self.host, self.plans, prompt, seed, Path(save))

    def _warm_up(self) -> float:
        """Generate with a few steps, one of every band; peak memory is counted from there. Returns
        the seconds it took.
        """
        begun = time.perf_counter()
        steps = warm_up_steps(self.schedule, self.host.steps)
        steps = steps_of_all(next(iter(self.plans), None), steps)
        shorter = self.host.kind.shortened(self._config.call, steps)
        models = denoisers_of(self.host.pipe)
        seen = SeenKeeps([session_of(m) for m in models] if self._plan is not None else [])
        kind = self.host.kind
        self.host.generate(self._config.prompts[0], 0, **kind.callback(seen), **shorter)
        self._keeps |= seen.means
        reset_peak_memory(self.host.device)
        return time.perf_counter() - begun

    def _calibrated(self) -> dict[str, Plan] | str | None:
        """The arm's plan, or one for each denoiser; one that chooses by a calibration is made
        first, and so are the ratios of MagCache. What is in the folder already is taken from there.
        """
        if self._cache is not None and self._cache.kind == "magcache":
            path = self._folder / "magcache.json"
            if not path.is_file():
                ratios = magnitude_ratios(self.host, self._config.calibrated_on[0], 0)
                write_atomically(path, json.dumps({"ratios": ratios}))
            self._ratios = json.loads(path.read_text())["ratios"]
        if self._plan in RECIPES:
            return recipe_plans(
                self.host, self._plan, self._folder, self._precision, self._parameters
            )
        return self._plan

    def _enable_cache(self) -> None:
        if self._cache is not None:
            steps = self.host.steps
            enable_cache(self.host.pipe, self._cache, steps=steps, ratios=self._ratios)

    def _disable_cache(self) -> None:
        if self._cache is not None:
            disable_cache(self.host.pipe)

    def _predictions(self, plan: Plan | None) -> dict[str, Any]:
        """What the plan predicts; nothing is predicted of what a cache leaves out."""
        return predictions_of(plan if self._cache is None else None)

    def _place(self) -> dict[str, Any] | None:
        """The grid and the number of steps of this arm's generations, where they are its own."""
        session = session_of(denoisers_of(self.host.pipe)[0])
        return self.host.kind.place(session, self.host.steps)


def main() -> None:
    """Serve the arm that the specification file describes."""
    answers = os.fdopen(os.dup(1), "w")  # what libraries print shall not be taken for one
    os.dup2(2, 1)
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    serve(
        Arm(**spec),
        until_closed(sys.stdin),
        lambda text: print(text, file=answers, flush=True),
    )


if __name__ == "__main__":
    main()
