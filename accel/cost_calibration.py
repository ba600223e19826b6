"""Predicted seconds against measured ones: a scale and an offset, and how far they then are off.

A table prices attention calls; a whole generation has more to it, and another share of a busy or a
throttled machine. Both move all plans alike, so a straight line through a few measured generations
mends them: `measured = scale * predicted + offset`. What it is worth is told by plans that took no
part in it.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from statistics import mean, median
from typing import Any

from accel.errors import AccelError
from accel.untrusted import finite, table

__all__ = ["Calibration", "calibrated", "fit", "mape", "rank_correlation"]

Pair = tuple[float, float]  # seconds: predicted, measured
# below this quotient of the longest and the shortest prediction noise decides what is the offset
SPREAD = 1.2
# of Huber's weights: deviations of this many standard deviations count in full (Huber, 1981)
HUBER = 1.345
ROUNDS = 20
# of proportional times: a line that is flatter is none, and an offset below zero leaves so much
LEAST = 0.1


@dataclass(frozen=True, slots=True)
class Calibration:
    """A line from predicted to measured seconds, and its error on plans that took no part in it.

    runs: generations the line was fitted to; held_out: the other plans. mape: mean absolute error
    as a fraction of the measured time; rank_correlation: Spearman's. Both None where nothing was
    held out, the latter too where all times are the same.
    """

    scale: float
    offset: float
    runs: int
    held_out: int = 0
    mape: float | None = None
    rank_correlation: float | None = None

    def apply(self, seconds: float) -> float:
        """What a generation of so many predicted seconds will take."""
        return max(self.scale * seconds + self.offset, LEAST * self.scale * seconds)

    def __str__(self) -> str:
        text = f"calibrated on {self.runs} run{'s' if self.runs > 1 else ''}"
        if self.mape is None:
            return f"{text}; its error on other plans is not known"
        ranks = "-" if self.rank_correlation is None else f"{self.rank_correlation:.2f}"
        return (
            f"{text}; error on {self.held_out} other plan{'s' if self.held_out > 1 else ''}:"
            f" MAPE {100 * self.mape:.1f} %, rank correlation {ranks}"
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> "Calibration":
        """Read what `to_dict` wrote, as untrusted input."""
        names = set(cls.__dataclass_fields__)
        data = table("calibration", data, names, {"scale", "offset", "runs"})
        for name, value in data.items():
            optional = name in ("mape", "rank_correlation") and value is None
            whole = name not in ("runs", "held_out") or type(value) is int
            if not optional and not (finite(value) and whole):
                raise AccelError(f"calibration.{name} must be a number, got {value!r:.80}")
        if data["scale"] <= 0:
            raise AccelError(f"calibration.scale must be above 0, got {data['scale']!r}")
        error, ranks = (data.get(name) for name in ("mape", "rank_correlation"))
        return cls(
            scale=float(data["scale"]),
            offset=float(data["offset"]),
            runs=data["runs"],
            held_out=data.get("held_out", 0),
            mape=None if error is None else float(error),
            rank_correlation=None if ranks is None else float(ranks),
        )


def calibrated(fitted: Sequence[Pair], held_out: Sequence[Pair] = ()) -> Calibration:
    """The line through `fitted`, judged by `held_out`; pairs of (predicted, measured) seconds."""
    scale, offset = fit(fitted)
    line = Calibration(scale, offset, len(fitted))
    others = [(line.apply(predicted), measured) for predicted, measured in held_out]
    return Calibration(
        scale,
        offset,
        runs=len(fitted),
        held_out=len(others),
        mape=mape(others) if others else None,
        rank_correlation=rank_correlation(others) if len(others) > 1 else None,
    )


def fit(pairs: Sequence[Pair]) -> tuple[float, float]:
    """(scale, offset) of the line with the least squares of relative errors; scale is above 0.

    Robust by Huber's weights, so that one run on a busy machine does not decide. Where all
    predictions are about the same, or the line would fall or be flat, there is a scale alone.
    """
    if len(pairs) < 2:
        raise AccelError(f"a calibration needs at least 2 measured runs, got {len(pairs)}")
    if any(not finite(x) or x <= 0 for pair in pairs for x in pair):
        raise AccelError(f"seconds must be numbers above 0, got {list(pairs)!r:.200}")
    weights = [1.0] * len(pairs)
    for _ in range(ROUNDS):
        scale, offset = _line(pairs, weights)
        errors = [abs(scale * p + offset - m) / m for p, m in pairs]
        deviation = 1.4826 * median(errors)  # of a normal distribution, by its median
        weights = [min(1.0, HUBER * deviation / e) if e > 1e-12 else 1.0 for e in errors]
        if not any(weights):
            break
    return scale, offset


def _line(pairs: Sequence[Pair], weights: Sequence[float]) -> tuple[float, float]:
    """Least squares of the weighted relative errors."""
    if not sum(weights):
        weights = [1.0] * len(pairs)
    w = [weight / measured**2 for weight, (_, measured) in zip(weights, pairs, strict=True)]
    total = sum(w)
    p_mean = sum(a * p for a, (p, _) in zip(w, pairs, strict=True)) / total
    m_mean = sum(a * m for a, (_, m) in zip(w, pairs, strict=True)) / total
    spread = sum(a * (p - p_mean) ** 2 for a, (p, _) in zip(w, pairs, strict=True))
    shared = sum(a * (p - p_mean) * (m - m_mean) for a, (p, m) in zip(w, pairs, strict=True))
    predictions = [p for p, _ in pairs]
    if max(predictions) >= SPREAD * min(predictions) and spread:
        scale = shared / spread
        if scale > LEAST * m_mean / p_mean:
            return scale, m_mean - scale * p_mean
    squares = sum(a * p * p for a, (p, _) in zip(w, pairs, strict=True))
    return sum(a * p * m for a, (p, m) in zip(w, pairs, strict=True)) / squares, 0.0


def mape(pairs: Sequence[Pair]) -> float:
    """Mean of |predicted - measured| / measured."""
    return mean(abs(predicted - measured) / measured for predicted, measured in pairs)


def rank_correlation(pairs: Sequence[Pair]) -> float | None:
    """Spearman's: the correlation of the ranks, ties at the mean of their places; in [-1, 1].

    None where all predictions or all measurements are the same.
    """
    predicted, measured = (_ranks([pair[i] for pair in pairs]) for i in range(2))
    middle = (len(pairs) - 1) / 2
    shared = sum((p - middle) * (m - middle) for p, m in zip(predicted, measured, strict=True))
    spread = [sum((r - middle) ** 2 for r in ranks) for ranks in (predicted, measured)]
    return shared / sqrt(spread[0] * spread[1]) if all(spread) else None


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered.index(v) + (ordered.count(v) - 1) / 2 for v in values]
