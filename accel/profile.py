"""A profile: what a calibration saw of a model, per site, step band and head.

Everything in it is a mean over what was observed: calibration prompts, branches of guidance, and
the first and last step of each band. Of every candidate

    errors       |(y' - y) W|^2 / |Y W|^2: the share of the site's output that it puts wrong
    head_errors  |y' - y|^2 / |y - mean y|^2, of the head alone (the RSE of DiTFastAttnV2)
    recalls      softmax mass inside the blocks it keeps
    keeps        blocks it keeps, as a fraction: of estimators too whose keep only the call can tell

with y a head's dense output, y' the candidate's, W the head's columns of the output projection and
Y the output of all heads. Of every order `sparsities` and `incoherences` of the attention map
(`accel.map_statistics`), of every precision `roundings`: `errors` of dense attention in it. And
where they were asked for `masses`: the softmax mass of every block, as a share of its row of
blocks.

The file is JSON, read as untrusted input; masses lie beside it as safetensors.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from accel.choice import Choice, guard
from accel.errors import PlanError
from accel.files import write_atomically
from accel.layout import Layout, Segment
from accel.untrusted import bounded_int, finite, refuse_constant, table, typed

__all__ = ["Key", "Profile"]

Key = tuple[str, int]  # site, band
SCHEMA = 1
MAX_FILE_BYTES = 512 * 2**20
MAX_MASS_BYTES = 64 * 2**30
# what a row of each table belongs to
TABLES = {
    "errors": "candidates",
    "head_errors": "candidates",
    "recalls": "candidates",
    "keeps": "candidates",
    "sparsities": "orders",
    "incoherences": "orders",
    "roundings": "precisions",
}


@dataclass(slots=True)
class Profile:
    """Tables [rows, heads] of every site and band, a row for each candidate, order or precision.

    asked: what it was measured for besides the rows, as `Demand.asked` has it.
    masses: [heads, q_blocks, kv_blocks], each head in its order of `mass_orders[site]`.
    counts, mass_counts: how many observations a mean is of. layout: that of the calls.
    provenance: what was measured, where and with what.
    """

    candidates: tuple[Choice, ...] = ()
    orders: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    layout: Layout | None = None
    asked: dict[str, Any] = field(default_factory=dict)
    errors: dict[Key, Tensor] = field(default_factory=dict)
    head_errors: dict[Key, Tensor] = field(default_factory=dict)
    recalls: dict[Key, Tensor] = field(default_factory=dict)
    keeps: dict[Key, Tensor] = field(default_factory=dict)
    sparsities: dict[Key, Tensor] = field(default_factory=dict)
    incoherences: dict[Key, Tensor] = field(default_factory=dict)
    roundings: dict[Key, Tensor] = field(default_factory=dict)
    masses: dict[Key, Tensor] = field(default_factory=dict)
    mass_orders: dict[str, tuple[str, ...]] = field(default_factory=dict)
    counts: dict[Key, int] = field(default_factory=dict)
    mass_counts: dict[Key, int] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def add(self, key: Key, errors: Tensor | None = None, **others: Tensor) -> None:
        """One observation: the tables of a site in a band, the same ones every time."""
        count = self.counts.get(key, 0) + 1
        given = others if errors is None else {"errors": errors, **others}
        for name, values in given.items():
            means: dict[Key, Tensor] = getattr(self, name)
            if (key in means) != (count > 1):
                raise ValueError(f"{name} of {key} was not part of every observation")
            means[key] = _mean(means.get(key), values.float().cpu(), count)
        self.counts[key] = count

    def add_mass(self, key: Key, mass: Tensor) -> None:
        """One more observation of the block mass of a site in a band."""
        count = self.mass_counts[key] = self.mass_counts.get(key, 0) + 1
        self.masses[key] = _mean(self.masses.get(key), mass.float().cpu(), count)

    def bands(self, site: str) -> list[int]:
        """The bands in which a site was observed, ascending."""
        return sorted(band for name, band in self.counts if name == site)

    def to_dict(self) -> dict[str, Any]:
        """All but the masses; floats keep the nine digits that tell any two of fp32 apart."""
        seen = []
        for key, count in self.counts.items():
            entry: dict[str, Any] = {"site": key[0], "band": key[1], "count": count}
            for name in TABLES:
                values = getattr(self, name).get(key)
                if values is not None:
                    entry[name] = [[float(f"{x:.9g}") for x in row] for row in values.tolist()]
            seen.append(entry)
        return {
            "schema": SCHEMA,
            "candidates": [c.to_dict() for c in self.candidates],
            "orders": list(self.orders),
            "precisions": list(self.precisions),
            "layout": None if self.layout is None else _segments(self.layout),
            "asked": self.asked,
            "seen": seen,
            "provenance": self.provenance,
        }

    @classmethod
    def from_dict(cls, data: Any) -> "Profile":
        """Read what `to_dict` wrote; every departure is a `PlanError` that names it."""
        known = {"schema", "candidates", "orders", "precisions", "layout", "seen", "provenance"}
        data = table("the profile", data, known | {"asked"}, known)
        if data["schema"] != SCHEMA:
            raise PlanError(f"the profile has schema {data['schema']!r}, this accel reads {SCHEMA}")
        profile = cls(
            candidates=tuple(
                Choice.from_dict(c) for c in typed("candidates", data["candidates"], list)
            ),
            orders=_words("orders", data["orders"]),
            precisions=_words("precisions", data["precisions"]),
            layout=None if data["layout"] is None else guard(_layout, data["layout"]),
            asked=dict(typed("asked", data.get("asked", {}), dict)),
            provenance=dict(typed("provenance", data["provenance"], dict)),
        )
        for entry in typed("seen", data["seen"], list):
            required = {"site", "band", "count"}
            entry = table("an observation", entry, required | set(TABLES), required)
            key = typed("site", entry["site"], str), typed("band", entry["band"], int)
            profile.counts[key] = typed("count", entry["count"], int)
            for name, rows in TABLES.items():
                if name in entry:
                    what = f"{name} of {key[0]!r} in band {key[1]}"
                    values = _matrix(what, entry[name], len(getattr(profile, rows)))
                    getattr(profile, name)[key] = values
        return profile

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the file, and the masses beside it; a crash leaves the profile that was there."""
        path, data = Path(path), self.to_dict()
        if self.masses:
            content = safetensors.torch.save({_tag(key): m for key, m in self.masses.items()})
            digest = hashlib.sha256(content).hexdigest()[:12]
            write_atomically(_mass_path(path, digest), content)
            data["masses"] = {
                "digest": digest,
                "orders": self.mass_orders,
                "counts": {_tag(key): n for key, n in self.mass_counts.items()},
            }
        write_atomically(path, json.dumps(data, allow_nan=False))
        for old in path.parent.glob(f"{path.stem}-mass-*.safetensors"):
            if not self.masses or old != _mass_path(path, digest):
                old.unlink()
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Profile":
        """Read what `save` wrote; a `PlanError` says what is wrong with it."""
        path = Path(path)
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                raise PlanError(f"it has more than {MAX_FILE_BYTES} bytes")
            text = path.read_text(encoding="utf-8")
            data = json.loads(text, parse_constant=refuse_constant, parse_int=bounded_int)
            masses = data.pop("masses", None) if isinstance(data, dict) else None
            profile = cls.from_dict(data)
            if masses is not None:
                profile._load_masses(path, masses)
        except (OSError, ValueError, RecursionError, safetensors.SafetensorError) as error:
            raise PlanError(f"{path} is no profile ({error!s:.300}); calibrate again") from error
        return profile

    def _load_masses(self, path: Path, data: Any) -> None:
        keys = {"digest", "orders", "counts"}
        data = table("masses", data, keys, keys)
        digest = typed("masses.digest", data["digest"], str)
        if not re.fullmatch("[0-9a-f]{12}", digest):
            raise PlanError(f"masses.digest is {digest!r:.40}, not twelve hexadecimal digits")
        beside = _mass_path(path, digest)
        if beside.stat().st_size > MAX_MASS_BYTES:
            raise PlanError(f"{beside.name} has more than {MAX_MASS_BYTES} bytes")
        orders: Mapping[str, Any] = typed("masses.orders", data["orders"], dict)
        self.mass_orders = {s: _words(f"masses.orders[{s!r}]", o) for s, o in orders.items()}
        counts: Mapping[str, Any] = typed("masses.counts", data["counts"], dict)
        for tag, mass in safetensors.torch.load_file(beside).items():
            band, _, site = tag.partition(":")
            if not band.isdigit() or tag not in counts or site not in self.mass_orders:
                raise PlanError(f"{beside.name} has the tensor {tag!r:.80}, which belongs nowhere")
            if mass.dim() != 3 or len(mass) != len(self.mass_orders[site]):
                raise PlanError(f"the mass of {tag!r} has the shape {tuple(mass.shape)}")
            self.masses[site, int(band)] = mass
            self.mass_counts[site, int(band)] = typed("masses.counts", counts[tag], int)


def _mean(before: Tensor | None, values: Tensor, count: int) -> Tensor:
    """The mean of `count` values, of which all but the last have the mean `before`."""
    return values.clone() if before is None else before + (values - before) / count


def _tag(key: Key) -> str:
    return f"{key[1]}:{key[0]}"


def _mass_path(path: Path, digest: str) -> Path:
    return path.with_name(f"{path.stem}-mass-{digest}.safetensors")


def _words(name: str, values: Any) -> tuple[str, ...]:
    return tuple(typed(name, x, str) for x in typed(name, values, list))


def _matrix(name: str, values: Any, rows: int) -> Tensor:
    """[rows, heads] of finite numbers."""
    values = [typed(name, row, list) for row in typed(name, values, list)]
    if len(values) != rows or len({len(row) for row in values}) > 1:
        raise PlanError(f"{name} must have {rows} rows of equal length")
    if not all(finite(x) for row in values for x in row):
        raise PlanError(f"{name} holds something that is not a finite number")
    return torch.tensor(values, dtype=torch.float32)


def _segments(layout: Layout) -> list[list[Any]]:
    return [[s.kind, s.length, s.grid and list(s.grid)] for s in layout.segments]


def _layout(data: Any) -> Layout:
    segments, start = [], 0
    for entry in typed("layout", data, list):
        kind, length, grid = typed("layout", entry, list)
        segments.append(Segment(kind, start, typed("layout", length, int), grid and tuple(grid)))
        start += length
    return Layout(tuple(segments))
