"""A search in pictures: the trade-off it found, and what every head of the chosen plan does."""

import io
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from accel.choice import Choice
from accel.files import write_atomically
from accel.plan import Plan

if TYPE_CHECKING:
    from accel.search.finish import Outcome

ACCENT, OTHER, INK, FAINT = "#0f766e", "#94a3b8", "#1e293b", "#e2e8f0"
# one colour for each kind of selection, the same in every picture
COLOURS = (
    *("#0f766e", "#2563eb", "#d97706", "#9333ea", "#be123c", "#4d7c0f"),
    *("#0891b2", "#a16207", "#64748b", "#db2777"),
)
MAX_LABELS = 900  # cells that still have room for words


def draw_front(outcome: "Outcome", dense_seconds: float, path: Path) -> Path:
    """Write a PNG: measured time against measured PSNR, the front as a line, recipes by name."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    points = [p for p in outcome.points if p.measured.psnr < 100]
    axes.plot(
        [1 / p.measured.speedup for p in points],
        [p.measured.psnr for p in points],
        "o-",
        color=ACCENT,
        ms=6,
        label=f"front, measured ({len(outcome.trials)} trials)",
    )
    predicted = [
        (p.plan.expected["seconds"] / dense_seconds, p.measured.psnr)
        for p in points
        if "seconds" in p.plan.expected
    ]
    axes.plot(*zip(*predicted, strict=True) if predicted else ((), ()), "x", color=OTHER, ms=5,
              label="its predicted times")  # fmt: skip
    for recipe in outcome.recipes:
        at = (1 / recipe.measured.speedup, recipe.measured.psnr)
        axes.plot(*at, "s", color="#d97706", ms=6)
        axes.annotate(recipe.name, at, xytext=(6, 4), textcoords="offset points", color=INK)
    chosen = outcome.chosen.measured
    label = (
        f"{outcome.plan.name}: {outcome.best_dense_speedup / chosen.speedup:.2f} of the fastest"
        f" dense, {chosen.psnr:.1f} dB"
    )
    axes.plot(1 / chosen.speedup, chosen.psnr, "*", ms=15, color="#be123c", label=label)
    axes.axvline(1, color=OTHER, lw=1)
    axes.annotate("host's dense", (1, 0.02), xycoords=("data", "axes fraction"), rotation=90,
                  ha="right", color=OTHER)  # fmt: skip
    if outcome.dense is not None:
        axes.axvline(1 / outcome.dense.speedup, color=OTHER, lw=1, ls="--")
        axes.annotate("accel's dense", (1 / outcome.dense.speedup, 0.02), rotation=90, ha="right",
                      xycoords=("data", "axes fraction"), color=OTHER)  # fmt: skip
    axes.set_xlabel("generation time, as a fraction of the host's dense one")
    axes.set_ylabel("PSNR against dense (dB)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=FAINT)
    axes.set_axisbelow(True)
    axes.legend(loc="best", framealpha=0.95)
    return _png(figure, path)


def draw_heads(plan: Plan, path: Path) -> Path:
    """Write a PNG of the chosen patterns and orders: a row for every head, a column for every band.

    Colour says how blocks are selected, words say with which numbers, in which order, and what
    stands for the rest.
    """
    rows = [(site, head) for site, bands in plan.sites.items() for head in range(len(bands[0]))]
    bands = plan.schedule.n_bands
    chosen = [[plan.sites[site][band][head] for band in range(bands)] for site, head in rows]
    kinds = list(dict.fromkeys(c.select.kind for row in chosen for c in row))
    colours = {kind: COLOURS[i % len(COLOURS)] for i, kind in enumerate(kinds)}
    height = max(3.0, 0.26 * len(rows) + 1.2)
    figure = Figure(figsize=(2.6 * bands + 2.2, min(height, 60)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(
        np.array([[to_rgb(colours[c.select.kind]) for c in row] for row in chosen]),
        aspect="auto",
        alpha=0.85,
    )
    if len(rows) * bands <= MAX_LABELS:
        for y, row in enumerate(chosen):
            for x, choice in enumerate(row):
                axes.text(x, y, _short(choice), ha="center", va="center", color="white", size=7)
    axes.set_xticks(range(bands), _band_names(plan), size=8)
    starts = [i for i, (_, head) in enumerate(rows) if head == 0]
    axes.set_yticks(starts, [rows[i][0] for i in starts], size=8)
    for start in starts[1:]:
        axes.axhline(start - 0.5, color="white", lw=2)
    axes.set_title(f"{plan.name}: what every head does", loc="left", size=10, color=INK)
    axes.legend(
        handles=[Patch(color=colours[kind], label=kind) for kind in kinds],
        loc="upper left",
        bbox_to_anchor=(1.01, 1),
        fontsize=8,
        frameon=False,
    )
    return _png(figure, path)


def _short(choice: Choice) -> str:
    """The numbers of a selection, its order and its rest, in a few letters."""
    values: Mapping[str, Any] = {k: v for k, v in choice.select.to_dict().items() if k != "kind"}
    inside = [f"{v:g}" if isinstance(v, float) else str(v) for v in values.values() if _told(v)]
    parts: Sequence[str] = [
        ",".join(inside) if len(inside) <= 4 else "",
        "" if choice.order == "thw" else choice.order,
        "" if choice.rest == "drop" else choice.rest,
    ]
    return " ".join(p for p in parts if p)


def _told(value: Any) -> bool:
    return value is not None and type(value) is not bool and not isinstance(value, list | bytes)


def _band_names(plan: Plan) -> list[str]:
    schedule = plan.schedule
    ends = [schedule.dense_start, *schedule.bands, 1 - schedule.dense_end]
    return [f"{a:.0%} to {b:.0%} of the run" for a, b in pairwise(ends)]


def _png(figure: Figure, path: Path) -> Path:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return write_atomically(path, picture.getvalue())
