"""The card of a shared plan: what it is for, and what was measured of it. Nothing else is said."""

import json
import re
from collections.abc import Iterable
from typing import Any

from accel.plan import Plan
from accel.untrusted import finite

LIBRARY = "accel-suite"
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
# names in `expected`, as `accel-search` has them, and how they are told
MEASURED = {
    "measured_speedup": ("speed-up over the host's dense attention, whole generation", "{:.2f}x"),
    "measured_speedup_over_own_dense": ("speed-up over accel's own dense kernel", "{:.2f}x"),
    "dense_seconds": ("dense generation", "{:.1f} s"),
    "measured_psnr": ("PSNR against the dense generation of the same seed", "{:.1f} dB"),
}
PREDICTED = {"speedup": ("speed-up, whole generation", "{:.2f}x")}


def card(plan: Plan, repository: str | None = None) -> str:
    """The README of a repository, as markdown with the hub's front matter."""
    made = plan.made_at
    sets = {c for bands in plan.sites.values() for heads in bands for c in heads}
    facts = [
        ("model class", plan.model),
        ("sites made sparse", f"{len(plan.sites)} of {plan.n_sites}"),
        ("choices", ", ".join(sorted({c.select.kind for c in sets}))),
        ("block", "{} x {}".format(*plan.block)),
        ("precision", ", ".join(plan.precisions)),
        ("grid (t, h, w)", made.grid and "{} x {} x {}".format(*made.grid)),
        ("steps", made.steps),
        ("dtype", made.dtype),
        ("device", made.device_name or made.device),
        ("digest", plan.digest),
    ]
    lines = [
        *_front_matter(plan),
        f"# {_plain(plan.name)}",
        "",
        f"A plan of sparse attention for {_code(plan.model)}, to be used with accel.",
        "",
        "```python",
        "import accel",
        "",
        f"accel.enable(pipe, {json.dumps(repository or 'path/of/this/folder')})",
        "```",
        "",
        *_table("Made for", ((name, value) for name, value in facts if value is not None)),
        *_figures("Measured", plan, MEASURED),
        *_figures("Predicted", plan, PREDICTED),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _front_matter(plan: Plan) -> list[str]:
    """YAML; text in it is quoted as JSON has it, which YAML reads alike."""
    lines = ["---", f"library_name: {LIBRARY}", "tags:", "- accel", "- sparse-attention"]
    model = plan.provenance.get("model_path")
    # a path without a revision is one of the machine where the plan was made
    known = plan.provenance.get("revision") is not None
    if known and isinstance(model, str) and REPOSITORY.fullmatch(model):
        lines += [f"base_model: {json.dumps(model)}"]
    return [*lines, "---", ""]


def _figures(title: str, plan: Plan, named: dict[str, tuple[str, str]]) -> list[str]:
    known = {name: plan.expected.get(name) for name in named}
    rows = [
        (named[name][0], named[name][1].format(value))
        for name, value in known.items()
        if finite(value)
    ]
    return _table(title, rows)


def _table(title: str, rows: Iterable[tuple[str, Any]]) -> list[str]:
    lines = [f"| {name} | {_plain(value)} |" for name, value in rows]
    return [f"## {title}", "", "| | |", "|---|---|", *lines, ""] if lines else []


def _plain(value: Any) -> str:
    """A value as markdown text on one line of a table."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(str(value).split()))


def _code(value: str) -> str:
    return f"`{' '.join(value.replace('`', '').split())}`"
