"""The trade-off as a picture: plans and recipes as named points, fronts as lines."""

import io
from collections.abc import Mapping, Sequence
from itertools import product
from math import cos, hypot, pi, sin
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox, BboxBase

from accel.pipelines.compare_arms import KINDS
from accel.pipelines.frames_output import PSNR, SPEED_UP
from accel.pipelines.measures import Measure, Quality

ACCENT, INK, FAINT = "#0f766e", "#1e293b", "#cbd5e1"
# colour, marker and its size, by kind of arm
MARKS = {
    "dense": (INK, "o", 5.0),
    "plan": (ACCENT, "D", 7.0),
    "front": (ACCENT, "o", 5.0),
    "recipe": ("#64748b", "o", 6.5),
    "cache": ("#b45309", "s", 6.5),
    "plan + cache": ("#7c3aed", "^", 7.0),
    "scaled": ("#b45309", "v", 6.5),
}
RADII = (7, 13, 20, 28, 38)  # how far from its point a label may stand, in points of print
DIRECTIONS = 12


def trade_off(
    arms: Mapping[str, Any],
    shown: str,
    lines: Mapping[str, Sequence[str]],
    speed: Measure = SPEED_UP,
    quality: Quality = PSNR,
    dense: float | None = 1.0,
    level: float | None = None,
) -> bytes:
    """A speed against a quality (mean, and a whisker down to the worst prompt's) as SVG.

    shown: the arm in bold. lines: what is joined, as arms by rising time. dense: the speed of the
    fastest dense arm, and level: the quality of dense, where it has one, for lines. Points of a
    front have their numbers, all others their names, without the plan's where all caches have the
    same one.
    """
    spots = spots_of(arms, speed, quality)
    points = {name: arms[name] for name in spots}
    tall = 4.0 if len(points) < 10 else 5.6
    figure = Figure(figsize=(8.4, tall), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Axes = figure.subplots()
    for members in lines.values():
        joined = [points[name] for name in members if name in points]
        if joined:
            colour = MARKS[joined[0]["kind"]][0]
            x_y = zip(*(spots[name] for name in members if name in spots), strict=True)
            axes.plot(*x_y, color=colour, lw=1.3, alpha=0.7, zorder=2)
    for name, arm in points.items():
        (x, y), (colour, marker, size) = spots[name], MARKS[arm["kind"]]
        worst = quality.worst(arm)
        if worst is not None:
            axes.plot([x, x], [worst, y], color=colour, lw=1, alpha=0.3, zorder=1)
            axes.plot([x], [worst], "_", ms=6, color=colour, alpha=0.4, zorder=1)
        bold = 2.0 if name == shown else 0.0
        axes.plot([x], [y], marker, ms=size + bold, color=colour, zorder=3)
    if dense is not None:
        axes.axvline(dense, color=FAINT, lw=1.5, zorder=0)
        axes.annotate(
            "fastest dense", (dense, 0), xycoords=("data", "axes fraction"), xytext=(4, 5),
            color="#64748b", textcoords="offset points", size=8,
        )  # fmt: skip
    if level is not None:
        axes.axhline(level, color=FAINT, lw=1.5, zorder=0)
        axes.annotate(
            "dense", (0, level), xycoords=("axes fraction", "data"), xytext=(4, 4),
            color="#64748b", textcoords="offset points", size=8,
        )  # fmt: skip
    axes.margins(x=0.12, y=0.12)
    axes.set_xlabel(speed.label)
    axes.set_ylabel(quality.label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e2e8f0", lw=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK)
    _legend(axes, [arm["kind"] for arm in points.values()])
    _label(figure, axes, points, spots, shown)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def spots_of(
    arms: Mapping[str, Any], speed: Measure, quality: Quality
) -> dict[str, tuple[float, float]]:
    """Where the arms stand that have both."""
    found = {name: (speed.of(arm), quality.of(arm)) for name, arm in arms.items()}
    return {name: (x, y) for name, (x, y) in found.items() if x and y is not None}


def _legend(axes: Axes, kinds: Sequence[str]) -> None:
    there = [kind for kind in KINDS if kind in kinds]
    if len(there) > 1:
        marks = [
            Line2D([], [], color=MARKS[k][0], marker=MARKS[k][1], ms=6, lw=0, label=KINDS[k])
            for k in there
        ]
        axes.legend(handles=marks, frameon=False, fontsize=8, loc="upper right")


def _label(
    figure: Figure,
    axes: Axes,
    points: Mapping[str, Any],
    spots: Mapping[str, tuple[float, float]],
    shown: str,
) -> None:
    """Name every point, each name where it covers least of the other names and points."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # what is measured below shall stay
    scale = figure.dpi / 72
    places = {n: axes.transData.transform(spot) for n, spot in spots.items()}
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in places.values()]
    plans = {n.rsplit("+", 1)[0] for n, arm in points.items() if arm["kind"] == "plan + cache"}
    one_plan = plans.pop() if len(plans) == 1 else ""
    legend = axes.get_legend()
    if legend is not None:
        taken.append(legend.get_window_extent())
    for name in sorted(places, key=lambda n: (n != shown, -places[n][0])):
        arm = points[name]
        text = name
        if arm["kind"] == "front":
            text = name.removeprefix(f"{arm['front']}-")
        elif name.startswith(f"{one_plan}+"):
            text = name.removeprefix(one_plan)
        label = axes.annotate(
            text, spots[name], xytext=(0, 0), textcoords="offset points", ha="center", va="center",
            color=MARKS[arm["kind"]][0], size=9 if name == shown else 8,
            weight="bold" if name == shown else "normal", zorder=4,
        )  # fmt: skip
        size = label.get_window_extent()
        best: tuple[float, tuple[float, float], Bbox] | None = None
        for radius, turn in product(RADII, range(DIRECTIONS)):
            angle = 2 * pi * turn / DIRECTIONS
            # from the point to the middle of the name, which begins `radius` away from it
            right = cos(angle) * (radius * scale + size.width / 2)
            up = sin(angle) * (radius * scale + size.height / 2)
            x, y = places[name][0] + right, places[name][1] + up
            box = Bbox.from_bounds(x - size.width / 2, y - size.height / 2, size.width, size.height)
            cost = sum(_shared(box, other) for other in taken)
            cost += 9 * (size.width * size.height - _shared(box, axes.bbox)) + 2 * radius
            if best is None or cost < best[0]:
                best = cost, (right / scale, up / scale), box
        assert best is not None
        label.set_position(best[1])
        taken.append(best[2])
        box, place = best[2], places[name]
        near = [min(max(place[i], box.min[i]), box.max[i]) for i in (0, 1)]
        if hypot(near[0] - place[0], near[1] - place[1]) > RADII[1] * scale:
            end = axes.transData.inverted().transform(near)
            axes.plot(*zip(spots[name], end, strict=True), color=FAINT, lw=0.8, zorder=0)


def _shared(one: BboxBase, other: BboxBase) -> float:
    """The area that two boxes share."""
    both = Bbox.intersection(one, other)
    return 0.0 if both is None else both.width * both.height
