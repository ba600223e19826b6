"""Values that a plan holds by their kind and fields: how they are named, written and read.

Patterns and estimators are such values; each keeps a table of its own kinds.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

from accel.errors import nearest

__all__ = ["Kind", "each", "from_kind", "register"]

Class = TypeVar("Class", bound=type["Kind"])


def register(table: dict[str, type], *names: str) -> Callable[[Class], Class]:
    """Class decorator: `table` finds the class under every name, the first one being its `kind`."""

    def add(cls: Class) -> Class:
        for name in names:
            if name in table:
                raise ValueError(f"{name!r} is registered already, for {table[name].__name__}")
            table[name] = cls
        cls.kind = names[0]
        return cls

    return add


def from_kind(data: Mapping, table: Mapping[str, type["Kind"]], what: str):
    """The object that `{"kind": …, field: value}` describes; nothing unknown, nothing missing."""
    kind = data.get("kind") if isinstance(data, Mapping) else None
    if not isinstance(kind, str):
        raise ValueError(f"a {what} is an object with a 'kind', got {data!r}")
    if kind not in table:
        raise ValueError(f"unknown {what} {kind!r}; {nearest(kind, table)}")
    cls = table[kind]
    known = [field.name for field in fields(cls)]
    values = {key: value for key, value in data.items() if key != "kind"}
    for key in values:
        if key not in known:
            raise ValueError(f"{kind} has no {key!r}; {nearest(str(key), ['kind', *known])}")
    # outside of what follows, so that an error deep inside is not told again at every level
    values |= {key: read(values[key]) for key, read in cls.readers.items() if key in values}
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} from {dict(data)!s:.120}: {error}") from error


@dataclass(frozen=True, slots=True)
class Kind:
    """A frozen dataclass that a plan holds by its `kind` and its fields.

    readers: how the fields are read that hold kinds themselves; what is none they hand back.
    """

    kind: ClassVar[str]
    readers: ClassVar[Mapping[str, Callable]] = {}

    def to_dict(self) -> dict:
        """`{"kind": …}` and every field: what a plan holds."""
        return {"kind": self.kind, **{f.name: getattr(self, f.name) for f in fields(self)}}

    @property
    def name(self) -> str:
        """A short tag such as `window(t=2,h=3,w=3)`; fields that are None or False are left out."""
        values = [(f.name, getattr(self, f.name)) for f in fields(self)]
        inside = ",".join(f"{key}={x}" for key, x in values if x is not None and x is not False)
        return f"{self.kind}({inside})" if inside else self.kind


def each(read: Callable[[Any], Any], values: Any) -> Any:
    """What `read` makes of each of a list; anything else as it is."""
    return tuple(map(read, values)) if isinstance(values, list | tuple) else values
