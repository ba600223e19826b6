"""The pictures of a comparison report: functions from measurements to SVG, PNG and WebP."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from accel.pipelines.video_files import to_bytes
from accel.records import DENSE_LABEL

ACCENT, OTHER, INK, FAINT = "#0f766e", "#64748b", "#1e293b", "#cbd5e1"
FRAMES_SHOWN = 6
AMPLIFIED = 4
UNIFORM_RANGE = 1.5  # attention maps span 10^-1.5 to 10^1.5 times uniform attention

Frames = Float[np.ndarray, "_frames _height _width 3"]


def keep_and_recall(arms: Mapping[str, Any]) -> bytes:
    """For every arm: blocks kept by layer and band as a heat map, and recall by layer beside it."""
    shown = {name: _by_layer(arm["summary"]) for name, arm in arms.items() if arm.get("summary")}
    layers = max(len(table["sites"]) for table in shown.values())
    figure = Figure(
        figsize=(2.5 * len(shown) + 0.8, 2 * (0.9 + 0.16 * max(layers, 6))), layout="constrained"
    )
    grid = figure.subplots(2, len(shown), squeeze=False, sharey=True)
    image = None
    for column, (name, table) in enumerate(shown.items()):
        axes = grid[0, column]
        keep = np.ma.masked_invalid(table["keep"])
        image = axes.imshow(keep, cmap="YlGnBu", vmin=0, vmax=1, aspect="auto")
        for (row, band), value in np.ndenumerate(table["keep"]):
            if layers <= 12 and not np.isnan(value):
                colour = "white" if value > 0.55 else INK
                axes.text(band, row, f"{value:.2f}", ha="center", va="center", color=colour, size=8)
        axes.set_title(name, color=INK, size=11, weight="bold")
        axes.set_xticks(range(len(table["bands"])), table["bands"], size=8)
        rows = np.arange(len(table["sites"]))
        _recall(grid[1, column], rows, table["recall"], table["worst"])
    for axes in grid[:, 0]:
        axes.set_ylabel("layer")
        axes.set_yticks(range(layers) if layers <= 12 else range(0, layers, 5))
    if image is not None:
        figure.colorbar(image, ax=grid[0].tolist(), label="blocks kept", shrink=0.9)
    return _svg(figure)


def _recall(axes: Axes, rows: Any, recall: Any, worst: Any) -> None:
    axes.hlines(rows, worst, recall, color=FAINT, lw=3)
    axes.plot(worst, rows, "|", color=OTHER, ms=8, label="worst head")
    axes.plot(recall, rows, "o", color=ACCENT, ms=5, label="mean")
    axes.set_xlim(0, 1.03)
    axes.set_xlabel("recall", size=9)
    axes.tick_params(labelsize=8)
    _plain(axes)


def _by_layer(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Rows of a run summary as tables: keep `[layer, band]`; recall, mean over bands, by layer."""
    rows = [r for r in summary["rows"] if r["phase"] != DENSE_LABEL]
    sites = list(dict.fromkeys(r["site"] for r in summary["rows"]))
    bands = sorted({r["phase"] for r in rows})
    keep = np.full((len(sites), max(1, len(bands))), np.nan)
    recall, worst = np.full(len(sites), np.nan), np.full(len(sites), np.nan)
    for row in rows:
        keep[sites.index(row["site"]), bands.index(row["phase"])] = row["keep"]
    for index, site in enumerate(sites):
        found = [r for r in rows if r["site"] == site and r["recall"] is not None]
        if found:
            recall[index] = np.mean([r["recall"] for r in found])
            worst[index] = min(r["worst_recall"] for r in found)
    return {"sites": sites, "bands": bands, "keep": keep, "recall": recall, "worst": worst}


def attention_maps(
    maps: Sequence[Mapping[str, Any]],
    mass: Sequence[Float[np.ndarray, "_rows _columns"]],
    keep: Sequence[Bool[np.ndarray, "_q_blocks _kv_blocks"]],
) -> bytes:
    """Heads of a few layers: mean attention between cells as a multiple of uniform attention.

    Two rows for each layer: the whole map, and the same with what is not kept taken away.
    """
    sites = list(dict.fromkeys(m["site"] for m in maps))
    heads = max(sum(m["site"] == site for m in maps) for site in sites)
    figure = Figure(figsize=(2.6 * heads + 0.9, 5.6 * len(sites)), layout="constrained")
    grid = figure.subplots(2 * len(sites), heads, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    image = None
    for one, weights, kept in zip(maps, mass, keep, strict=True):
        row = 2 * sites.index(one["site"])
        column = [m["head"] for m in maps if m["site"] == one["site"]].index(one["head"])
        relative = np.log10(np.maximum(weights * one["tokens"], 1e-9))
        for axes in grid[row : row + 2, column]:
            image = axes.imshow(
                relative, cmap="magma", vmin=-UNIFORM_RANGE, vmax=UNIFORM_RANGE,
                extent=(0, one["tokens"], one["tokens"], 0),
            )  # fmt: skip
        _take_away(grid[row + 1, column], kept, one["block"], one["tokens"])
        title = f"{one['site']}, head {one['head']}"
        grid[row, column].set_title(title, size=9, color=INK, loc="left", weight="bold")
        grid[row + 1, column].set_title(
            f"{one['choice']}\nkeeps {kept.mean():.0%}, recall {one['recall']:.0%}",
            size=8, color=INK, loc="left",
        )  # fmt: skip
    if image is not None:
        bar = figure.colorbar(image, ax=grid.ravel().tolist(), shrink=0.3, aspect=30)
        bar.set_ticks([-1, 0, 1], labels=["1/10", "uniform", "10 x"])
    return _webp(figure, dpi=120)


def _take_away(axes: Axes, kept: Any, block: Sequence[int], tokens: int) -> None:
    """Cover the blocks that are not kept, down to a trace."""
    y = np.minimum(np.arange(kept.shape[0] + 1) * block[0], tokens)
    x = np.minimum(np.arange(kept.shape[1] + 1) * block[1], tokens)
    veil = np.where(kept, np.nan, 0.0)
    axes.pcolormesh(x, y, veil, cmap="gray_r", vmin=0, vmax=1, alpha=0.88, linewidth=0)
    axes.set_xlim(0, tokens)
    axes.set_ylim(tokens, 0)


def strip(video: Frames) -> bytes:
    """Evenly spaced frames side by side, at their own size, as PNG."""
    chosen = np.linspace(0, len(video) - 1, min(FRAMES_SHOWN, len(video))).round().astype(int)
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(list(to_bytes(video[chosen])), axis=1)).save(
        buffer, "png", optimize=True
    )
    return buffer.getvalue()


def difference(video: Frames, reference: Frames) -> Frames:
    """`4 |video - reference|`, clipped at 1."""
    return (AMPLIFIED * np.abs(video - reference)).clip(0, 1)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e2e8f0", lw=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK)


def _svg(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _webp(figure: Figure, dpi: int) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="webp", dpi=dpi, pil_kwargs={"quality": 90})
    return buffer.getvalue()
