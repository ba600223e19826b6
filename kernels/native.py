"""Builds and loads the C++ kernels: once per compiler and processor, in the user's cache folder."""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch  # noqa: F401  (its OpenMP runtime has to be the one the library finds loaded)

__all__ = ["available", "library"]

log = logging.getLogger("accel")

SOURCE = Path(__file__).with_name("attention_native.cpp")
COMPILERS = ("g++", "clang++", "c++")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")

_lock = threading.Lock()
# the outcome of the one attempt of this process
_loaded: list[ctypes.CDLL | None] = []


def available() -> bool:
    """Whether the compiled kernels can be used; the first call may build them (seconds)."""
    return library() is not None


def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where there is no compiler or they cannot be built.

    Never raises: what fails is logged as one warning, and torch does the work.
    """
    with _lock:
        if not _loaded:
            _loaded.append(_load())
        return _loaded[0]


def _load() -> ctypes.CDLL | None:
    compiler = _compiler()
    if compiler is None:
        log.info("no C++ compiler found: sparse attention on the CPU runs on torch")
        return None
    try:
        with _cache_folder() as folder:
            path = folder / f"{_key(compiler)}.so"
            try:
                return ctypes.CDLL(str(path))
            except OSError:  # not there, or cut short by a full disk
                _build(compiler, path)
            return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        log.warning(
            "the CPU kernels could not be built, torch is used instead (slower): %s", reason
        )
        return None


def _compiler() -> str | None:
    """``$CXX``, as builds use it, or the first compiler on the path."""
    names = (os.environ.get("CXX"), *COMPILERS)
    return next((path for name in names if name and (path := shutil.which(name))), None)


def _key(compiler: str) -> str:
    """Names everything that a build depends on: source, compiler, flags, processor."""
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    parts = (SOURCE.read_text("utf-8"), compiler, version, *FLAGS, _processor())
    return f"{SOURCE.stem}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:20]}"


def _processor() -> str:
    """What ``-march=native`` stands for here."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().split("\n\n")[0].splitlines() if cpuinfo.exists() else []
    told = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU "))]
    return "\n".join([platform.machine(), platform.processor(), *told])


@contextmanager
def _cache_folder() -> Iterator[Path]:
    """A folder that is ours and can be written to; one for this process if need be."""
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "accel-suite"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _ours(folder):
            raise PermissionError(f"{folder} can be written to by others")
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError:
        # what is loaded stays loaded when its file goes
        with tempfile.TemporaryDirectory(prefix="accel-suite-") as temporary:
            yield Path(temporary)
    else:
        yield folder


def _ours(folder: Path) -> bool:
    """Whether nobody else can put a library there; always where files have no owners."""
    told = folder.stat()
    return not hasattr(os, "getuid") or (told.st_uid == os.getuid() and not told.st_mode & 0o022)


def _build(compiler: str, path: Path) -> None:
    """Compile to ``path``. Whoever builds at the same time replaces it by an equal file."""
    log.info("building the CPU kernels with %s (a few seconds, once)", compiler)
    handle, unfinished = tempfile.mkstemp(suffix=".so", dir=path.parent)
    os.close(handle)
    try:
        subprocess.run(
            [compiler, *FLAGS, str(SOURCE), "-o", unfinished],
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
        )
        os.replace(unfinished, path)
    finally:
        Path(unfinished).unlink(missing_ok=True)
