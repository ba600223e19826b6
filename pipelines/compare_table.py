"""The results of a comparison as rows of text: for the terminal, Markdown and the report."""

from collections.abc import Mapping
from typing import Any

from accel.pipelines.compare_arms import KINDS
from accel.pipelines.compare_findings import sentences_of
from accel.pipelines.measures import Column, number
from accel.pipelines.outputs import output_of

GROUPED_FROM = 9  # arms: longer tables have a heading for every kind


def _seconds(results: Mapping[str, Any]) -> str:
    found = results.get("seconds")
    if not found:
        return "-"
    return f"{found['median']:.2f} [{found['p20']:.2f}, {found['p80']:.2f}]"


def _step(results: Mapping[str, Any]) -> str:
    steps = results.get("step_seconds") or {}
    parts = [steps.get(phase) for phase in ("dense", "sparse")]
    return " / ".join("-" if s is None else f"{1000 * s:.0f}" for s in parts)


def _memory(results: Mapping[str, Any]) -> str:
    peak = results.get("peak_memory_bytes")
    return "-" if peak is None else f"{peak / 2**30:.2f}"


SPEED = (
    Column(
        "speed-up",
        "median over prompts and rounds of the time of the fastest dense arm / this arm's time, of"
        " generations of the same turn, beside each other in one sitting",
        number("{:.2f}x", "speedup"),
    ),
    Column(
        "over host",
        "the same over dense, the host's own attention, which accel does not touch",
        number("{:.2f}x", "speedup_over", "dense"),
    ),
    Column(
        "predicted",
        "the speed-up that the plan expects from what kernels cost; whether that was measured, and"
        " where, stands with the findings",
        number("{:.2f}x", "predicted_speedup"),
    ),
    Column("seconds", "time of one generation: median [20th, 80th percentile]", _seconds),
    Column("step ms", "median time of one step: dense / sparse", _step),
)
MEMORY = (
    Column(
        "memory GiB",
        "peak: of the GPU's allocations, or of the resident memory of the process",
        _memory,
    ),
    Column("keep", "mean fraction of blocks computed in sparse steps", number("{:.3f}", "keep")),
)


def columns_of(results: Mapping[str, Any]) -> tuple[Column, ...]:
    """The columns of a table: what every kind of output has, and what this one has of its own."""
    kind = output_of(results["settings"].get("output", "frames"))
    return (*SPEED, *kind.columns_of_speed, *MEMORY, *kind.columns_of_quality(results["arms"]))


def rows_of(results: Mapping[str, Any]) -> list[list[str]]:
    """The head and one row per arm; columns that no arm has anything for are left out.

    In a long table every kind of arm begins with a row of its name alone.
    """
    arms = results["arms"]
    texts = {c.head: [c.text(arm) for arm in arms.values()] for c in columns_of(results)}
    shown = [head for head, column in texts.items() if set(column) - {"-", "- / -"}]
    rows, kind = [["arm", *shown]], None
    for i, (name, arm) in enumerate(arms.items()):
        if len(arms) >= GROUPED_FROM and arm["kind"] != kind:
            kind = arm["kind"]
            rows.append([KINDS[kind]])
        rows.append([name, *(texts[head][i] for head in shown)])
    return rows


def failures(results: Mapping[str, Any]) -> list[str]:
    """One line for every arm that failed, for every reason why calls ran dense, and for what a
    cache leaves out of its paper.
    """
    lines = []
    for name, arm in results["arms"].items():
        if arm.get("error"):
            lines.append(f"{name} failed: {arm['error']}")
        elif arm["note"]:
            lines.append(f"{name}: {arm['note']}")
        if arm.get("maps_error"):
            lines.append(f"{name} has no attention maps: {arm['maps_error']}")
        lines += [f"{name} ran dense {n} times: {why}" for why, n in arm["notices"].items()]
        if arm["speedup"] is not None and not arm["paired_in_one_sitting"]:
            lines.append(
                f"{name}: its times and those of dense were measured at different times; remove"
                " the output folder to measure them side by side"
            )
    return lines


def as_text(results: Mapping[str, Any]) -> str:
    """An aligned table; below it what went wrong, and what the arms say together."""
    rows = rows_of(results)
    columns = len(rows[0])
    whole = [row + [""] * (columns - len(row)) for row in rows]
    widths = [max(len(row[i]) for row in whole) for i in range(columns)]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in whole
    ]
    return "\n".join([*lines, *failures(results), *sentences_of(results)])


def as_markdown(results: Mapping[str, Any]) -> str:
    """The same table for a README, with what it was measured on."""
    settings = results["settings"]
    kind = output_of(settings.get("output", "frames"))
    head, *body = rows_of(results)
    lines = [f"| {' | '.join(head)} |", f"|{'---|' + '---:|' * (len(head) - 1)}"]
    for row in body:
        cells = row if len(row) > 1 else [f"**{row[0]}**", *[""] * (len(head) - 1)]
        lines.append(f"| {' | '.join(cells)} |")
    about = (
        f"{settings['model']}, {results['device']}, {settings['dtype']}, {kind.words(settings)[0]},"
        f" prompts: {len(settings['prompts'])}, rounds: {settings['rounds']}, {results['date']}"
    )
    notes = [f"- {line}" for line in [*failures(results), *sentences_of(results)]]
    return "\n".join([*lines, "", about, *([""] if notes else []), *notes]) + "\n"
