"""Plans on disk: one JSON file, and beside it one safetensors file where they hold block sets.

    plan.json            everything but the bits of block sets (`accel.pattern_blocks`), and of
                         trained estimators (`accel.estimators.connectivity`), which are kept alike
    plan.safetensors     the bits: one uint8 vector for each set, named by its number

The JSON names the second file, with its size and hash, and a set by its number. Both are read as
untrusted input: their sizes are bounded, the second file is a neighbour of the first with the hash
that the first one says, and nothing in them names another file or code.
"""

import hashlib
import json
from base64 import b64decode
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from accel.errors import PlanError
from accel.files import write_atomically
from accel.untrusted import bare_name, bounded_int, refuse_constant, table, typed

MAX_FILE_BYTES = 16 * 2**20
MAX_SET_BYTES = 256 * 2**20
SETS = "sets"
KINDS = ("blocks", "connectivity")  # what has bits
SUFFIX = ".safetensors"


def read_plan(path: Path) -> Any:
    """The content of a plan file, with the bits of its block sets in place."""
    if not path.is_file():
        raise PlanError(f"there is no plan file at {str(path)!r}")
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise PlanError(f"{path} has {size} bytes; plans have at most {MAX_FILE_BYTES}")
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text, parse_constant=refuse_constant, parse_int=bounded_int)
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from error
    except RecursionError as error:
        raise PlanError(f"{path} is nested too deeply to be a plan") from error
    except (OSError, ValueError) as error:
        raise PlanError(
            f"{path} is not a whole JSON file ({error}); it may have been cut short: fetch or"
            " make it again"
        ) from error
    if not isinstance(data, dict) or SETS not in data:
        return data
    try:
        sets = _read_sets(path, data.pop(SETS))
        for select in _block_sets(data.get("choices")):
            select["bits"] = _bits(sets, select.get("bits"))
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from error
    except RecursionError as error:
        raise PlanError(f"{path} is nested too deeply to be a plan") from error
    return data


def write_plan(path: Path, data: dict[str, Any]) -> Path:
    """Write `data`, what `Plan.to_dict` gives, and its block sets if there are any; the path.

    Each file is written atomically, the sets first. A plan that was stopped between the two has a
    hash that does not fit, which is an error that says so, never another plan.
    """
    data, numbers = deepcopy(data), dict[str, int]()
    for select in _block_sets(data["choices"]):
        select["bits"] = numbers.setdefault(select["bits"], len(numbers))
    content = b""
    if numbers:
        beside = path.with_suffix(SUFFIX) if path.suffix == ".json" else Path(f"{path}{SUFFIX}")
        content = _packed(numbers)
        data[SETS] = {
            "file": bare_name(f"{SETS}.file", beside.name, SUFFIX),
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    try:
        text = json.dumps(data, indent=1, allow_nan=False)
    except ValueError as error:
        raise PlanError(f"plan {data['name']!r} holds a number that is not finite") from error
    if numbers:
        write_atomically(beside, content)
    return write_atomically(path, text + "\n")


def _packed(numbers: Mapping[str, int]) -> bytes:
    """The second file: of base64 texts and their numbers."""
    vectors = {str(n): np.frombuffer(b64decode(bits), np.uint8) for bits, n in numbers.items()}
    content = safetensors.numpy.save(vectors)
    if len(content) > MAX_SET_BYTES:
        raise PlanError(f"the block sets have {len(content)} bytes, over {MAX_SET_BYTES}")
    return content


def _read_sets(plan: Path, named: Any) -> dict[str, bytes]:
    """The sets of the file that a plan names, all of it checked; each is in memory once, however
    often the plan names it.
    """
    keys = {"file", "bytes", "sha256"}
    named = table(SETS, named, keys, keys)
    name = bare_name(f"{SETS}.file", named["file"], SUFFIX)
    size = typed(f"{SETS}.bytes", named["bytes"], int)
    if not 0 < size <= MAX_SET_BYTES:
        raise PlanError(f"{SETS}.bytes is {size}; block sets have at most {MAX_SET_BYTES}")
    path = plan.parent / name
    if not path.is_file():
        raise PlanError(f"its block sets {name!r} are not beside it; fetch both files")
    if path.stat().st_size != size:
        raise PlanError(
            f"its block sets {name!r} have {path.stat().st_size} bytes, not {size}; fetch both"
            " files again"
        )
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != typed(f"{SETS}.sha256", named["sha256"], str):
        raise PlanError(f"its block sets {name!r} are not those it was saved with; fetch both")
    try:
        sets = safetensors.numpy.load(content)
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
        raise PlanError(f"its block sets {name!r} cannot be read: {error!s:.200}") from error
    for number, array in sets.items():
        if array.dtype != np.uint8 or array.ndim != 1:
            told = f"{array.dtype} {array.shape}"
            raise PlanError(f"block set {number} is {told}, not a vector of uint8")
    return {number: array.tobytes() for number, array in sets.items()}


def _bits(sets: Mapping[str, bytes], number: Any) -> bytes | str:
    """One set by its number; bits that stand in the JSON itself are left to the pattern."""
    if isinstance(number, str):
        return number
    if type(number) is not int or str(number) not in sets:
        raise PlanError(f"bits name the block set {number!r}; the file has 0 to {len(sets) - 1}")
    return sets[str(number)]


def _block_sets(data: Any) -> Iterator[dict[str, Any]]:
    """Every table of a kind that has bits, wherever it stands."""
    if isinstance(data, dict):
        if data.get("kind") in KINDS:
            yield data
        else:
            for value in data.values():
                yield from _block_sets(value)
    elif isinstance(data, list):
        for value in data:
            yield from _block_sets(value)
