"""Numbers of an arm's results that are drawn, held against each other, or put into a table."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Column", "Measure", "Quality", "above_front", "mean_and_worst", "number"]

Results = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Measure:
    """One number: how it is got from the results of an arm (None where it was not measured), and
    what the axis of a picture says.
    """

    label: str
    of: Callable[[Results], float | None]


@dataclass(frozen=True, slots=True)
class Quality(Measure):
    """How good an arm is, more is better: what is held against its time.

    worst: that of the worst prompt, or None; name: its key in results; short: what it is called,
    in `unit`. Hypervolumes are of the region above `floor`; more than `cap` counts as the cap.
    """

    worst: Callable[[Results], float | None]
    name: str
    short: str
    unit: str
    floor: float
    cap: float


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table: its head, what it means, and the text of an arm's results."""

    head: str
    meaning: str
    text: Callable[[Results], str]


def number(form: str, *path: str, times: float = 1.0) -> Callable[[Results], str]:
    """The number at `path` of the results times a factor, or a dash."""

    def text(results: Results) -> str:
        value: Any = results
        for key in path:
            value = None if value is None else value.get(key)
        return "-" if value is None else form.format(value if times == 1 else times * value)

    return text


def mean_and_worst(form: str, name: str) -> Callable[[Results], str]:
    """The mean over prompts, and the worst of them, or a dash. form: of a format specification."""

    def text(results: Results) -> str:
        found = results.get(name)
        return f"{found['mean']:{form}} ({found['worst']:{form}})" if found else "-"

    return text


def above_front(results: Results) -> str:
    """How much better the (first) front is at the time of an arm than the arm is, or a dash."""
    against = results.get("against_front") or {}
    return f"{next(iter(against.values()))['above']:+.1f}" if against else "-"
