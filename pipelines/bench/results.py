"""What a benchmark has measured so far, as one file that is always whole.

A row stays as long as what it was taken on and how: device, versions, code and the settings of the
measurement. A run with others of these sets the file aside under a name of its own, and takes it up
again where it is asked for the same once more.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch

from accel.files import write_atomically
from accel.pipelines.bench.case import Block, Case, Part
from accel.pipelines.bench.contest import Outcome
from accel.pipelines.provenance import code_digest, device_name, versions
from accel.timing import quantile

PEERS = ("flash-attn-3", "flashinfer-python", "xformers")
# the files of the measurement, not those of tables and pictures
CODE = (
    "case", "contest", "gate", "inputs", "kernels", "results", "rivals", "wan_model", "wan_step",
)  # fmt: skip
# what fails of these will fail again: the versions are part of the key
LASTING = ("ImportError", "ModuleNotFoundError", "NotImplementedError")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measurement; None where there is none.

    kernel: dense, attention, block_mass, antidiagonal or wan_step. backend: with it an order and a
    rest that are not the usual ones. mode: the precision of attention, else which form of the
    kernel. keep: the share of blocks asked for, kept: the share of token pairs computed. ms:
    median, p20 and p80 of one call over so many rounds. tflops: of the blocks that are kept, or of
    one product of all queries and keys. price: time over the baseline's, the fastest dense
    attention of others, measured in turn. efficiency: kept / price; 1 is a sparse call as much
    faster than dense as it computes less. own_efficiency: the same over the same backend with
    every block kept. error: relative L2 distance to float64, limit: the largest allowed. share:
    part of a denoising step spent in self-attention. date: of the measurement.
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
    rounds: int = 0
    tflops: float | None = None
    price: float | None = None
    efficiency: float | None = None
    own_efficiency: float | None = None
    share: float | None = None
    baseline: str = ""
    error: float | None = None
    limit: float | None = None
    note: str = ""
    date: str = ""

    @property
    def case(self) -> Case:
        return Case(**{name: getattr(self, name) for name in Case.__slots__})

    @property
    def part(self) -> Part:
        return Part(self.block, self.keep, self.rows)

    @property
    def failed(self) -> bool:
        """Whether the rival failed of what may be gone another time."""
        return self.ms is None and self.limit is None and not self.note.startswith(LASTING)

    def of(self, kernel: str, case: Case, part: Part) -> bool:
        """Whether the row belongs to a kernel, a case and a part of it."""
        return (self.kernel, self.case, self.part) == (kernel, case, part)


def measured(outcome: Outcome, flops: float | None) -> dict[str, Any]:
    """The fields of a row that come from an outcome of a job of so many operations."""
    ms = None
    if outcome.seconds:
        seconds = [1000 * s for s in outcome.seconds]
        ms = {"median": median(seconds)}
        ms |= {name: quantile(seconds, share) for name, share in (("p20", 0.2), ("p80", 0.8))}
    return {
        "ms": ms,
        "rounds": len(outcome.seconds),
        "tflops": None if ms is None or flops is None else flops / ms["median"] / 1e9,
        "price": outcome.price,
        "error": outcome.error,
        "limit": outcome.limit,
        "note": outcome.note,
        "date": date.today().isoformat(),
    }


class Results:
    """The rows of `path`, and those that are added. settings: how they are measured.

    samples: what is known of rows that are not finished, as JSON.
    """

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
        self.samples: list[dict[str, Any]] = []
        found = _read(path)
        if found and found.get("key") != self.key:
            aside = self._named(str(found.get("key")))
            os.replace(path, aside)
            print(f"results of other settings, code or device are kept: {aside}")
            found = None
        if not found and self._named(self.key).is_file():
            os.replace(self._named(self.key), path)
            found = _read(path)
        if found:
            self.rows = [_row(row) for row in found["rows"]]
            self.samples = found["samples"]

    @property
    def key(self) -> str:
        """Names what every row depends on."""
        text = json.dumps(self._about, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def of(self, case: Case) -> list[Row]:
        """The rows of a case."""
        return [row for row in self.rows if row.case == case]

    def add(self, rows: Sequence[Row]) -> None:
        """Keep rows, in place of those of the same rivals, and write the file."""
        known = {_identity(row): row for row in (*self.rows, *rows)}
        self.rows = list(known.values())
        content = {**self.about(self.rows), "samples": self.samples}
        write_atomically(self.path, json.dumps(content, indent=1))

    def about(self, rows: Sequence[Row]) -> dict[str, Any]:
        """What a file says of rows."""
        return {"key": self.key, **self._about, "rows": [asdict(row) for row in rows]}

    def _named(self, key: str) -> Path:
        return self.path.with_name(f"{self.path.stem}-{key[:8]}{self.path.suffix}")


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _identity(row: Row) -> tuple[Any, ...]:
    return row.kernel, row.case, row.part, row.backend, row.mode


def _row(data: dict[str, Any]) -> Row:
    block = data["block"]
    return Row(**{**data, "block": block and tuple(block)})


def _versions(device: torch.device) -> dict[str, str]:
    found = versions(*PEERS)
    if device.type == "cuda":
        found |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    return found


def _tiles(device: torch.device) -> str:
    """Names the tiles that were tuned on this machine; empty where there are none."""
    if device.type != "cuda":
        return ""
    from accel.kernels.tiles import user_table_path

    path = user_table_path()
    if path is None or not path.is_file():
        return ""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _code() -> str:
    """Names the code of the kernels and of the measurement."""
    return code_digest(*(Path(__file__).parent / f"{name}.py" for name in CODE))
