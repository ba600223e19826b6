"""When a run is dense, when masks are made anew, and which assignment holds: all in progress.

Progress is `step / total` in [0, 1), so a schedule found at 50 steps serves 28. Early steps fix the
composition and stay dense (SVG, STA, Radial Attention and AdaSpa spend 10 to 30 percent of the run
there); a dense tail is optional (the hybrid schedules of xDiT and ComfyUI).
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from math import inf
from typing import Any

from accel.context import Where
from accel.errors import PlanError, nearest

AXES = ("run", "block")


@dataclass(frozen=True, slots=True)
class Phase:
    """What one step is: `band` is None when dense; `generation` counts the refreshes so far, in
    block `block` of a schedule of blocks.
    """

    band: int | None
    generation: int
    block: int = 0

    @property
    def dense(self) -> bool:
        return self.band is None


@dataclass(frozen=True, slots=True)
class Schedule:
    """Step bands of a run, or of every block of a text that is made block by block.

    dense_start, dense_end: fractions of the run, at its start and at its end, that stay dense.
    bands: inner borders in progress, ascending in (0, 1); n borders make n + 1 bands, and every
        site of a plan has one assignment for each band.
    refresh: points in progress at which estimators look again; the first sparse step always does.
    drift: estimators look again as well once the block means of queries and keys have moved by
        more than this part of their size since the last look (see `accel.drift`); None never.

    axis: what progress is of: the `run`, or each `block` (a run without blocks is one).

    A fraction is rounded to whole steps, half up; a dense start above zero keeps at least one dense
    step, so a run of one step is dense.
    """

    dense_start: float = 0.2
    dense_end: float = 0.0
    bands: tuple[float, ...] = ()
    refresh: tuple[float, ...] = ()
    drift: float | None = None
    axis: str = "run"

    def __post_init__(self) -> None:
        for name in ("bands", "refresh"):
            points = _numbers(f"schedule.{name}", getattr(self, name))
            if any(not 0 < p < 1 for p in points) or list(points) != sorted(set(points)):
                raise PlanError(
                    f"schedule.{name} must ascend strictly inside (0, 1), got {list(points)}"
                )
            object.__setattr__(self, name, points)
        for name in ("dense_start", "dense_end"):
            value = _number(f"schedule.{name}", getattr(self, name))
            if not 0 <= value <= 1:
                raise PlanError(f"schedule.{name} is a fraction in [0, 1], got {value}")
            object.__setattr__(self, name, value)
        if self.dense_start + self.dense_end > 1:
            raise PlanError(
                f"schedule.dense_start + schedule.dense_end is {self.dense_start + self.dense_end},"
                " more than the whole run; lower one of them"
            )
        if self.axis not in AXES:
            raise PlanError(
                f"schedule.axis {self.axis!r} is unknown; {nearest(str(self.axis), AXES)}"
            )
        if self.drift is not None:
            drift = _number("schedule.drift", self.drift)
            if not 0 < drift < inf:
                raise PlanError(f"schedule.drift is a number above 0, or null, got {drift}")
            object.__setattr__(self, "drift", drift)

    @property
    def n_bands(self) -> int:
        return len(self.bands) + 1

    def phase(self, step: int, total: int) -> Phase:
        """The phase of step `step` (from 0) of `total`."""
        if not 0 <= step < total:
            raise ValueError(f"step {step} is not within a run of {total} steps")
        first = _steps(self.dense_start, total)
        last = total - _steps(self.dense_end, total)
        progress = step / total
        generation = sum(p <= progress for p in self.refresh)
        if step < first or step >= last:
            return Phase(None, generation)
        return Phase(sum(p <= progress for p in self.bands), generation)

    def span(self, where: Where) -> tuple[int, int]:
        """Step and steps of what progress is of."""
        block = self._block(where)
        return (where.step, where.total) if block is None else block[1:]

    def at(self, where: Where) -> Phase:
        """The phase of a call."""
        block = self._block(where)
        return replace(self.phase(*self.span(where)), block=0 if block is None else block[0])

    def _block(self, where: Where) -> tuple[int, int, int] | None:
        """Where progress is of a block: its number, and step and steps in it."""
        return where.block if self.axis == "block" or where.endless else None

    def after(self, where: Where) -> Phase:
        """The phase of the step that follows, dense where nothing does or another block begins."""
        step, total = self.span(where)
        return self.phase(step + 1, total) if step + 1 < total else Phase(None, 0)

    def looks_again(self, phase: Phase) -> bool:
        """Whether a later sparse step may select blocks anew: at a refresh point, or in a band."""
        points = self.refresh[phase.generation :] + self.bands[phase.band or 0 :]
        return any(p < 1 - self.dense_end for p in points)

    def sparse_steps(self, total: int) -> int:
        """How many steps of a run of `total` are sparse."""
        return sum(not self.phase(step, total).dense for step in range(total))

    def steps_of(self, band: int, total: int) -> list[Phase]:
        """The phases of the steps in `band`, of a run of `total`: a look for each different one."""
        phases = (self.phase(step, total) for step in range(total))
        return [p for p in phases if p.band == band]

    def to_dict(self) -> dict[str, Any]:
        """The fields; `drift` where there is one, and an `axis` that is not the run."""
        data = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        if self.drift is None:
            del data["drift"]
        if self.axis == "run":
            del data["axis"]
        return data

    @classmethod
    def from_dict(cls, data: Any) -> "Schedule":
        if not isinstance(data, Mapping):
            raise PlanError(f"schedule must be a table, got {type(data).__name__}")
        readers: dict[str, Callable[[str, Any], Any]] = {
            "dense_start": _number,
            "dense_end": _number,
            "bands": _numbers,
            "refresh": _numbers,
            "drift": _number_or_none,
            "axis": lambda name, value: value,
        }
        for key in data:
            if key not in readers:
                raise PlanError(f"schedule has no key {key!r}; {nearest(str(key), readers)}")
        return cls(**{key: readers[key](f"schedule.{key}", data[key]) for key in data})


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise PlanError(f"{name} must be a number, got {value!r}")
    try:
        return float(value)
    except OverflowError as error:
        raise PlanError(f"{name} is too large a number") from error


def _number_or_none(name: str, value: Any) -> float | None:
    return None if value is None else _number(name, value)


def _numbers(name: str, values: Any) -> tuple[float, ...]:
    if not isinstance(values, (list, tuple)):
        raise PlanError(f"{name} is a list of numbers in (0, 1), got {values!r}")
    return tuple(_number(name, value) for value in values)


def _steps(fraction: float, total: int) -> int:
    if fraction == 0:
        return 0
    return max(1, int(fraction * total + 0.5))
