"""The page of a benchmark: what was measured, how, and by which command."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accel.files import write_atomically
from accel.pipelines.bench.plot import plot_name, time_against_keep, write_plots
from accel.pipelines.bench.results import Row
from accel.pipelines.bench.table import cells, groups, is_mass, milliseconds

# columns of the table that a step has
STEP_CELLS = ("keep", "ms [p20, p80]", "of dense", "in attention", "error")
OPENING = """\
Measured, and this page written, by `{command}`;
the numbers are in [{numbers}]({numbers}).
{device}; {date}; {versions}.
"""
CHECKED = """\
Every result was first checked against float64; rivals and the dense baseline took turns, over
inputs that outgrow the cache.
"""
CELLS = """\
Each cell is the median time of one call in milliseconds, and in brackets its efficiency: the share
of token pairs that are computed, over the time as a multiple of the fastest dense attention of
others on this device and in this dtype. At 1.00 a sparse call gains as much as it leaves out.
`uneven` masks keep 0.4 to 1.6 times the share, drawn for every row of every head.
"""
STEPS = """\
One denoising step of a Wan transformer with random weights. Dense attention and accel took turns,
and accel's masks were made in the step before. With every block kept, accel's output was compared
with that of the model itself.
"""


def page(results: Mapping[str, Any], rows: Sequence[Row], command: str, name: str) -> str:
    """Markdown of `results`, case by case; its numbers and plots are called after `name`."""
    dates = sorted({row.date for row in rows if row.ms})
    versions = ", ".join(
        f"{name} {version}"
        for name, version in results["versions"].items()
        if version != "not installed"
    )
    opening = OPENING.format(
        command=command,
        numbers=f"{name}.json",
        device=results["device"],
        date=" to ".join(dict.fromkeys((dates[0], dates[-1]))),
        versions=versions,
    )
    kernels = {row.kernel for row in rows}
    parts = ["# What attention costs\n", opening]
    parts += [STEPS] if "wan_step" in kernels else [CHECKED]
    parts += [CELLS] if "attention" in kernels else []
    for case, some in groups(rows):
        if not any(row.ms for row in some):
            continue
        content = [*_dense(some), *_table(some), *_masses(some), *_steps(some)]
        parts += [f"## {case}\n", "\n".join(content) + "\n"]
        if time_against_keep(some) is not None:
            parts.append(f"![time against keep]({plot_name(some, f'{name}-')})\n")
    return "\n".join(parts)


def write_page(results: Mapping[str, Any], rows: Sequence[Row], path: Path, command: str) -> Path:
    """The page, its plots and its numbers, beside each other and called after the page."""
    write_plots(rows, path.parent, f"{path.stem}-")
    write_atomically(path.with_suffix(".json"), json.dumps(results, indent=1))
    return write_atomically(path, page(results, rows, command, path.stem))


def _dense(rows: Sequence[Row]) -> list[str]:
    timed = [row for row in rows if row.kernel == "dense" and row.ms]
    timed.sort(key=lambda row: row.ms["median"] if row.ms else 0.0)
    texts = [f"{row.backend} {milliseconds(row.ms['median'])} ms" for row in timed if row.ms]
    return [f"Dense attention of others: {', '.join(texts)}.\n"] if texts else []


def _steps(rows: Sequence[Row]) -> list[str]:
    """One line for every way in which a step was taken."""
    rows = [row for row in rows if row.kernel == "wan_step"]
    if not rows:
        return []
    head = ["attention", "keep", "ms", "of the fastest dense", "in attention", "error"]
    made = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    made += [f"| {' | '.join([row.backend, *cells(row, STEP_CELLS)])} |" for row in rows]
    return made


def _masses(rows: Sequence[Row]) -> list[str]:
    """One line for every kernel that finds out which blocks matter."""
    return [
        f"\n{row.kernel}, {row.mode}, blocks of {row.block[0]} x {row.block[1]}:"
        f" {milliseconds(row.ms['median'])} ms, {row.price:.2f} of a dense call."
        for row in rows
        if is_mass(row) and row.block and row.ms and row.price is not None
    ]


def _table(rows: Sequence[Row]) -> list[str]:
    """One line for every backend, precision, block and kind of rows; a column for every keep."""
    rows = [row for row in rows if row.kernel == "attention"]
    if not rows:
        return []
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
