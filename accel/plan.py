"""A plan: everything chosen for one model, as a small, versioned, readable value.

How it lies on disk is told in `accel.plan_file`, how it is shared in `accel.plan_hub`.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from accel.choice import Choice, guard
from accel.decoding import Decoding
from accel.errors import PlanError, nearest
from accel.estimators import Estimator
from accel.expected import check_expected
from accel.geometry import Geometry
from accel.kernels.arguments import PRECISIONS
from accel.layout import Grid, as_grid
from accel.made_at import MadeAt
from accel.plan_file import read_plan, write_plan
from accel.plan_fit import check_fit
from accel.schedule import Schedule
from accel.token_cache import TokenCache
from accel.token_reduction import TokenReduction
from accel.untrusted import finite, table, typed
from accel.window_keeps import WindowKeeps

SCHEMA = 1
MAX_SITES = 4096
MAX_HEADS = 4096
MAX_BLOCK = 1024
DENSE_BY = ("host", "kernel")
# what only some kinds of model have
PARTS: dict[str, Any] = {
    "cache": TokenCache,
    "decoding": Decoding,
    "windows": WindowKeeps,
    "tokens": TokenReduction,
}


@dataclass(frozen=True, slots=True)
class Plan:
    """A plan for one model.

    sites: site name -> one tuple of choices (one per head) for every band of the schedule. A site
        that is not named runs dense.
    dense: what computes dense calls: `host`, the attention that the user chose, or `kernel`,
        accel's own kernel with all blocks kept: the same up to rounding, faster on some devices.
    precision: what arithmetic accel's kernels may use, dense calls among them: one word for all
        sites, or site name -> word, `full` where a site is not named. `full` is the model's own,
        `half` 16-bit operands, `int8` and `fp8` less (see `sparse_attention`); the host's own
        attention is not touched.
    recall_floor: heads that keep less of the softmax mass than this, when their mask is made, are
        dense for as long as it lives; None: whatever they keep. Heads without blocks do not count.
    cache, decoding: of a text model, which tokens its calls compute and remember, and how tokens
        are committed; None: all of them, and as the pipeline is called.
    windows, tokens: of a vision model, which windows its blocks compute, and how many tokens are
        left behind each block; None: all of them.
    grid: the visual grid (t, h, w) the plan was made at, or None when it was made for any.
    expected: what was predicted or measured when the plan was made, by name (see `accel.cost`).
    provenance: how it was made: recipe or search settings, versions, device, scheduler, steps.
    """

    name: str
    model: str
    sites: Mapping[str, tuple[tuple[Choice, ...], ...]]
    n_sites: int
    head_dim: int
    schedule: Schedule = field(default_factory=Schedule)
    block: tuple[int, int] = (128, 64)
    dense: str = "host"
    precision: str | Mapping[str, str] = "full"
    recall_floor: float | None = None
    cache: TokenCache | None = None
    decoding: Decoding | None = None
    windows: WindowKeeps | None = None
    tokens: TokenReduction | None = None
    grid: Grid | None = None
    expected: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.sites:
            raise PlanError(f"plan {self.name!r} names no site")
        if len(self.sites) > MAX_SITES:
            raise PlanError(f"plan {self.name!r} names {len(self.sites)} sites, over {MAX_SITES}")
        object.__setattr__(self, "block", check_block(self.block))
        if self.dense not in DENSE_BY:
            raise PlanError(f"dense {self.dense!r} is unknown; {nearest(self.dense, DENSE_BY)}")
        sites = {s: tuple(tuple(heads) for heads in bands) for s, bands in self.sites.items()}
        object.__setattr__(self, "sites", sites)
        if isinstance(self.precision, Mapping):
            object.__setattr__(self, "precision", dict(self.precision))
        for word in self.precisions:
            if word not in PRECISIONS:
                raise PlanError(f"precision {word!r} is unknown; {nearest(str(word), PRECISIONS)}")
        if self.grid is not None:
            object.__setattr__(self, "grid", guard(as_grid, self.grid))
        for site, bands in self.sites.items():
            if len(bands) != self.schedule.n_bands:
                raise PlanError(
                    f"site {site!r} has {len(bands)} bands, the schedule has"
                    f" {self.schedule.n_bands}"
                )
            if len({len(heads) for heads in bands}) != 1 or not bands[0]:
                raise PlanError(f"site {site!r} does not have the same heads in every band")
        for choice in {c for bands in self.sites.values() for heads in bands for c in heads}:
            if isinstance(choice.select, Estimator):
                guard(choice.select.check_block, self.block)
        if self.recall_floor is not None:
            object.__setattr__(self, "recall_floor", _floor(self.recall_floor))
        check_expected(self.expected, self.schedule.n_bands)

    @classmethod
    def uniform(cls, name: str, geometry: Geometry, choice: Choice, **settings: Any) -> "Plan":
        """The same choice for every head of every site, in every band."""
        schedule = settings.get("schedule", Schedule())
        sites = {s.name: ((choice,) * s.heads,) * schedule.n_bands for s in geometry.sites}
        return cls.of(name, geometry, sites, **settings)

    @classmethod
    def of(
        cls,
        name: str,
        geometry: Geometry,
        sites: Mapping[str, tuple[tuple[Choice, ...], ...]],
        **settings: Any,
    ) -> "Plan":
        """A plan for the model that `geometry` describes."""
        layout = geometry.layout
        settings.setdefault("grid", layout.grid if layout is not None and layout.grids else None)
        return cls(
            name=name,
            model=geometry.model,
            sites=sites,
            n_sites=len(geometry.sites),
            head_dim=geometry.sites[0].head_dim,
            **settings,
        )

    def choices(self, site: str, band: int) -> tuple[Choice, ...] | None:
        """The choices of `site` in `band`, one per head; None when the plan leaves it dense."""
        bands = self.sites.get(site)
        return None if bands is None else bands[band]

    def precision_of(self, site: str) -> str:
        """What arithmetic accel's kernels may use at `site`."""
        if isinstance(self.precision, str):
            return self.precision
        return self.precision.get(site, "full")

    @property
    def precisions(self) -> tuple[str, ...]:
        """What some site may use, each word once."""
        words = self.precision
        if isinstance(words, str):
            return (words,)
        unnamed = ("full",) if len(words) < self.n_sites else ()
        return tuple(dict.fromkeys((*words.values(), *unnamed)))

    @property
    def wants_sparse(self) -> bool:
        """Whether any part of a run is meant to be sparse."""
        part = 1 - self.schedule.dense_start - self.schedule.dense_end
        choices = {c for bands in self.sites.values() for heads in bands for c in heads}
        return part > 0 and not all(c.dense for c in choices)

    def for_grid(self, grid: Sequence[int]) -> "Plan":
        """The same plan at another visual grid.

        Patterns are kept in grid units, block sets are resampled, and estimators look at the call.
        What was measured at the old grid is dropped; where that was stays known (`made_at`).
        """
        provenance = {**self.provenance, "made_at": self.made_at.to_dict()}
        return replace(self, grid=guard(as_grid, grid), expected={}, provenance=provenance)

    @property
    def made_at(self) -> MadeAt:
        """Grid, steps, dtype and device that the plan was made for, as far as it says."""
        return MadeAt.of(self.grid, self.expected, self.provenance)

    def check(self, target: Any) -> "Plan":
        """Refuse, naming the field, when this plan does not fit `target`; else return the plan.

        target: a pipeline, a model or a `Geometry`.
        """
        if not isinstance(target, Geometry):
            from accel.pipelines.adapters import geometry_of

            target = geometry_of(target)
        check_fit(self, target)
        return self

    def to_dict(self) -> dict[str, Any]:
        """The file's content: every choice once, sites refer to them by number."""
        numbers: dict[Choice, int] = {}
        sites = {
            site: [[numbers.setdefault(c, len(numbers)) for c in heads] for heads in bands]
            for site, bands in self.sites.items()
        }
        parts: dict[str, Any] = {"recall_floor": self.recall_floor}
        for part in PARTS:
            value = getattr(self, part)
            parts[part] = None if value is None else value.to_dict()
        return {
            "schema": SCHEMA,
            "name": self.name,
            "model": self.model,
            "n_sites": self.n_sites,
            "head_dim": self.head_dim,
            "grid": None if self.grid is None else list(self.grid),
            "block": list(self.block),
            "dense": self.dense,
            "precision": self.precision,
            **{name: part for name, part in parts.items() if part is not None},
            "schedule": self.schedule.to_dict(),
            "choices": [c.to_dict() for c in numbers],
            "sites": sites,
            "expected": dict(self.expected),
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_dict(cls, data: Any) -> "Plan":
        """Read what `to_dict` wrote; every departure is a `PlanError` that names it."""
        required = {"schema", "name", "model", "n_sites", "head_dim", "schedule", "choices"}
        required |= {"sites", "block"}
        if isinstance(data, Mapping) and data.get("schema", SCHEMA) != SCHEMA:
            raise PlanError(
                f"the plan has schema {data['schema']!r}, this accel reads {SCHEMA};"
                " update accel, or make the plan again with accel-search"
            )
        optional = {"dense", "precision", "recall_floor", "grid", "expected", "provenance", *PARTS}
        data = table("the plan", data, required | optional, required)
        choices = [Choice.from_dict(c) for c in typed("choices", data["choices"], list)]
        sites = {}
        for site, bands in typed("sites", data["sites"], dict).items():
            sites[site] = tuple(
                tuple(_pick(site, choices, n) for n in _heads(site, heads))
                for heads in typed(f"sites[{site!r}]", bands, list)
            )
        grid = data.get("grid")
        return cls(
            name=typed("name", data["name"], str),
            model=typed("model", data["model"], str),
            sites=sites,
            n_sites=typed("n_sites", data["n_sites"], int),
            head_dim=typed("head_dim", data["head_dim"], int),
            schedule=Schedule.from_dict(data["schedule"]),
            block=check_block(typed("block", data["block"], list)),
            dense=typed("dense", data.get("dense", "host"), str),
            precision=_precision(data.get("precision", "full")),
            recall_floor=None if data.get("recall_floor") is None else _floor(data["recall_floor"]),
            **{
                part: read.from_dict(data[part])
                for part, read in PARTS.items()
                if data.get(part) is not None
            },
            grid=None if grid is None else guard(as_grid, typed("grid", grid, list)),
            expected=typed("expected", data.get("expected", {}), dict),
            provenance=typed("provenance", data.get("provenance", {}), dict),
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Plan":
        """Read a plan file, and the block sets beside it where it names some."""
        path = Path(path)
        data = read_plan(path)
        try:
            return cls.from_dict(data)
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from error
        except RecursionError as error:
            raise PlanError(f"{path} is nested too deeply to be a plan") from error

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan file atomically; returns its path. Block sets go beside it."""
        return write_plan(Path(path), self.to_dict())

    @classmethod
    def from_pretrained(cls, name_or_folder: str | os.PathLike[str], **options: Any) -> "Plan":
        """The plan of a hub repository ("owner/name"), or of a folder that `save_pretrained` wrote.

        options: revision, token, cache_dir, local_files_only, as huggingface_hub has them.
        """
        from accel.plan_hub import fetched

        return cls.load(fetched(name_or_folder, **options))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write the plan, and a card that describes it, into `folder`; returns the folder."""
        from accel.plan_hub import write_folder

        return write_folder(self, Path(folder))

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Share the plan as the hub repository `repo_id`, made if need be; the commit's address.

        options: private, token, commit_message, as huggingface_hub has them.
        """
        from accel.plan_hub import pushed

        return pushed(self, repo_id, **options)

    def ratio(self, site: str, band: int, tokens: int, device: str, dtype: str) -> float | None:
        """Predicted price of a sparse call of `site`, as a ratio to the host's dense attention.

        None without a prediction, and for calls of another length, device or precision than the
        prediction is for: which of dense and sparse is faster changes with all three.
        """
        bands = self.expected.get("attention_ratio", {}).get(site)
        shape = tuple(self.expected.get(key) for key in ("tokens", "device", "dtype"))
        return None if bands is None or shape != (tokens, device, dtype) else bands[band]

    def crossover(self, device: str, dtype: str) -> int:
        """Tokens below which sparse calls are no gain on a device; 0 where that is not known."""
        found = self.expected.get("crossover", {})
        return (
            found["tokens"] if (device, dtype) == (found.get("device"), found.get("dtype")) else 0
        )

    def dense_ratio(self, site: str) -> float:
        """Predicted price of a dense call of `site`, as a ratio to the host's dense attention."""
        if self.dense == "host":
            return 1.0
        return self.expected.get("dense_ratio", {}).get(self.precision_of(site), 1.0)

    @property
    def digest(self) -> str:
        """Eight hexadecimal digits that name what the plan does (not what was measured of it)."""
        data = replace(self, sites=dict(sorted(self.sites.items()))).to_dict()
        for key in ("expected", "provenance", "name"):
            data.pop(key)
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:8]


def check_block(value: Any) -> tuple[int, int]:
    """`value` as a block (query, key tokens) if it is one."""
    block = tuple(value) if isinstance(value, Sequence) else ()
    if len(block) != 2 or any(
        type(b) is not int or not 16 <= b <= MAX_BLOCK or b & (b - 1) for b in block
    ):
        raise PlanError(f"block must be two powers of two from 16 to {MAX_BLOCK}, got {value!r}")
    return block


def _floor(value: Any) -> float:
    if not finite(value) or not 0 < value <= 1:
        raise PlanError(f"recall_floor must be in (0, 1], got {value!r:.80}; leave it out for none")
    return float(value)


def _precision(value: Any) -> str | dict[str, str]:
    """One word, or site name -> word."""
    if isinstance(value, str):
        return value
    return {
        site: typed(f"precision[{site!r}]", word, str)
        for site, word in typed("precision", value, dict).items()
    }


def _heads(site: str, heads: Any) -> list[Any]:
    if len(typed(f"sites[{site!r}]", heads, list)) > MAX_HEADS:
        raise PlanError(f"site {site!r} has {len(heads)} heads, over {MAX_HEADS}")
    return heads


def _pick(site: str, choices: list[Choice], number: Any) -> Choice:
    if type(number) is not int or not 0 <= number < len(choices):
        raise PlanError(
            f"sites[{site!r}] names choice {number!r}; the plan has choices 0 to {len(choices) - 1}"
        )
    return choices[number]
