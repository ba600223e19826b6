"""The errors a user can meet. Each message names the value and the remedy."""

import difflib
from collections.abc import Iterable


class AccelError(Exception):
    """Base of every error that accel raises on purpose."""


class PlanError(AccelError, ValueError):
    """A plan that cannot be read, or that does not fit the model it is given to."""


class UnsupportedModelError(AccelError, ValueError):
    """A model in which no attention site can be taken; the message says why."""


class MissedSiteError(AccelError, RuntimeError):
    """The self-check after enabling did not see every site exactly once."""


def nearest(name: str, known: Iterable[str], most: int | None = None) -> str:
    """The hint of an error about an unknown name: the nearest known one, and all of them, or the
    first `most`.

    >>> nearest("windw", ["window", "radial"])
    "did you mean 'window'? Known: radial, window"
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    more = [] if most is None or len(names) <= most else [f"and {len(names) - most} more"]
    return f"{hint}Known: {', '.join([*names[:most], *more])}"
