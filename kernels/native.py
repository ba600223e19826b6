"""Builds and loads the C++ kernels: once per compiler and processor, in the user's cache folder."""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has none; two processes may then build the same file
    fcntl = None  # type: ignore[assignment]

import torch  # noqa: F401  (its OpenMP runtime has to be the one the library finds loaded)

from accel.kernels.cache_folder import cache_folder

__all__ = ["available", "build", "has_integers", "library"]

log = logging.getLogger("accel")

SOURCE = Path(__file__).with_name("attention_native.cpp")
HEADERS = ("native_problem.h", "native_tiles.h", "native_vectors.h")
COMPILERS = ("g++", "clang++", "c++")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")

_lock = threading.Lock()
# the outcome of the one attempt of this process
_loaded: list[ctypes.CDLL | None] = []


def available() -> bool:
    """Whether the compiled kernels can be used; the first call may build them (seconds)."""
    return library() is not None


def has_integers() -> bool:
    """Whether the compiled kernels compute half precision in 16-bit integers on this processor."""
    compiled = library()
    return compiled is not None and bool(compiled.accel_has_integers())


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
            if (loaded := _open(path)) is not None:
                return loaded
            with _turn(folder):
                # another process may have built it while this one waited
                if (loaded := _open(path)) is not None:
                    return loaded
                build(compiler, path)
            return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        log.warning(
            "the CPU kernels could not be built, torch is used instead (slower): %s", reason
        )
        return None


def _open(path: Path) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(path))
    except OSError:  # not there, or cut short by a full disk
        return None


@contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """One process at a time builds; a lock ends with its process, however that ends.

    Where a file system has no locks, two may build the same: the file appears whole or not at all.
    """
    with (folder / ".lock").open("w") as file:
        if fcntl is not None:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compiler() -> str | None:
    """``$CXX``, as builds use it, or the first compiler on the path."""
    names = (os.environ.get("CXX"), *COMPILERS)
    return next((path for name in names if name and (path := shutil.which(name))), None)


def _key(compiler: str) -> str:
    """Names everything that a build depends on: source, compiler, flags, processor."""
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    sources = [SOURCE, *(SOURCE.with_name(name) for name in HEADERS)]
    texts = [path.read_text("utf-8") for path in sources if path.exists()]
    parts = (*texts, compiler, version, *FLAGS, _processor())
    return f"{SOURCE.stem}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:20]}"


def _processor() -> str:
    """What ``-march=native`` stands for here."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().split("\n\n")[0].splitlines() if cpuinfo.exists() else []
    told = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU "))]
    return "\n".join([platform.machine(), platform.processor(), *told])


@contextmanager
def _cache_folder() -> Iterator[Path]:
    """Accel's folder in the user's cache; one for this process if need be."""
    try:
        folder = cache_folder()
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError:
        # what is loaded stays loaded when its file goes
        with tempfile.TemporaryDirectory(prefix="accel-suite-") as temporary:
            yield Path(temporary)
    else:
        yield folder


def build(compiler: str, path: Path, *flags: str) -> None:
    """Compile the kernels to ``path``, which appears whole or not at all."""
    log.warning("accel builds its CPU kernels with %s: a few seconds, once", Path(compiler).name)
    handle, unfinished = tempfile.mkstemp(suffix=".so", dir=path.parent)
    os.close(handle)
    try:
        subprocess.run(
            [compiler, *FLAGS, *flags, str(SOURCE), "-o", unfinished],
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
        )
        os.replace(unfinished, path)
    finally:
        Path(unfinished).unlink(missing_ok=True)
