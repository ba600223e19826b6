"""The page of models and features is complete."""

import re

from cases import CASES
from table import PAGE


def _tables():
    for part in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
        rows = [line for line in part.splitlines() if line.startswith("|")]
        yield (
            [[cell.strip() for cell in row.strip("|").split("|")] for row in rows],
            re.findall(r"^(\d+)\. .+", part, re.MULTILINE),
        )


def test_every_model_has_its_row_in_the_first_table():
    rows, _ = next(_tables())
    assert [row[0] for row in rows[2:]] == [str(case) for case in CASES]


def test_no_cell_is_empty_or_unexplained():
    for rows, reasons in _tables():
        for row in rows[2:]:
            assert len(row) == len(rows[0])
            for cell in row[1:]:
                assert cell == "+" or set(cell.split()) <= set(reasons), row
                assert cell
