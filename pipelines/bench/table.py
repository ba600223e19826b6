"""The results of a benchmark as text: lines for the terminal, and a page."""

from collections.abc import Callable, Sequence
from itertools import groupby

from accel.pipelines.bench.kernels import KERNELS
from accel.pipelines.bench.results import Row


def _number(form: str, name: str) -> Callable[[Row], str]:
    def text(row: Row) -> str:
        value = getattr(row, name)
        return "-" if value is None else format(value, form)

    return text


def milliseconds(value: float) -> str:
    """Three digits, or all before the point.

    >>> milliseconds(4143.21), milliseconds(0.012345)
    ('4143', '0.0123')
    """
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _ms(row: Row) -> str:
    if row.ms is None:
        return "-"
    median, p20, p80 = (milliseconds(row.ms[name]) for name in ("median", "p20", "p80"))
    return f"{median} [{p20}, {p80}]"


def is_mass(row: Row) -> bool:
    """Whether the kernel finds out which blocks matter; it looks at all of them."""
    return row.kernel in KERNELS and KERNELS[row.kernel].mass


COLUMNS: dict[str, Callable[[Row], str]] = {
    "kernel": lambda row: row.kernel,
    "backend": lambda row: row.backend,
    "mode": lambda row: row.mode,
    "block": lambda row: "-" if row.block is None else f"{row.block[0]} x {row.block[1]}",
    "keep": lambda row: "-" if is_mass(row) else f"{row.keep:.2f} {row.rows}",
    "ms [p20, p80]": _ms,
    "TFLOP/s": _number(".3g", "tflops"),
    "of dense": _number(".3f", "price"),
    "efficiency": _number(".2f", "efficiency"),
    "own": _number(".2f", "own_efficiency"),
    "in attention": _number(".0%", "share"),
    "error": _number(".1e", "error"),
    "limit": _number(".1e", "limit"),
    "note": lambda row: row.note,
}
LEGEND = """\
ms: median of one call [20th, 80th percentile]. TFLOP/s: of the blocks that are kept.
of dense: time as a multiple of the fastest dense attention of others, measured in turn with it.
efficiency: share of token pairs computed / of dense; 1 is a gain as large as what is left out.
own: the same against the same backend with every block kept. error: relative L2 distance to
float64 on sampled rows; what exceeds its limit is not timed."""


def cells(row: Row, heads: Sequence[str]) -> list[str]:
    """Some columns of a row."""
    return [COLUMNS[head](row) for head in heads]


def title(row: Row) -> str:
    """What a group of rows has in common."""
    return f"{row.shape}: {row.batch} x {row.heads} x {row.tokens} x {row.dim}, {row.dtype}"


def groups(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Rows by case, in the order in which cases first appear."""
    order = list(dict.fromkeys(title(row) for row in rows))
    ordered = sorted(rows, key=lambda row: order.index(title(row)))
    return [(name, list(some)) for name, some in groupby(ordered, title)]


def as_text(rows: Sequence[Row]) -> str:
    """Aligned lines, one for every row, under the title of its case; no column without content."""
    parts = []
    for name, some in groups(rows):
        columns = [[head, *(text(row) for row in some)] for head, text in COLUMNS.items()]
        shown = [column for column in columns if set(column[1:]) - {"-", ""}]
        widths = [max(map(len, column)) for column in shown]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in zip(*shown, strict=True)
        ]
        parts.append("\n".join([name, *lines]))
    return "\n\n".join([*parts, LEGEND])
