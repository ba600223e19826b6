"""The trade-off as a picture: predicted time against harm, the plan marked."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from accel.plan import Plan
from accel.search.front import Point


def draw_front(points: Sequence[Point], plan: Plan, path: Path) -> Path:
    """Write a PNG of the front; harm on a logarithmic axis, dense (no harm) left out of it."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    harmful = [p for p in points if p.harm > 0]
    axes.plot([p.time for p in harmful], [p.harm for p in harmful], "o-", ms=3, label="front")
    predicted = 1 / plan.expected["speedup"]
    axes.axvline(predicted, color="tab:red", lw=1, label=f"plan: {predicted:.2f} of dense")
    if "measured_speedup" in plan.expected:
        measured = 1 / plan.expected["measured_speedup"]
        label = f"measured: {measured:.2f}, PSNR {plan.expected['measured_psnr']:.1f} dB"
        axes.axvline(measured, color="tab:green", lw=1, ls="--", label=label)
    axes.set(
        xlabel="generation time, as a fraction of dense (predicted)",
        ylabel="summed relative squared error of the sites",
        # a front may have nothing but dense on it, where nothing is faster
        yscale="log" if harmful else "linear",
        title=plan.name,
    )
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
