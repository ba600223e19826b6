"""The page of a benchmark: what was measured, how, and by which command."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accel.files import write_atomically
from accel.pipelines.bench_plot import plot_name, write_plots
from accel.pipelines.bench_results import Row
from accel.pipelines.bench_table import MASSES, groups, milliseconds

OPENING = """\
Measured, and this page written, by `{command}`;
the numbers are in [bench.json](bench.json).
{device}; {date}; {versions}.
"""
NOTHING = """\
Not yet measured. This measures it, and writes this page:

    {command}
"""
LEGEND = """\
Each cell is the median time of one call in milliseconds, and in brackets its efficiency: the share
of token pairs that are computed, over the time as a multiple of the fastest dense attention of
others on this device and in this dtype. At 1.00 a sparse call gains as much as it leaves out. Every
result was first checked against float64; rivals and the dense baseline took turns, over inputs that
outgrow the cache. `uneven` masks keep 0.4 to 1.6 times the share, drawn for every row of every
head.
"""
UNMEASURED = """\
## GPUs

Not yet measured. On a machine with a GPU this measures the shapes of `configs/shapes/real.yaml`:

    accel-bench shapes=real precisions=[full,int8,fp8]
    accel-bench kernel=wan_step
"""


def page(results: Mapping[str, Any], rows: Sequence[Row], command: str) -> str:
    """Markdown of the attention rows of `results`, case by case."""
    parts = ["# What attention costs\n"]
    shown = [(name, some) for name, some in groups(rows) if any(row.ms for row in some)]
    if shown:
        versions = ", ".join(
            f"{name} {version}"
            for name, version in results["versions"].items()
            if version != "not installed"
        )
        about = {"device": results["device"], "date": results["date"], "versions": versions}
        parts += [OPENING.format(command=command, **about), LEGEND]
    else:
        parts.append(NOTHING.format(command=command))
    for name, some in shown:
        parts.append(f"## {name}\n")
        parts.append("\n".join([_dense(some), *_table(some), *_masses(some)]) + "\n")
        parts.append(f"![time against keep]({plot_name(some)})\n")
    if not str(results["device"]).startswith("NVIDIA"):
        parts.append(UNMEASURED)
    return "\n".join(parts)


def write_page(results: Mapping[str, Any], rows: Sequence[Row], path: Path, command: str) -> Path:
    """The page, its plots and its numbers, beside each other."""
    write_plots(rows, path.parent)
    write_atomically(path.parent / "bench.json", json.dumps(results, indent=1))
    return write_atomically(path, page(results, rows, command))


def _dense(rows: Sequence[Row]) -> str:
    timed = [row for row in rows if row.kernel == "dense" and row.ms]
    timed.sort(key=lambda row: row.ms["median"] if row.ms else 0.0)
    texts = [f"{row.backend} {milliseconds(row.ms['median'])} ms" for row in timed if row.ms]
    return f"Dense attention of others: {', '.join(texts)}.\n"


def _masses(rows: Sequence[Row]) -> list[str]:
    """One line for every kernel that finds out which blocks matter."""
    return [
        f"\n{row.kernel}, {row.mode}, blocks of {row.block[0]} x {row.block[1]}:"
        f" {milliseconds(row.ms['median'])} ms, {row.price:.2f} of a dense call."
        for row in rows
        if row.kernel in MASSES and row.block and row.ms and row.price is not None
    ]


def _table(rows: Sequence[Row]) -> list[str]:
    """One line for every backend, precision, block and kind of rows; a column for every keep."""
    rows = [row for row in rows if row.kernel == "attention"]
    keeps = sorted({row.keep for row in rows}, reverse=True)
    lines: dict[tuple[Any, ...], dict[float, str]] = {}
    for row in rows:
        cells = lines.setdefault((row.backend, row.mode, row.block, row.rows), {})
        if row.ms is not None and row.efficiency is not None:
            cells[row.keep] = f"{milliseconds(row.ms['median'])} ({row.efficiency:.2f})"
    head = ["backend", "precision", "block", "rows", *(f"keep {keep:g}" for keep in keeps)]
    made = [f"| {' | '.join(head)} |", f"|{'---|' * 4}{'---:|' * len(keeps)}"]
    for (backend, mode, block, kind), cells in lines.items():
        size = f"{block[0]} x {block[1]}"
        line = [backend, mode, size, kind, *(cells.get(keep, "-") for keep in keeps)]
        made.append(f"| {' | '.join(line)} |")
    return made
