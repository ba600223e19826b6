"""The calibration of a model: one generation for each prompt under a dense plan, observed.

What it sees is kept in a file after every prompt, so that a calibration which was interrupted goes
on at the prompt it was at, and one that is finished serves every later plan with the same demand.
The file is named after what was asked; when it was measured with other weights, on another device
or by other code, it is measured anew, and says so.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from accel.choice import DENSE
from accel.errors import AccelError, PlanError
from accel.map_statistics import best_orders
from accel.pipelines.adapters import adapter_of, denoisers_of, geometry_of, sites_of
from accel.pipelines.calibrator import Branches, Calibrator
from accel.pipelines.enable import enabled, session_of
from accel.pipelines.host import Host
from accel.pipelines.mass_observer import MassObserver
from accel.pipelines.pricing import dense_plan
from accel.pipelines.provenance import code_digest, device_name, versions
from accel.plan import Plan
from accel.profile import Profile
from accel.recipes import Demand, demand, recipe

__all__ = ["calibrate", "calibrated_recipe", "fingerprint"]

logger = logging.getLogger("accel")

CODE = tuple(
    Path(__file__).parent / f"{name}.py"
    for name in ("calibration", "calibrator", "candidate_measures", "host", "mass_observer")
)
# what has to be the same for a calibration to be gone on with
SAME = ("weights", "device", "versions", "code")


def calibrate(
    host: Host,
    asked: Demand,
    folder: Path,
    *,
    prompts: Sequence[str] | None = None,
    seed: int = 1000,
    rows: int = 128,
    prices: Sequence[float] | None = None,
    branches: Branches = "all",
) -> Profile:
    """What was asked about the first denoiser of a pipeline, from `folder` as far as it is there.

    prompts: those of the model's configuration by default; all with one seed. rows, prices and
    branches: see `Calibrator`. Prices steer the provisional choices alone, so another calibration
    is not made for other ones.
    """
    model = denoisers_of(host.pipe)[0]
    prompts = host.config.calibrated_on if prompts is None else tuple(prompts)
    _check_bands(asked, host.steps)
    told = {
        "model_path": host.config.path,
        "revision": host.config.load.get("revision"),
        "dtype": host.config.dtype,
        "scheduler": type(host.pipe.scheduler).__name__,
        "call": dict(host.config.call),
        "seed": seed,
        "rows": rows,
        "branches": branches,
        "tolerance": asked.tolerance,
    }
    path = Path(folder) / f"profile-{_digest(asked, prompts, told)}.json"
    told |= {
        "weights": fingerprint(model),
        "device": device_name(host.device),
        "versions": versions(),
        "code": code_digest(*CODE),
    }
    profile = _begun(path, told)
    if profile is None:
        profile = Profile(asked.candidates, asked.orders, asked.precisions, asked=asked.asked)
        profile.provenance = {**told, "calibration": [], "calibration_mass": []}
    passes = ["calibration"] if asked.mass is None else ["calibration", "calibration_mass"]
    done = profile.provenance
    open_runs = sum(len(prompts) - len(done[name]) for name in passes)
    plan = _observed_plan(host, asked)
    with tqdm(
        total=open_runs * host.steps, desc="calibrating", unit="step", disable=not open_runs
    ) as bar:
        sites = sites_of(model)
        projection = adapter_of(model).projection
        observers: dict[str, Calibrator | MassObserver] = {
            "calibration": Calibrator(
                profile,
                asked,
                {site.name: projection(model, site.name).detach() for site in sites},
                rows=rows,
                prices=prices,
                branches=branches,
                progress=bar.update,
            ),
            "calibration_mass": MassObserver(profile, asked, progress=bar.update),
        }
        for name in passes:
            if name == "calibration_mass" and asked.mass is not None and not profile.mass_orders:
                profile.mass_orders = dict(best_orders(profile, asked.mass))
            for prompt in prompts:
                if prompt in done[name]:
                    continue
                observer = observers[name]
                observer.begin()
                with enabled(host.pipe, plan):
                    session_of(model).observer = observer
                    host.generate(prompt, seed)
                done[name].append(prompt)
                profile.save(path)
    return profile


def calibrated_recipe(
    host: Host,
    name: str,
    folder: Path,
    *,
    prompts: Sequence[str] | None = None,
    seed: int = 1000,
    rows: int = 128,
    **parameters: Any,
) -> Plan:
    """The plan of recipe `name` for a host, calibrated where the method has a demand.

    folder: keeps the calibration; a later plan with the same demand takes it over. parameters:
    override the method's defaults.
    """
    geometry = geometry_of(host.pipe)
    asked = demand(name, geometry, **parameters)
    if asked is None:
        return recipe(name, geometry, **parameters)
    profile = calibrate(host, asked, folder, prompts=prompts, seed=seed, rows=rows)
    plan = recipe(name, replace(geometry, layout=profile.layout), profile, **parameters)
    return replace(plan, provenance={**plan.provenance, **profile.provenance})


def fingerprint(model: nn.Module) -> str:
    """Eight hexadecimal digits of the weights: another training has other ones."""
    sums = [float(p.detach().double().sum()) for p in model.parameters()]
    return hashlib.sha256(repr(sums).encode()).hexdigest()[:8]


def _check_bands(asked: Demand, steps: int) -> None:
    """Refuse a band in which there is nothing to see."""
    bands = {asked.schedule.phase(step, steps).band for step in range(steps)}
    for band in range(asked.schedule.n_bands):
        if band not in bands:
            raise AccelError(
                f"band {band} of the schedule holds none of the {steps} steps; look at"
                " schedule.bands, dense_start and dense_end"
            )


def _digest(asked: Demand, prompts: Sequence[str], told: dict[str, Any]) -> str:
    """Names what a calibration is of."""
    parts = {
        **asdict(replace(asked, candidates=())),
        "candidates": [c.to_dict() for c in asked.candidates],
        "schedule": asked.schedule.to_dict(),
        "prompts": list(prompts),
        "told": told,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def _begun(path: Path, told: dict[str, Any]) -> Profile | None:
    """The profile in `path`, if there is one that was measured by the same and can be read."""
    if not path.is_file():
        return None
    try:
        profile = Profile.load(path)
    except PlanError as error:
        logger.warning("accel calibrates anew: %s", error)
        return None
    other = [name for name in SAME if profile.provenance.get(name) != told[name]]
    if other:
        logger.warning(
            "accel calibrates anew: %s was made with other %s", path.name, " and ".join(other)
        )
        return None
    return profile


def _observed_plan(host: Host, asked: Demand) -> Plan:
    """Dense everywhere, but in the bands of the plans to come: what a calibration observes."""
    geometry = geometry_of(host.pipe)
    return replace(
        dense_plan(geometry),
        sites={s.name: ((DENSE,) * s.heads,) * asked.schedule.n_bands for s in geometry.sites},
        schedule=asked.schedule,
        precision=asked.precision,
    )
