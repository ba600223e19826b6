"""Files of what was measured: the dense generation of a model, and tables of prices."""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from accel.baseline import Baseline
from accel.cost_table import CostTable, Shape
from accel.errors import AccelError
from accel.estimators import Estimator
from accel.files import write_atomically
from accel.geometry import Geometry
from accel.hardware import CostSource
from accel.origin import Origin, check_origin, origin_from_dict, read_json
from accel.untrusted import table

__all__ = ["found_baseline", "found_table", "kept", "read_baseline", "save_baseline"]

logger = logging.getLogger("accel")

T = TypeVar("T")


def kept(path: Path, read: Callable[[Path], T]) -> T | None:
    """What `read` finds in `path`; None where there is no file, or a broken one, which is said:
    what a crash or another program left can be measured again.
    """
    if not path.is_file():
        return None
    try:
        return read(path)
    except AccelError as error:
        logger.warning("accel measures anew: %s", error)
        return None


def save_baseline(baseline: Baseline, path: Path, origin: Origin) -> None:
    """Keep a baseline, with where it was measured, in a file."""
    data = {
        "origin": {
            "device": origin.device,
            "versions": dict(origin.versions),
            "code": origin.code,
        },
        "baseline": baseline.to_dict(),
    }
    write_atomically(path, json.dumps(data, indent=1, allow_nan=False))


def read_baseline(path: Path) -> tuple[Baseline, Origin]:
    data = read_json(path)
    try:
        data = table("the file", data, {"origin", "baseline"}, {"origin", "baseline"})
        return Baseline.from_dict(data["baseline"]), origin_from_dict(data["origin"])
    except AccelError as error:
        raise AccelError(f"{path}: {error}") from error


def found_baseline(source: CostSource, geometry: Geometry, steps: int, here: Origin) -> Baseline:
    """The baseline of this model and number of steps in a folder of tables."""
    assert source.table is not None
    names = {site.name for site in geometry.sites}
    for path in _files(source.table, "baseline*.json"):
        found, origin = read_baseline(path)
        if set(found.share) == names and found.steps == steps:
            check_origin(path, origin, here, source.foreign)
            return found
    raise AccelError(
        f"hardware.table is {source.table!r}, which has no baseline*.json of a model with these"
        f" {len(names)} sites and {steps} steps; make one there with accel-search"
    )


def found_table(
    source: CostSource, shape: Shape, wanted: Mapping[str, Estimator], here: Origin
) -> CostTable:
    """The table of this shape, for whatever device, in a folder of tables or the file itself."""
    assert source.table is not None
    seen = []
    for path in _files(source.table, "costs*.json"):
        found = CostTable.load(path)
        seen.append(found.shape)
        if replace(found.shape, device=shape.device) == shape:
            check_origin(path, found.origin, here, source.foreign)
            lacking = sorted(set(wanted) - set(found.select))
            if lacking:
                raise AccelError(
                    f"{path} has no price of the selections {', '.join(lacking)}; measure them"
                    " there, or leave them out of the space"
                )
            return found
    raise AccelError(
        f"hardware.table is {source.table!r}, which has no table of {shape}; it has"
        f" {', '.join(map(str, seen)) or 'none at all'}"
    )


def _files(folder: str, pattern: str) -> list[Path]:
    path = Path(folder)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise AccelError(f"hardware.table is {folder!r}, which is neither a folder nor a file here")
    return sorted(path.glob(pattern))
