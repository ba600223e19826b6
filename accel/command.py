"""What the commands share: one line for an error that accel raised, no traceback."""

import sys
from collections.abc import Callable

from accel.errors import AccelError


def run_command(job: Callable[[], None], *, resumes: bool = False) -> None:
    """Run a command's job; an `AccelError` becomes its message on stderr and exit status 1.

    resumes: whether the same command goes on where it was interrupted.
    """
    try:
        job()
    except AccelError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        how = "the same command goes on where it stopped" if resumes else "nothing is kept"
        print(f"interrupted; {how}", file=sys.stderr)
        sys.exit(130)


def hydra_version() -> str | None:
    """What `hydra.main` wants as `version_base`: 1.3 warns when it is not given, 1.4 when it is."""
    import hydra

    major, minor = (int(part) for part in hydra.__version__.split(".")[:2])
    return "1.3" if (major, minor) < (1, 4) else None
