"""What a search knows before its first trial: costs, calibration, and what each band's errors do.

Everything here is made once, kept in the output folder under the digest of what it depends on, and
shared by all workers and all budgets.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from accel.choice import DENSE, Choice
from accel.cost import CostTable, dense_price, fastest_dense, keep_of, looks_price, price
from accel.errors import AccelError
from accel.files import write_atomically
from accel.geometry import Geometry
from accel.origin import read_json
from accel.pipelines.adapters import denoisers_of, geometry_of
from accel.pipelines.calibration import calibrate, fingerprint
from accel.pipelines.calibrator import cheapest_harmless
from accel.pipelines.cost_files import kept
from accel.pipelines.host import Host, ModelConfig
from accel.pipelines.pricing import (
    Baseline,
    dense_plan,
    load_or_measure_baseline,
    load_or_measure_costs,
)
from accel.pipelines.provenance import code_digest, device_name, versions
from accel.plan import Plan
from accel.profile import Profile
from accel.recipes import Demand
from accel.search.genome import Genes
from accel.search.objective import Objective
from accel.search.resolve import Resolved, Resolver, Times
from accel.search.sensitivity import predicted_quality, sensitivity
from accel.search.settings import SearchSettings, candidates_of
from accel.untrusted import finite, typed

HERE = Path(__file__).parent
# what finds prices and harms, besides the code that every measurement depends on
CODE = (
    *(HERE / f"{name}.py" for name in ("objective", "prepare", "sensitivity")),
    *(
        HERE.parent / "pipelines" / f"{name}.py"
        for name in (
            *("calibration", "calibrator", "candidate_measures"),
            *("cost_files", "dense_run", "host", "pricing"),
        )
    ),
)


def digest_of(settings: SearchSettings, model: ModelConfig, weights: str) -> str:
    """Names what costs and calibration depend on; budget, trials and storage are no part of it."""
    parts = {
        "device": device_name(model.resolved_device()),
        "versions": versions("optuna"),
        "code": code_digest(*CODE),
        "hardware": repr(settings.hardware),
        "cost_rounds": settings.cost_rounds,
        "space": settings.space,
        "schedule": settings.schedule.to_dict(),
        "block": settings.block,
        "precisions": settings.precisions,
        "rows": settings.rows,
        "tolerance": settings.tolerance,
        "seed": settings.seed,
        "fidelity": (settings.evolution.fidelity, settings.evolution.steps),
        "model": {**asdict(model), "prompts": ()},
        "weights": weights,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True, slots=True)
class Known:
    """What plans are made and judged by. tables: costs by precision."""

    digest: str
    geometry: Geometry
    candidates: tuple[Choice, ...]
    baseline: Baseline
    tables: dict[str, CostTable]
    keeps: dict[Choice, float]
    profile: Profile
    sensitivities: tuple[float, ...]
    genes: Genes
    resolver: Resolver

    def priced(self, plan: Plan) -> Plan:
        """`plan` with what it is predicted to take, its dense calls on what is faster here."""
        plan = fastest_dense(plan, self.tables)
        return price(plan, self.tables, self.baseline, keeps=self.keeps)

    @property
    def dense_seconds(self) -> float:
        """Predicted seconds of the host's own dense generation."""
        return self.baseline.dense_seconds()

    def fingerprint(self) -> str:
        """Names the prices and errors themselves: trials of other ones are not comparable."""
        parts: list[Any] = [self.sensitivities, self.baseline.to_dict()]
        parts += [(word, asdict(table)) for word, table in self.tables.items()]
        parts += [(key, errors.tolist()) for key, errors in self.profile.errors.items()]
        parts += [(choice.to_dict(), keep) for choice, keep in self.keeps.items()]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def prepare(host: Host, settings: SearchSettings, folder: Path) -> Known:
    """Measure costs, calibrate, and probe the bands, as far as `folder` does not have it."""
    denoiser = denoisers_of(host.pipe)[0]
    digest = digest_of(settings, host.config, fingerprint(denoiser))
    geometry, candidates = geometry_of(denoiser), candidates_of(settings.space)
    prompt = host.config.calibrated_on[0]
    baseline = load_or_measure_baseline(
        host, prompt, settings.seed, folder / f"baseline-{digest}.json", settings.hardware
    )
    tables = {
        word: load_or_measure_costs(
            host,
            baseline.layout,
            settings.block,
            candidates,
            folder / f"costs-{digest}-{word}.json",
            settings.cost_rounds,
            word,
            batch=baseline.batch,
            hardware=settings.hardware,
        )
        for word in settings.precisions
    }
    first = tables[settings.precisions[0]]
    static = {c: keep_of(c, baseline.layout, settings.block) for c in candidates}
    prices = [_price(c, 1.0 if keep is None else keep, first) for c, keep in static.items()]
    demand = Demand(
        candidates=candidates,
        schedule=settings.schedule,
        block=settings.block,
        precision=settings.precisions[0],
        precisions=tuple(settings.precisions[1:]),
        tolerance=settings.tolerance,
    )
    profile = calibrate(host, demand, folder, seed=settings.seed, rows=settings.rows, prices=prices)
    keeps = _realised(candidates, profile)
    prices = [_price(c, keeps[c], first) for c in candidates]
    genes = Genes.of(
        [site.name for site in geometry.sites],
        settings.schedule.n_bands,
        levels=settings.evolution.levels,
        dense_starts=settings.dense_starts,
        precisions=settings.precisions,
    )
    times = {
        (start, word): _times(settings, baseline, geometry, tables[word], keeps, start)
        for start in settings.dense_starts
        for word in settings.precisions
    }
    found = _sensitivities(host, settings, geometry, profile, prices, tables, folder, digest, times)
    resolver = Resolver(genes, profile, times, found, settings.evolution.floor)
    return Known(
        digest,
        geometry,
        candidates,
        baseline,
        tables,
        keeps,
        profile,
        found,
        genes,
        resolver,
    )


def _price(choice: Choice, keep: float, table: CostTable) -> float:
    """Of a head that keeps so much, as a ratio to a dense one; selections not included."""
    if keep == 0 and choice.rest == "drop":
        return 0.0
    return table.price(keep, choice.rest, choice.order != "thw")


def _looks_price(choice: Choice, table: CostTable, looks: int) -> float:
    found = looks_price(choice, table, looks)
    if found is None:
        raise AccelError(
            f"the table of costs has no price of the selections of {choice.name!r}; measure it"
            " anew, or leave that out of the space"
        )
    return found


def _realised(candidates: Sequence[Choice], profile: Profile) -> dict[Choice, float]:
    """The mean share of blocks that each candidate kept in the calibration."""
    found = [keeps.double().mean(1) for keeps in profile.keeps.values()]
    means = torch.stack(found).mean(0)
    return dict(zip(candidates, means.tolist(), strict=True))


def _times(
    settings: SearchSettings,
    baseline: Baseline,
    geometry: Geometry,
    table: CostTable,
    keeps: dict[Choice, float],
    dense_start: float,
) -> Times:
    schedule = replace(settings.schedule, dense_start=dense_start)
    phases = [schedule.phase(step, baseline.steps) for step in range(baseline.steps)]
    bands = range(schedule.n_bands)
    looks = [len({p.generation for p in phases if p.band == band}) for band in bands]
    heads = {s.name: s.heads for s in geometry.sites}
    return Times(
        head={s: share / baseline.steps / heads[s] for s, share in baseline.share.items()},
        steps=[sum(p.band == band for p in phases) for band in bands],
        price=[_price(c, keep, table) for c, keep in keeps.items()],
        looks=[[_looks_price(c, table, looks[band]) for c in keeps] for band in bands],
        total_steps=baseline.steps,
        dense=dense_price(table),
    )


def _sensitivities(
    host: Host,
    settings: SearchSettings,
    geometry: Geometry,
    profile: Profile,
    prices: list[float],
    tables: dict[str, CostTable],
    folder: Path,
    digest: str,
    times: dict[tuple[float, str], Times],
) -> tuple[float, ...]:
    """Of every band, by probes that are sparse in it alone, as far as the tolerance allows."""
    evolution = settings.evolution
    path = folder / f"probes-{digest}.json"
    known: dict[str, dict[str, float]] = kept(path, _read_probes) or {}
    fidelity = "whole" if evolution.fidelity == "profile" else evolution.fidelity
    judge = Objective(
        host, folder, digest, fidelity=fidelity, steps=evolution.steps, seed=settings.seed
    )
    steps = times[settings.dense_starts[0], settings.precisions[0]].steps
    bands = range(settings.schedule.n_bands)
    prompts = host.config.calibrated_on
    jobs = [(b, p) for p in prompts for b in bands if p not in known.get(str(b), {})]
    harms = []
    with tqdm(total=len(jobs), desc="probing", unit="run", disable=not jobs) as bar:
        for band in bands:
            harm, sites = 0.0, {}
            for site in geometry.sites:
                errors = profile.errors[site.name, band]
                best = cheapest_harmless(errors, prices, settings.tolerance)
                harm += sum(float(errors[i, head]) for head, i in enumerate(best))
                chosen = tuple(profile.candidates[i] for i in best)
                sites[site.name] = tuple(
                    chosen if b == band else (DENSE,) * site.heads for b in bands
                )
            harms.append(harm * steps[band])
            probe = replace(
                dense_plan(geometry),
                name=f"probe of band {band}",
                sites=sites,
                schedule=settings.schedule,
                block=settings.block,
                precision=settings.precisions[0],
            )
            probe = fastest_dense(probe, {w: tables[w] for w in settings.precisions[:1]})
            for prompt in (p for b, p in jobs if b == band):
                known.setdefault(str(band), {})[prompt] = judge(probe, [prompt])
                write_atomically(path, json.dumps(known, indent=1))
                bar.update()
    return tuple(
        sensitivity([known[str(band)][prompt] for prompt in prompts], harms[band]) for band in bands
    )


def _read_probes(path: Path) -> dict[str, dict[str, float]]:
    """Band -> prompt -> quality in dB, as untrusted input."""
    bands = typed(f"{path}", read_json(path), dict)
    for band, by_prompt in bands.items():
        prompts = typed(f"{path}: band {band!r:.20}", by_prompt, dict)
        if not all(finite(quality) for quality in prompts.values()):
            raise AccelError(f"{path}: band {band!r:.20} has a quality that is not a number")
    return dict(bands)


def plan_of(
    known: Known,
    resolved: Resolved,
    settings: SearchSettings,
    host: Host,
    name: str,
    genome: Sequence[int] = (),
) -> Plan:
    """The priced plan of a resolved genome, with how it was made."""
    model = host.config
    words = resolved.precision
    precision = next(iter(words.values())) if len(set(words.values())) == 1 else dict(words)
    plan = Plan.of(
        name,
        replace(known.geometry, layout=known.baseline.layout),
        resolved.choices(known.candidates),
        schedule=replace(settings.schedule, dense_start=resolved.dense_start),
        block=settings.block,
        precision=precision,
        provenance={
            "made_by": "accel-search",
            "model_path": model.path,
            "scheduler": type(host.pipe.scheduler).__name__,
            "call": dict(model.call),
            "calibration": list(model.calibration),
            "tolerance": settings.tolerance,
            "rows": settings.rows,
            "seed": settings.seed,
            "genome": list(genome),
            "dtype": model.dtype,
            "revision": model.load.get("revision"),
            "weights": fingerprint(denoisers_of(host.pipe)[0]),
            "device": device_name(host.device),
            "versions": versions("optuna"),
        },
    )
    plan = known.priced(plan)
    if "seconds" not in plan.expected:
        raise AccelError(f"plan {name!r} cannot be priced: a choice has no known keep")
    quality = predicted_quality(resolved.harm)
    return replace(plan, expected={**plan.expected, "quality": quality})
