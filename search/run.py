"""One search: measure costs, calibrate, probe, sweep the budget, write and check the plan."""

import hashlib
import itertools
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

from torch import nn
from tqdm import tqdm

from accel.choice import DENSE, Choice
from accel.cost import (
    CostTable,
    dense_price,
    dense_speedup,
    fastest_dense,
    keep_of,
    price,
    select_price,
)
from accel.errors import AccelError, nearest
from accel.files import write_atomically
from accel.kernels.arguments import PRECISIONS
from accel.layout import Layout
from accel.metrics import capped, psnr
from accel.pipelines.adapters import adapter_of, denoisers_of, geometry_of, sites_of
from accel.pipelines.enable import enabled, session_of
from accel.pipelines.host import Host, ModelConfig, Video
from accel.pipelines.pricing import (
    Baseline,
    dense_plan,
    load_or_measure_baseline,
    load_or_measure_costs,
    warm_up_steps,
)
from accel.pipelines.provenance import code_digest, device_name, versions
from accel.plan import Plan, check_block
from accel.profile import Profile
from accel.recipes import recipe
from accel.schedule import Schedule
from accel.search.front import Point, Times, front, within
from accel.search.picture import draw_front
from accel.search.profile import Calibrator, cheapest_harmless
from accel.search.sensitivity import measure_sensitivities, predicted_psnr
from accel.untrusted import check_whole, finite

HERE = Path(__file__).parent
# what finds prices and harms, besides the code that every measurement depends on
CODE = (
    *(HERE / f"{name}.py" for name in ("profile", "sensitivity")),
    *(HERE.parent / "pipelines" / f"{name}.py" for name in ("host", "pricing")),
)


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """What a search is asked for; see `configs/search.yaml`."""

    space: Mapping[str, Any]
    budget: float
    schedule: Schedule
    block: tuple[int, int] = (128, 64)
    precision: str = "full"
    rows: int = 128
    tolerance: float = 0.02
    cost_rounds: int = 5
    validate: bool = True
    seed: int = 1000

    def __post_init__(self) -> None:
        if not finite(self.budget) or not 0 < self.budget <= 1:
            raise AccelError(
                f"budget.time is {self.budget!r}; it is a fraction of the dense time, in (0, 1]"
            )
        object.__setattr__(self, "block", check_block(self.block))
        if self.precision not in PRECISIONS:
            raise AccelError(
                f"precision {self.precision!r} is unknown; {nearest(self.precision, PRECISIONS)}"
            )
        for name, least in (("rows", 1), ("cost_rounds", 1), ("seed", 0)):
            check_whole(name, getattr(self, name), least)
        if not finite(self.tolerance) or self.tolerance < 0:
            raise AccelError(f"tolerance is {self.tolerance!r}; it is a number, at least 0")

    def digest(self, model: ModelConfig, weights: str) -> str:
        """Names what costs and calibration depend on; the budget is not part of it."""
        parts = {
            "device": device_name(model.resolved_device()),
            "versions": versions(),
            "code": code_digest(*CODE),
            "cost_rounds": self.cost_rounds,
            "space": self.space,
            "schedule": self.schedule.to_dict(),
            "block": self.block,
            "precision": self.precision,
            "rows": self.rows,
            "tolerance": self.tolerance,
            "seed": self.seed,
            "model": {**asdict(model), "prompts": ()},
            "weights": weights,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def candidates_of(space: Mapping[str, Any]) -> tuple[Choice, ...]:
    """Every select with every order and every rest of its group; each once."""
    found: dict[Choice, None] = {}
    for number, group in enumerate(space.get("groups", ())):
        missing = {"select", "orders", "rests"} - set(group)
        if missing:
            raise AccelError(f"space.groups[{number}] lacks {', '.join(sorted(missing))}")
        for select, order, rest in itertools.product(
            group["select"], group["orders"], group["rests"]
        ):
            found[Choice.from_dict({"select": select, "order": order, "rest": rest})] = None
    if not found:
        raise AccelError("the space has no candidate; see configs/space/video.yaml")
    return tuple(found)


def fingerprint(model: nn.Module) -> str:
    """Eight hexadecimal digits of the weights: another training has other ones."""
    sums = [float(p.detach().double().sum()) for p in model.parameters()]
    return hashlib.sha256(repr(sums).encode()).hexdigest()[:8]


class Search:
    """The stages of a search; what each makes is kept in `folder` and not made again."""

    def __init__(self, model: ModelConfig, settings: SearchSettings, folder: Path) -> None:
        self.settings = settings
        self.folder = folder
        self.candidates = candidates_of(settings.space)
        steps = int(model.call["num_inference_steps"])
        bands = {settings.schedule.phase(step, steps).band for step in range(steps)}
        for band in range(settings.schedule.n_bands):
            if band not in bands:
                raise AccelError(
                    f"band {band} of the schedule holds none of the {steps} steps; look at"
                    " schedule.bands, dense_start and dense_end"
                )
        self.host = Host(model)
        self.denoiser = denoisers_of(self.host.pipe)[0]
        self.digest = settings.digest(model, fingerprint(self.denoiser))
        self.geometry = geometry_of(self.denoiser)
        for choice in self.candidates:  # refuse now what could not stand in a plan later
            Plan.uniform("candidate", self.geometry, choice, block=settings.block)
        # dense everywhere, but in the bands of the plan to come: what the calibration observes
        self.dense_plan = replace(
            dense_plan(self.geometry),
            sites={
                s.name: ((DENSE,) * s.heads,) * settings.schedule.n_bands
                for s in self.geometry.sites
            },
            schedule=settings.schedule,
            precision=settings.precision,
        )

    def run(self) -> tuple[Plan, list[Point]]:
        """The plan within the budget, and the front it lies on."""
        path = self.folder / f"baseline-{self.digest}.json"
        prompt, seed = self.host.config.calibration[0], self.settings.seed
        baseline = load_or_measure_baseline(self.host, prompt, seed, path)
        layout = baseline.layout
        table = load_or_measure_costs(
            self.host,
            layout,
            self.settings.block,
            self.candidates,
            self.folder / f"costs-{self.digest}.json",
            self.settings.cost_rounds,
            self.settings.precision,
        )
        prices = self._prices(layout, table)
        profile = self._profile(prices, baseline)
        times = self._times(prices, table, baseline)
        points = front(profile, times, self._sensitivity(profile, prices, times, table))
        point = within(points, self.settings.budget * times.fastest_dense)
        plan = self._plan(point, table, layout, baseline)
        if self.settings.validate:
            plan = self._validated(plan, baseline)
        write_atomically(
            self.folder / "front.json",
            json.dumps([{"time": p.time, "harm": p.harm} for p in points], indent=1),
        )
        draw_front(points, plan, self.folder / "front.png")
        return plan, points

    def _prices(self, layout: Layout, table: CostTable) -> list[float]:
        """Of a head under each candidate, as a ratio to a dense head; selections not included."""
        prices = []
        for choice in self.candidates:
            keep = keep_of(choice, layout, self.settings.block)
            if keep is None:
                raise AccelError(f"{choice.name} has no keep of its own, so it cannot be priced")
            prices.append(table.price(keep, choice.rest, choice.order != "thw"))
        return prices

    def _profile(self, prices: list[float], baseline: Baseline) -> Profile:
        """The calibration, one generation for each prompt; a finished prompt is not repeated."""
        path = self.folder / f"profile-{self.digest}.json"
        done: list[str] = []
        profile = Profile(self.candidates)
        if path.is_file():
            saved = json.loads(path.read_text())
            done, profile = saved["done"], Profile.from_dict(saved["profile"])
        prompts = [p for p in self.host.config.calibration if p not in done]
        bands = self.settings.schedule.n_bands
        jobs = len(prompts) * len(self.geometry.sites) * bands * 2 * baseline.branches
        with tqdm(total=jobs, desc="calibrating", unit="site") as bar:
            sites = sites_of(self.denoiser)
            projection = adapter_of(self.denoiser).projection
            calibrator = Calibrator(
                profile,
                self.settings.schedule,
                self.settings.block,
                prices,
                {site.name: projection(module).detach() for site, module in sites.items()},
                precision=self.settings.precision,
                rows=self.settings.rows,
                tolerance=self.settings.tolerance,
                progress=bar.update,
            )
            for prompt in prompts:
                calibrator.begin()
                with enabled(self.host.pipe, self.dense_plan):
                    session_of(self.denoiser).observer = calibrator
                    self.host.generate(prompt, self.settings.seed)
                done.append(prompt)
                write_atomically(path, json.dumps({"done": done, "profile": profile.to_dict()}))
        return profile

    def _sensitivity(
        self, profile: Profile, prices: list[float], times: Times, table: CostTable
    ) -> list[float]:
        """Of every band, by probes that are sparse in it alone, as far as the tolerance allows."""
        probes: dict[int, tuple[Plan, float]] = {}
        bands = range(self.settings.schedule.n_bands)
        for band in bands:
            harm, sites = 0.0, {}
            for site in self.geometry.sites:
                errors = profile.errors[site.name, band]
                best = cheapest_harmless(errors, prices, self.settings.tolerance)
                harm += sum(float(errors[i, head]) for head, i in enumerate(best))
                chosen = tuple(self.candidates[i] for i in best)
                sites[site.name] = tuple(
                    chosen if b == band else (DENSE,) * site.heads for b in bands
                )
            probe = replace(self.dense_plan, name=f"probe of band {band}", sites=sites)
            probe = fastest_dense(probe, {self.settings.precision: table})
            probes[band] = probe, harm * times.steps[band]
        path = self.folder / f"probes-{self.digest}.json"
        return measure_sensitivities(self.host, probes, self.settings.seed, path)

    def _times(self, prices: list[float], table: CostTable, baseline: Baseline) -> Times:
        steps, schedule = self.host.steps, self.settings.schedule
        phases = [schedule.phase(s, steps) for s in range(steps)]
        heads = {s.name: s.heads for s in self.geometry.sites}
        return Times(
            head={s: share / steps / heads[s] for s, share in baseline.share.items()},
            steps=[sum(p.band == b for p in phases) for b in range(schedule.n_bands)],
            looks=[
                select_price(c, table)
                * len({p.generation for p in phases if not p.dense})
                / schedule.n_bands
                for c in self.candidates
            ],
            price=prices,
            dense=dense_price(table),
            share=baseline.total_share,
        )

    def _plan(self, point: Point, table: CostTable, layout: Layout, baseline: Baseline) -> Plan:
        model = self.host.config
        plan = Plan.of(
            f"{model.name}-{self.settings.budget:g}",
            replace(self.geometry, layout=layout),
            point.choices(self.candidates),
            schedule=self.settings.schedule,
            block=self.settings.block,
            precision=self.settings.precision,
            provenance={
                "made_by": "accel-search",
                "model_path": model.path,
                "scheduler": type(self.host.pipe.scheduler).__name__,
                "call": dict(model.call),
                "calibration": list(model.calibration),
                "budget_time": self.settings.budget,
                "tolerance": self.settings.tolerance,
                "rows": self.settings.rows,
                "seed": self.settings.seed,
                "dtype": model.dtype,
                "revision": model.load.get("revision"),
                "weights": fingerprint(self.denoiser),
                "device": device_name(self.host.device),
                "versions": versions(),
            },
        )
        tables = {self.settings.precision: table}
        plan = price(
            fastest_dense(plan, tables),
            tables,
            layout=layout,
            steps=self.host.steps,
            share=baseline.total_share,
        )
        return replace(plan, expected={**plan.expected, "psnr": predicted_psnr(point.harm)})

    def _validated(self, plan: Plan, baseline: Baseline) -> Plan:
        """The plan with what it measures on the calibration prompts, beside dense.

        Arms are warmed up and take turns in being first. `own` is accel's own dense attention, the
        other candidate for the fastest dense run; quality is against the host's.
        """
        host = self.host
        arms: dict[str, Plan | None] = {"dense": None, "plan": plan}
        if plan.dense == "kernel":
            arms["own"] = recipe(
                "full" if self.settings.precision == "full" else "half", self.geometry
            )
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        quality = []
        prompts = host.config.calibration
        with tqdm(total=len(arms) * len(prompts), desc="validating", unit="video") as bar:
            for arm in arms.values():
                self._timed(
                    arm, prompts[0], num_inference_steps=warm_up_steps(plan.schedule, host.steps)
                )
            for number, prompt in enumerate(prompts):
                videos = {}
                for name in list(arms)[:: -1 if number % 2 else 1]:
                    videos[name], took = self._timed(arms[name], prompt)
                    seconds[name].append(took)
                    bar.update()
                quality.append(capped(psnr(videos["plan"], videos["dense"])))
        over = {
            name: median(a / b for a, b in zip(times, seconds["plan"], strict=True))
            for name, times in seconds.items()
        }
        measured = {
            "measured_speedup": over["dense"],
            "measured_speedup_over_own_dense": over.get("own"),
            "measured_psnr": mean(quality),
            "dense_seconds": baseline.seconds,
        }
        return replace(plan, expected={**plan.expected, **measured})

    def _timed(self, plan: Plan | None, prompt: str, **overrides: Any) -> tuple[Video, float]:
        """A generation with `plan`, or by the untouched host, and its seconds."""
        with nullcontext() if plan is None else enabled(self.host.pipe, plan, check=False):
            start = time.perf_counter()
            video = self.host.generate(prompt, self.settings.seed, **overrides)
            return video, time.perf_counter() - start


def describe(plan: Plan, points: Sequence[Point], budget: float) -> Iterable[str]:
    """What a person wants to know of a finished search, line by line."""
    expected = plan.expected
    fastest = dense_speedup(expected, str(plan.precision)) if plan.dense == "kernel" else 1.0
    assert fastest is not None  # a priced plan has its own precision
    speedup = expected["speedup"] / fastest
    yield f"front: {len(points)} plans, time {points[-1].time:.2f} to {points[0].time:.2f} of dense"
    yield (
        f"plan {plan.name!r} ({plan.digest}): predicted speed-up {expected['speedup']:.2f} over the"
        f" host's dense attention, {speedup:.2f} over the fastest dense here;"
        f" PSNR {expected['psnr']:.1f} dB"
    )
    if 1 / speedup > budget + 0.01:
        yield (
            f"the budget of {budget:g} is not reached: this is the fastest plan of the space; make"
            " schedule.dense_start smaller, or add cheaper candidates to the space"
        )
    if "measured_speedup" in expected:
        over_own = expected["measured_speedup_over_own_dense"]
        beside = "" if over_own is None else f" ({over_own:.2f} over accel's own dense kernel)"
        yield (
            f"measured on the calibration prompts: {expected['measured_speedup']:.2f} times the"
            f" host's dense{beside}, PSNR {expected['measured_psnr']:.1f} dB"
        )
