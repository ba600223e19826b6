"""Values that nobody vouches for, of files and settings: every departure is an error naming it."""

from collections.abc import Mapping
from math import isfinite
from typing import Any

from accel.errors import AccelError, PlanError, nearest

__all__ = ["bare_name", "bounded_int", "check_whole", "finite", "refuse_constant", "table", "typed"]

MAX_NAME = 255


def refuse_constant(word: str) -> None:
    """For `json.loads`: NaN and Infinity are no numbers of a file."""
    raise PlanError(f"{word} is not a number that a plan may hold")


def bounded_int(digits: str) -> int:
    """For `json.loads`: at most 15 digits, since longer ones take quadratic time."""
    if len(digits) > 15:
        raise PlanError(f"{digits[:15]}... is too large a number for a plan")
    return int(digits)


def bare_name(what: str, value: Any, suffix: str) -> str:
    """`value` if it names a file of this folder and nothing more; it ends in `suffix`."""
    name = typed(what, value, str)
    elsewhere = name.startswith(".") or set(name) & set("/\\:\0") or len(name) > MAX_NAME
    if elsewhere or not name.endswith(suffix):
        raise PlanError(
            f"{what} is {name!r:.80}; it is the name of a neighbouring file that ends in {suffix}"
        )
    return name


def finite(value: Any) -> bool:
    """Whether `value` is a finite number, and not a switch."""
    return type(value) in (int, float) and isfinite(value)


def check_whole(name: str, value: Any, least: int) -> None:
    """Refuse a setting that is not a whole number from `least`."""
    if type(value) is not int or value < least:
        raise AccelError(f"{name} is {value!r}; it is a whole number, at least {least}")


def table(what: str, data: Any, known: set[str] | None, required: set[str]) -> Mapping[str, Any]:
    """`data` if it is a table with the `required` keys and, unless None, only `known` ones."""
    if not isinstance(data, Mapping):
        raise PlanError(f"{what} must be a table, got {type(data).__name__}")
    for key in data if known is not None else ():
        if key not in known:  # type: ignore[operator]
            raise PlanError(f"{what} has no key {key!r}; {nearest(str(key), known or ())}")
    for key in sorted(required):
        if key not in data:
            raise PlanError(f"{what} lacks the key {key!r}")
    return data


def typed(name: str, value: Any, kind: type) -> Any:
    """`value` if it is a `kind`; a switch is no number."""
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise PlanError(f"{name} must be of type {kind.__name__}, got {value!r:.80}")
    return value
