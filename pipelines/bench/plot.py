"""The picture of a case: time of a call against the share of blocks kept, and the ideal."""

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from accel.files import write_atomically
from accel.pipelines.bench.results import Row
from accel.pipelines.bench.table import groups, title
from accel.pipelines.figures import INK, OTHER


def time_against_keep(rows: Sequence[Row]) -> bytes | None:
    """SVG of the attention rows of one case, on logarithmic axes; None where none was timed.

    One line for every backend, precision and block, hollow marks for uneven rows. The ideal begins
    at the fastest dense attention and falls with the keep.
    """
    timed = [row for row in rows if row.kernel == "attention" and row.ms]
    dense = [row for row in rows if row.kernel == "dense" and row.ms]
    if not timed or not dense:
        return None
    baseline = min(_median(row) for row in dense)
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    lines = dict.fromkeys((row.backend, row.mode, row.block) for row in timed)
    for number, line in enumerate(lines):
        backend, mode, block = line
        for kind in ("uniform", "uneven"):
            some = sorted(
                (row.kept, _median(row))
                for row in timed
                if (row.backend, row.mode, row.block) == line and row.rows == kind
            )
            if not some:
                continue
            even = kind == "uniform"
            axes.plot(
                *zip(*some, strict=True),
                "o-" if even else "o",
                color=f"C{number % 10}",
                markerfacecolor=f"C{number % 10}" if even else "none",
                label=f"{backend} {mode}, {block and block[0]} x {block and block[1]}"
                if even
                else None,
                lw=1.5,
            )
    least = min(row.kept for row in timed)
    axes.plot([least, 1], [least * baseline, baseline], "--", color=INK, lw=1.2, label="ideal")
    axes.axhline(baseline, color=OTHER, lw=1, ls=":", label=f"dense, {timed[0].baseline}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = sorted({round(row.keep, 3) for row in timed})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("share of blocks kept (hollow: uneven rows)")
    axes.set_ylabel("ms")
    axes.set_title(title(timed[0]), size=10, color=INK, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e2e8f0", lw=0.7)
    axes.legend(fontsize=8, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def write_plots(rows: Sequence[Row], folder: Path, prefix: str = "") -> list[Path]:
    """One file for every case that has something to show."""
    paths = []
    for _, some in groups(rows):
        picture = time_against_keep(some)
        if picture is not None:
            paths.append(write_atomically(folder / plot_name(some, prefix), picture))
    return paths


def plot_name(rows: Sequence[Row], prefix: str = "") -> str:
    """The file of the plot of one case."""
    return f"{prefix}{rows[0].shape}-{rows[0].dtype}.svg"


def _median(row: Row) -> float:
    assert row.ms is not None
    return row.ms["median"]
