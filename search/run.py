"""One search: measure costs, calibrate, sweep the budget, write and check the plan."""

import hashlib
import itertools
import json
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median
from typing import Any

from tqdm import tqdm

from accel.cost import CostTable, Shape, keep_of, measure, price, select_price
from accel.errors import AccelError
from accel.estimators import Estimator
from accel.files import write_atomically
from accel.layout import Layout
from accel.metrics import psnr
from accel.pipelines.adapters import adapter_of, denoisers_of, geometry_of, sites_of
from accel.pipelines.enable import enabled, session_of
from accel.pipelines.host import Host, ModelConfig
from accel.plan import DENSE, Choice, Plan
from accel.schedule import Schedule
from accel.search.front import Point, Times, front, within
from accel.search.picture import draw_front
from accel.search.profile import Calibrator, Profile


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """What a search is asked for; see `configs/search.yaml`."""

    space: Mapping[str, Any]
    budget: float
    schedule: Schedule
    block: tuple[int, int] = (128, 64)
    rows: int = 128
    tolerance: float = 0.02
    cost_rounds: int = 5
    validate: bool = True
    seed: int = 1000

    def __post_init__(self) -> None:
        if not 0 < self.budget <= 1:
            raise AccelError(
                f"budget.time is {self.budget}; it is a fraction of the dense time, in (0, 1]"
            )
        object.__setattr__(self, "block", tuple(self.block))

    def digest(self, model: ModelConfig) -> str:
        """Names what a calibration depends on; the budget is not part of it."""
        parts = {
            "space": self.space,
            "schedule": self.schedule.to_dict(),
            "block": self.block,
            "rows": self.rows,
            "tolerance": self.tolerance,
            "seed": self.seed,
            "model": {**asdict(model), "prompts": ()},
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


class Search:
    """The stages of a search; what each makes is kept in `folder` and not made again."""

    def __init__(self, model: ModelConfig, settings: SearchSettings, folder: Path) -> None:
        self.settings = settings
        self.folder = folder
        self.digest = settings.digest(model)
        self.candidates = candidates_of(settings.space)
        self.host = Host(model)
        self.denoiser = denoisers_of(self.host.pipe)[0]
        self.geometry = geometry_of(self.denoiser)
        self.dense_plan = Plan.uniform(
            "dense", self.geometry, DENSE, schedule=settings.schedule, block=settings.block
        )

    def run(self) -> tuple[Plan, list[Point]]:
        """The plan within the budget, and the front it lies on."""
        baseline = self._stage("baseline", self._baseline)
        layout = Layout.of(tuple(baseline["grid"]))
        table = self._costs(layout)
        keeps = [keep_of(c, layout, self.settings.block) for c in self.candidates]
        unknown = [c.name for c, k in zip(self.candidates, keeps, strict=True) if k is None]
        if unknown:
            raise AccelError(f"{unknown[0]} has no keep of its own, so it cannot be priced")
        profile = self._profile(layout, table, baseline)
        points = front(profile, self._times(profile, table, baseline))
        plan = self._plan(within(points, self.settings.budget), table, layout, baseline)
        if self.settings.validate:
            plan = self._validated(plan, baseline)
        write_atomically(
            self.folder / "front.json",
            json.dumps([{"time": p.time, "harm": p.harm} for p in points], indent=1),
        )
        draw_front(points, plan, self.folder / "front.png")
        return plan, points

    def _stage(self, name: str, make: Any) -> Any:
        """What an earlier run with the same settings left behind, or a fresh one."""
        path = self.folder / f"{name}-{self.digest}.json"
        if path.is_file():
            return json.loads(path.read_text())
        made = make()
        write_atomically(path, json.dumps(made))
        return made

    def _baseline(self) -> dict[str, Any]:
        """A dense generation of the first calibration prompt: its time and the sites' part."""
        host, prompt = self.host, self.host.config.calibration[0]
        host.generate(prompt, self.settings.seed, num_inference_steps=2)
        with enabled(host.pipe, self.dense_plan):
            start = time.perf_counter()
            host.generate(prompt, self.settings.seed)
            seconds = time.perf_counter() - start
            session = session_of(self.denoiser)
            by_site = {s.name: 0.0 for s in self.geometry.sites}
            for (site, _), record in session.records.items():
                record.settle()
                by_site[site] += sum(record.seconds)
            layout = session.run.layout
        if layout is None or not layout.grids:
            raise AccelError("the layout of the model's call could not be read; see accel.enable")
        branches = len(session.run.first_branches)
        share = {site: s / seconds for site, s in by_site.items()}
        return {"seconds": seconds, "share": share, "grid": layout.grid, "branches": branches}

    def _costs(self, layout: Layout) -> CostTable:
        site = self.geometry.sites[0]
        shape = Shape(
            tokens=layout.length,
            heads=site.heads,
            head_dim=site.head_dim,
            dtype=self.host.config.dtype,
            device=str(self.host.device.type),
            block=self.settings.block,
        )
        path = self.folder / f"cost-{self.digest}.json"
        if path.is_file():
            table = CostTable.load(path)
            if table.shape == shape:
                return table
        estimators = {
            c.select.kind: c.select for c in self.candidates if isinstance(c.select, Estimator)
        }
        table = measure(
            shape,
            estimators=tuple(estimators.values()),
            layout=layout,
            rounds=self.settings.cost_rounds,
            progress=lambda jobs: tqdm(list(jobs), desc="measuring costs", unit="price"),
        )
        table.save(path)
        return table

    def _prices(self, profile: Profile, table: CostTable) -> list[float]:
        keeps = [
            profile.keeps.get(i, keep_of(c, Layout.of((1, 1, 1)), (16, 16)) if c.online else 1.0)
            for i, c in enumerate(self.candidates)
        ]
        return [
            table.price(k or 1.0, c.rest, c.order != "thw")
            for k, c in zip(keeps, self.candidates, strict=True)
        ]

    def _profile(self, layout: Layout, table: CostTable, baseline: Mapping[str, Any]) -> Profile:
        """The calibration, one generation for each prompt; a finished prompt is not repeated."""
        path = self.folder / f"profile-{self.digest}.json"
        done: list[str] = []
        profile = Profile(self.candidates)
        if path.is_file():
            saved = json.loads(path.read_text())
            done, profile = saved["done"], Profile.from_dict(saved["profile"])
        profile.keeps = {
            i: keep_of(c, layout, self.settings.block) or 1.0 for i, c in enumerate(self.candidates)
        }
        prompts = [p for p in self.host.config.calibration if p not in done]
        bands = self.settings.schedule.n_bands
        jobs = len(prompts) * len(self.geometry.sites) * bands * 2 * baseline["branches"]
        with tqdm(total=jobs, desc="calibrating", unit="site") as bar:
            sites = sites_of(self.denoiser)
            projection = adapter_of(self.denoiser).projection
            calibrator = Calibrator(
                profile,
                self.settings.schedule,
                self.settings.block,
                self._prices(profile, table),
                {site.name: projection(module).detach() for site, module in sites.items()},
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

    def _times(self, profile: Profile, table: CostTable, baseline: Mapping[str, Any]) -> Times:
        steps, schedule = self.host.steps, self.settings.schedule
        phases = [schedule.phase(s, steps) for s in range(steps)]
        heads = {s.name: s.heads for s in self.geometry.sites}
        return Times(
            head={s: share / steps / heads[s] for s, share in baseline["share"].items()},
            steps=[sum(p.band == b for p in phases) for b in range(schedule.n_bands)],
            looks=[
                select_price(c, table)
                * len({p.generation for p in phases if not p.dense})
                / schedule.n_bands
                for c in self.candidates
            ],
            price=self._prices(profile, table),
        )

    def _plan(
        self, point: Point, table: CostTable, layout: Layout, baseline: Mapping[str, Any]
    ) -> Plan:
        model = self.host.config
        plan = Plan.of(
            f"{model.name}-{self.settings.budget:g}",
            replace(self.geometry, layout=layout),
            point.choices(self.candidates),
            schedule=self.settings.schedule,
            block=self.settings.block,
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
                "device": platform.processor() or platform.machine(),
                "versions": {n: version(n) for n in ("torch", "diffusers", "accel-suite")},
            },
        )
        share = sum(baseline["share"].values())
        return price(plan, table, layout=layout, steps=self.host.steps, share=share)

    def _validated(self, plan: Plan, baseline: Mapping[str, Any]) -> Plan:
        """The plan with what it measures on the calibration prompts, dense and sparse in turn."""
        host, seed = self.host, self.settings.seed
        ratios, quality = [], []
        for prompt in tqdm(host.config.calibration, desc="validating", unit="prompt"):
            start = time.perf_counter()
            dense = host.generate(prompt, seed)
            middle = time.perf_counter()
            with enabled(host.pipe, plan, check=False):
                begun = time.perf_counter()
                sparse = host.generate(prompt, seed)
                ratios.append((middle - start) / (time.perf_counter() - begun))
            quality.append(psnr(sparse, dense))
        measured = {
            "measured_speedup": median(ratios),
            "measured_psnr": mean(quality),
            "dense_seconds": baseline["seconds"],
        }
        return replace(plan, expected={**plan.expected, **measured})


def describe(plan: Plan, points: Sequence[Point]) -> Iterable[str]:
    """What a person wants to know of a finished search, line by line."""
    expected = plan.expected
    yield f"front: {len(points)} plans, time {points[-1].time:.2f} to {points[0].time:.2f} of dense"
    yield f"plan {plan.name!r} ({plan.digest}): predicted speed-up {expected['speedup']:.2f}"
    if "measured_speedup" in expected:
        yield (
            f"measured on the calibration prompts: {expected['measured_speedup']:.2f} times dense,"
            f" PSNR {expected['measured_psnr']:.1f} dB"
        )
