"""Files of what was measured: plan -> prompt or task -> numbers by name."""

from pathlib import Path
from typing import Any

from accel.errors import AccelError
from accel.origin import read_json
from accel.untrusted import finite, table, typed

__all__ = ["read_known"]


def read_known(path: Path, names: set[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """Such a file, as untrusted input: every entry has exactly these `names`, and finite numbers.

    Raises AccelError.
    """
    plans = typed(f"{path}", read_json(path), dict)
    for plan, found in plans.items():
        for what, entry in typed(f"{path}: {plan!r:.20}", found, dict).items():
            where = f"{path}: {plan!r:.20} on {what!r:.80}"
            if not all(finite(value) for value in table(where, entry, names, names).values()):
                raise AccelError(f"{where} has something that is not a number")
    return dict(plans)
