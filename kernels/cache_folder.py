"""Where what accel finds out or builds on this machine is kept for the next process."""

import os
import sys
from pathlib import Path

__all__ = ["cache_folder", "cache_path"]


def cache_path() -> Path | None:
    """Accel's folder in the user's cache, whether it is there or not; None for want of a home."""
    try:
        if sys.platform == "darwin":
            base = Path.home() / "Library" / "Caches"
        else:
            base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user whom nobody knows
        return None
    return base / "accel-suite"


def cache_folder() -> Path:
    """The same folder, made where it is missing; nobody else can write there.

    What lies in it is code, or decides which code runs. OSError where there is none: a user without
    a home, a read-only disk, a folder that others may have put things into.
    """
    folder = cache_path()
    if folder is None:
        raise FileNotFoundError("this user has no home folder; set XDG_CACHE_HOME")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if hasattr(os, "getuid"):
        told = folder.stat()
        if told.st_uid != os.getuid() or told.st_mode & 0o022:
            raise PermissionError(f"{folder} can be written to by others; delete it")
    return folder
