"""What a measurement was taken on and by: the device, the libraries, and the code that computed."""

import ast
import hashlib
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import accel

LIBRARIES = (
    *("accel-suite", "torch", "triton", "diffusers", "transformers", "timm"),
    "opencv-python",
)


def device_name(device: torch.device) -> str:
    """The graphics card, or the processor with the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = "CPU"
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [s for s in info.read_text().splitlines() if s.startswith("model name")]
        name = models[0].split(":", 1)[1].strip() if models else name
    return f"{name}, {torch.get_num_threads()} threads"


def versions(*more: str) -> dict[str, str]:
    """What is installed, by distribution: those that everything depends on, and `more`."""
    found = {"python": platform.python_version()}
    for name in (*LIBRARIES, *more):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


@cache
def pipeline_files(*names: str) -> tuple[Path, ...]:
    """The files of these modules of `accel.pipelines`, and of those there that their heads import,
    directly or not.
    """
    folder = Path(accel.__file__).parent / "pipelines"
    found: dict[str, Path] = {}
    todo = list(names)
    while todo:
        name = todo.pop()
        path = folder / f"{name}.py"
        if name in found or not path.is_file():
            continue
        found[name] = path
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                head, _, module = node.module.partition("accel.pipelines")
                if not head and module:
                    todo.append(module[1:])
                elif node.module == "accel.pipelines":
                    todo += [alias.name for alias in node.names]
    return tuple(found[name] for name in sorted(found))


@cache
def code_digest(*more: Path) -> str:
    """Names the code that computes: plans, kernels and interception, and the files `more`."""
    root = Path(accel.__file__).parent
    files = [*more, *root.glob("*.py")]
    for package in ("estimators", "recipes"):
        files += (root / package).glob("*.py")
    files += (root / "kernels").glob("*")
    files += [root / "pipelines" / f"{name}.py" for name in ("adapters", "enable", "video_dit")]
    digest = hashlib.sha256()
    for file in sorted(f for f in files if f.suffix in (".py", ".cpp", ".h")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
