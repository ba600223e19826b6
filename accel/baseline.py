"""A dense generation as the cost model sees it: what a plan's time is counted from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from accel.cost_calibration import Calibration
from accel.errors import AccelError
from accel.layout import Layout, Segment
from accel.untrusted import finite, table, typed

__all__ = ["Baseline"]

SOURCES = ("measured", "roofline")
MAX_SITES = 4096
MAX_COUNT = 10**6
MAX_TOKENS = 2**24
SLACK = 1.01  # parts may exceed their whole by the rounding of clocks


@dataclass(frozen=True, slots=True)
class Baseline:
    """A dense generation: its seconds, the part of them in each site, its layout and branches.

    share: site -> part of `seconds` in its attention, over all steps and branches. steps: its
    denoising steps; branches: calls of the denoiser in a step; batch: elements of a call (two
    where the branches of guidance are batched together). denoiser: seconds inside the denoiser,
    attention among them; None for all. calibration: from predicted to measured seconds, once some
    were. source: `measured`, or `roofline`: computed from a data sheet.
    """

    seconds: float
    share: Mapping[str, float]
    layout: Layout
    branches: int
    steps: int
    batch: int = 1
    denoiser: float | None = None
    calibration: Calibration | None = None
    source: str = "measured"

    def __post_init__(self) -> None:
        inside = self.seconds if self.denoiser is None else self.denoiser
        attention = self.seconds * self.total_share
        for part, took, whole, has in (
            ("the denoiser", inside, "the generation", self.seconds),
            ("attention", attention, "the denoiser", inside),
        ):
            if took > SLACK * has:
                raise AccelError(
                    f"{part} is said to take {took:.4g} s of the {has:.4g} s of {whole}, which"
                    " cannot be; measure the dense generation again"
                )

    @property
    def total_share(self) -> float:
        return sum(self.share.values())

    @property
    def outside(self) -> float:
        """Seconds before and after the steps: text encoder, decoder of the latents."""
        return 0.0 if self.denoiser is None else max(0.0, self.seconds - self.denoiser)

    @property
    def attention(self) -> dict[str, float]:
        """Site -> seconds of its attention in one step."""
        return {site: self.seconds * part / self.steps for site, part in self.share.items()}

    @property
    def rest(self) -> float:
        """Seconds of a step that are not attention."""
        inside = self.seconds - self.outside
        return max(0.0, inside / self.steps - sum(self.attention.values()))

    def dense_seconds(self, steps: int | None = None) -> float:
        """Of a dense generation of so many steps, before calibration."""
        steps = self.steps if steps is None else steps
        return self.outside + steps * (self.rest + sum(self.attention.values()))

    def to_dict(self) -> dict[str, Any]:
        return {
            "seconds": self.seconds,
            "share": dict(self.share),
            "layout": [
                {"kind": s.kind, "length": s.length, "grid": None if s.grid is None else [*s.grid]}
                for s in self.layout.segments
            ],
            "branches": self.branches,
            "steps": self.steps,
            "batch": self.batch,
            "denoiser": self.denoiser,
            "calibration": None if self.calibration is None else self.calibration.to_dict(),
            "source": self.source,
        }

    @classmethod
    def from_dict(cls, data: Any) -> "Baseline":
        """Read what `to_dict` wrote, as untrusted input."""
        names = {"seconds", "share", "layout", "branches", "steps", "batch", "denoiser"}
        names |= {"calibration", "source"}
        data = dict(table("the baseline", data, names, names))
        share = typed("share", data["share"], dict)
        if len(share) > MAX_SITES or not all(finite(s) and 0 <= s <= 1 for s in share.values()):
            raise AccelError(f"share must be parts in [0, 1] of at most {MAX_SITES} sites")
        for name in ("branches", "steps", "batch"):
            if type(data[name]) is not int or not 1 <= data[name] <= MAX_COUNT:
                raise AccelError(f"{name} is a whole number from 1, got {data[name]!r:.80}")
        for name in ("seconds", "denoiser"):
            value = data[name]
            if not (finite(value) and value > 0) and not (name == "denoiser" and value is None):
                raise AccelError(f"{name} must be seconds above 0, got {value!r:.80}")
        if data["source"] not in SOURCES:
            raise AccelError(f"source is one of {', '.join(SOURCES)}, got {data['source']!r:.80}")
        calibration = data["calibration"]
        return cls(
            seconds=float(data["seconds"]),
            share={site: float(part) for site, part in share.items()},
            layout=_layout(typed("layout", data["layout"], list)),
            branches=data["branches"],
            steps=data["steps"],
            batch=data["batch"],
            denoiser=None if data["denoiser"] is None else float(data["denoiser"]),
            calibration=None if calibration is None else Calibration.from_dict(calibration),
            source=data["source"],
        )


def _layout(segments: list[Any]) -> Layout:
    found: list[Segment] = []
    start = 0
    for number, data in enumerate(segments[:MAX_COUNT]):
        name = f"layout[{number}]"
        data = table(name, data, {"kind", "length", "grid"}, {"kind", "length", "grid"})
        length = typed(f"{name}.length", data["length"], int)
        if not 1 <= length <= MAX_TOKENS - start:
            raise AccelError(f"{name}.length is {length}; a layout has 1 to {MAX_TOKENS} tokens")
        grid = data["grid"]
        sizes = None if grid is None else tuple(typed(f"{name}.grid", grid, list))
        try:
            found.append(Segment(data["kind"], start, length, sizes))
        except (TypeError, ValueError) as error:
            raise AccelError(f"{name}: {error}") from error
        start += length
    try:
        return Layout(tuple(found))
    except ValueError as error:
        raise AccelError(f"layout: {error}") from error
