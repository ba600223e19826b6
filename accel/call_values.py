"""The arguments of a call as an operation of torch can take them: tensors, numbers and a text.

An operation takes no nested lists, and what it is given as a number must not become part of the
compiled code. So arguments are packed where the graph is traced, and unpacked where it runs.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["Packed", "pack", "unpack"]

# In the text: T a tensor, N a whole number, - anything else, ( ) a list of what is between.


class Packed(NamedTuple):
    """shape: the text that says where tensors and numbers belong."""

    shape: str
    tensors: list[Tensor]
    numbers: list[int]


def pack(value: Any) -> Packed:
    """Tensors, whole numbers, and lists or tuples of them; everything else is lost."""
    if isinstance(value, Tensor):
        return Packed("T", [value], [])
    if isinstance(value, (list, tuple)):
        parts = [pack(item) for item in value]
        shape = "(" + "".join([p.shape for p in parts]) + ")"
        tensors = [t for p in parts for t in p.tensors]
        return Packed(shape, tensors, [n for p in parts for n in p.numbers])
    if value is None or isinstance(value, (bool, float, str)) or not _is_number(value):
        return Packed("-", [], [])
    return Packed("N", [], [value])


def unpack(packed: Packed) -> Any:
    """What was packed; lists come back as tuples."""
    return _read(iter(packed.shape), iter(packed.tensors), iter(packed.numbers))[0]


def _read(shape: Iterator[str], tensors: Iterator[Tensor], numbers: Iterator[int]) -> tuple:
    found: list[Any] = []
    for letter in shape:
        if letter == ")":
            break
        if letter == "(":
            found.append(_read(shape, tensors, numbers))
        else:
            found.append(
                next(tensors) if letter == "T" else next(numbers) if letter == "N" else None
            )
    return tuple(found)


def _is_number(value: Any) -> bool:
    # while tracing, a number may be a symbol
    return isinstance(value, int) or hasattr(value, "node")
