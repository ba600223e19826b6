"""What the commands share: one line for an error that accel raised, no traceback."""

import sys
from collections.abc import Callable

from accel.errors import AccelError


def run_command(job: Callable[[], None]) -> None:
    """Run a command's job; an `AccelError` becomes its message on stderr and exit status 1."""
    try:
        job()
    except AccelError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        sys.exit(130)
