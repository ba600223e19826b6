"""Where a measurement was taken: files of measurements are refused elsewhere unless asked for.

The files are JSON, read as untrusted input: their size is bounded, their numbers are finite.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accel.errors import AccelError
from accel.untrusted import bounded_int, table, typed

__all__ = ["Origin", "check_origin", "origin_from_dict", "read_json"]

MAX_FILE_BYTES = 4 * 2**20
MAX_VERSIONS = 64


@dataclass(frozen=True, slots=True)
class Origin:
    """Where and with what a table was made; `code` names the code that computed."""

    device: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    code: str = ""

    def __str__(self) -> str:
        parts = [self.device, *(f"{name} {word}" for name, word in self.versions.items())]
        return ", ".join([*parts, f"code {self.code}"])


def read_json(path: Path) -> Any:
    """The content of a JSON file of bounded size; AccelError names the file."""
    if not path.is_file():
        raise AccelError(f"there is no file {str(path)!r}")
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise AccelError(f"{path} has {size} bytes; tables have at most {MAX_FILE_BYTES}")
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text, parse_constant=_no_constant, parse_int=bounded_int)
    except (OSError, ValueError, RecursionError) as error:
        raise AccelError(
            f"{path} is no whole JSON file of finite numbers ({error!s:.200}); measure it again"
        ) from error


def check_origin(path: Path, found: Origin, here: Origin | None, foreign: bool) -> None:
    """Refuse what another device, other versions or other code measured, naming both."""
    if here is not None and not foreign and found != here:
        raise AccelError(
            f"{path} was measured on {found}; this is {here}. Measure it here by leaving"
            " hardware.table out, or take it as it is with hardware.foreign=true"
        )


def origin_from_dict(data: Any) -> Origin:
    data = table("origin", data, {"device", "versions", "code"}, {"device", "versions", "code"})
    versions = typed("origin.versions", data["versions"], dict)
    if len(versions) > MAX_VERSIONS:
        raise AccelError(f"origin.versions has {len(versions)} entries, over {MAX_VERSIONS}")
    return Origin(
        device=typed("origin.device", data["device"], str),
        versions={n: typed(f"origin.versions[{n!r}]", word, str) for n, word in versions.items()},
        code=typed("origin.code", data["code"], str),
    )


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is not a number that a table may hold")
