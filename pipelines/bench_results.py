"""What a benchmark has measured so far, as one file that is always whole.

A row stays as long as what it was taken on and how: device, versions, code and the settings of the
measurement. A run with others of these begins anew.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from accel.files import write_atomically
from accel.pipelines.bench_contest import Outcome
from accel.pipelines.bench_settings import Block, Case
from accel.pipelines.compare_book import code_digest
from accel.pipelines.host import device_name, versions
from accel.timing import quantile

PEERS = ("flash-attn-3", "flashinfer-python", "xformers")
# the files of the measurement, not those of tables and pictures
CODE = ("contest", "gate", "inputs", "kernels", "results", "rivals", "wan_model", "wan_step")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measurement; None where there is none.

    kernel: dense, attention, block_mass, antidiagonal or wan_step. mode: the precision of
    attention, else which form of the kernel. keep: the share of blocks asked for, kept: the share
    of token pairs computed. ms: median, p20 and p80 of one call. tflops: of the blocks that are
    kept, or of one product of all queries and keys. price: time over the baseline's, the fastest
    dense attention of others, measured in turn. efficiency: kept / price; 1 is a sparse call as
    much faster than dense as it computes less. own_efficiency: the same over the same backend
    with every block kept. error: relative L2 distance to float64, limit: the largest allowed.
    share: part of a denoising step spent in self-attention.
    """

    kernel: str
    backend: str
    mode: str
    shape: str
    batch: int
    heads: int
    tokens: int
    dim: int
    dtype: str
    keep: float = 1.0
    kept: float = 1.0
    rows: str = "uniform"
    block: Block | None = None
    ms: dict[str, float] | None = None
    tflops: float | None = None
    price: float | None = None
    efficiency: float | None = None
    own_efficiency: float | None = None
    share: float | None = None
    baseline: str = ""
    error: float | None = None
    limit: float | None = None
    note: str = ""

    def of(self, kernel: str, case: Case) -> bool:
        """Whether the row belongs to a kernel and a case."""
        return self.kernel == kernel and all(
            getattr(self, name) == value for name, value in asdict(case).items()
        )


def measured(outcome: Outcome, flops: float) -> dict[str, Any]:
    """The fields of a row that come from an outcome of a job of so many operations."""
    ms = None
    if outcome.seconds:
        seconds = [1000 * s for s in outcome.seconds]
        ms = {"median": median(seconds)}
        ms |= {name: quantile(seconds, share) for name, share in (("p20", 0.2), ("p80", 0.8))}
    return {
        "ms": ms,
        "tflops": ms and flops / ms["median"] / 1e9,
        "price": outcome.price,
        "error": outcome.error,
        "limit": outcome.limit,
        "note": outcome.note,
    }


class Results:
    """The rows of `path`, and those that are added. settings: how they are measured."""

    def __init__(self, path: Path, device: torch.device, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._about: dict[str, Any] = {
            "device": device_name(device),
            "versions": _versions(device),
            "code": _code(),
            "tiles": _tiles(device),
            "settings": json.loads(json.dumps(settings)),
        }
        self.rows: list[Row] = []
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found.get("key") == self.key:
                self.rows = [_row(row) for row in found["rows"]]

    @property
    def key(self) -> str:
        """Names what every row depends on."""
        text = json.dumps(self._about, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def of(self, kernel: str, case: Case) -> list[Row]:
        """The rows of a kernel on a case; none where it was not measured."""
        return [row for row in self.rows if row.of(kernel, case)]

    def add(self, rows: Sequence[Row]) -> None:
        """Keep rows, and write the file."""
        self.rows += rows
        write_atomically(self.path, json.dumps(self.about(self.rows), indent=1))

    def about(self, rows: Sequence[Row]) -> dict[str, Any]:
        """What a file says of rows."""
        return {
            "key": self.key,
            **self._about,
            "date": date.today().isoformat(),
            "rows": [asdict(row) for row in rows],
        }


def _row(data: dict[str, Any]) -> Row:
    block = data["block"]
    return Row(**{**data, "block": block and tuple(block)})


def _versions(device: torch.device) -> dict[str, str]:
    found = versions()
    for name in PEERS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    if device.type == "cuda":
        found |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    return found


def _tiles(device: torch.device) -> str:
    """Names the tiles that were tuned on this machine; empty where there are none."""
    if device.type != "cuda":
        return ""
    from accel.kernels.tiles import user_table_path

    path = user_table_path()
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else ""


def _code() -> str:
    """Names the code of the kernels and of the measurement."""
    return code_digest(*(Path(__file__).parent / f"bench_{name}.py" for name in CODE))
