"""Write docs/models.md: which feature works on which model, as the tests of this folder found it.

    python tests/models/table.py

Runs every test that is marked with a feature, the slow ones too. A cell is what happened to the
tests of its model and feature: passed, or skipped with a reason that is printed below. A failing
test leaves the page as it was.
"""

import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PAGE = HERE.parent.parent / "docs" / "models.md"

HEAD = """# Models and features

Made by `make models-table` from the outcomes of the tests in `tests/models`: the libraries' own
classes with small random weights. `+` passed; a number is the reason why there was nothing to
test, below each table. A model that is not listed gets a guess, see
[adding a model](add-a-model.md).
"""


@dataclass
class Outcomes:
    """Of one table: features in order, and for every model and feature its reasons for skips.

    An empty list: all passed.
    """

    title: str
    features: list[str] = field(default_factory=list)
    cells: dict[tuple[str, str], list[str]] = field(default_factory=dict)


class Collector:
    """A plugin of pytest that notes what became of every test of a feature."""

    def __init__(self) -> None:
        self.tables: dict[Path, Outcomes] = {}
        self.passed: defaultdict[tuple[Path, str, str], int] = defaultdict(int)
        self.models: list[str] = []
        self.failed: list[str] = []

    def pytest_collection_modifyitems(self, items):
        for item in items:
            marker = item.get_closest_marker("feature")
            if marker is None:
                continue
            title = (item.module.__doc__ or item.path.stem).splitlines()[0].rstrip(".")
            table = self.tables.setdefault(item.path, Outcomes(title))
            if marker.args[0] not in table.features:
                table.features.append(marker.args[0])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        marker = item.get_closest_marker("feature")
        if marker is None or not hasattr(item, "callspec"):
            return report
        case = item.callspec.params.get("case")
        if case is None:
            return report
        key = (str(case), marker.args[0])
        cells = self.tables[item.path].cells
        if str(case) not in self.models:
            self.models.append(str(case))
        if report.failed:
            self.failed.append(item.nodeid)
        elif report.skipped:
            cells.setdefault(key, []).append(_reason(report))
        elif report.when == "call":
            cells.setdefault(key, [])
            self.passed[(item.path, *key)] += 1
        return report


def _reason(report) -> str:
    if hasattr(report, "wasxfail"):
        return report.wasxfail.removeprefix("reason: ")
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")


def render(found: Collector) -> str:
    """The page."""
    parts = [HEAD]
    for path, table in sorted(found.tables.items()):
        rows = [m for m in found.models if any((m, f) in table.cells for f in table.features)]
        if not rows:
            continue
        reasons: list[str] = []
        lines = [
            f"## {table.title}\n",
            "| model | " + " | ".join(table.features) + " |",
            "|---" * (len(table.features) + 1) + "|",
        ]
        for model in rows:
            cells = []
            for feature in table.features:
                skips = table.cells.get((model, feature), ["not among those that are tried"])
                if found.passed[(path, model, feature)]:
                    skips = []
                for reason in skips:
                    if reason not in reasons:
                        reasons.append(reason)
                numbers = sorted({reasons.index(reason) + 1 for reason in skips})
                cells.append(" ".join(map(str, numbers)) or "+")
            lines.append(f"| {model} | " + " | ".join(cells) + " |")
        lines += ["", *(f"{n}. {reason}" for n, reason in enumerate(reasons, 1))]
        parts.append("\n".join(lines).rstrip() + "\n")
    return "\n".join(parts)


def main(folder: Path = HERE, page: Path = PAGE) -> int:
    """Run the tests of `folder` and write the page; the exit status of pytest."""
    found = Collector()
    status = pytest.main(
        ["-q", "-m", "feature", "-p", "no:cacheprovider", str(folder)], plugins=[found]
    )
    if found.failed or status != 0:
        print(f"{page} is left as it was: {len(found.failed)} tests failed", file=sys.stderr)
        return int(status) or 1
    page.parent.mkdir(exist_ok=True)
    page.write_text(render(found), encoding="utf-8")
    print(f"wrote {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
