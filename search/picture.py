"""The trade-off as a picture: predicted time against predicted PSNR, the plan marked."""

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from accel.files import write_atomically
from accel.plan import Plan
from accel.search.front import Point
from accel.search.sensitivity import predicted_psnr


def draw_front(points: Sequence[Point], plan: Plan, path: Path) -> Path:
    """Write a PNG of the front; dense, which harms nothing, is left out of it."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    harmful = [p for p in points if p.harm > 0]
    times, quality = [p.time for p in harmful], [predicted_psnr(p.harm) for p in harmful]
    axes.plot(times, quality, "o-", ms=3, label="front, predicted")
    expected = plan.expected
    time, psnr = 1 / expected["speedup"], expected["psnr"]
    axes.plot(time, psnr, "D", color="tab:red", label=f"plan: {time:.2f} of dense, {psnr:.1f} dB")
    if "measured_speedup" in expected:
        time, psnr = 1 / expected["measured_speedup"], expected["measured_psnr"]
        label = f"measured: {time:.2f} of dense, {psnr:.1f} dB"
        axes.plot(time, psnr, "*", ms=11, color="tab:green", label=label)
    axes.set(
        xlabel="generation time, as a fraction of the host's dense one",
        ylabel="PSNR against dense (dB)",
        title=plan.name,
    )
    axes.grid(alpha=0.3)
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return write_atomically(path, picture.getvalue())
