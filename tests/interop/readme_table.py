"""The table of formats in docs/formats.md, and what tests say of it: `@pytest.mark.readme("row", column="cell")`."""

from __future__ import annotations

from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "formats.md"
COLUMNS = ("read", "write", "parity", "tolerance")
CLAIMS = pytest.StashKey[dict[tuple[str, str], set[str]]]()  # (row, column) -> what marked tests say it holds
FILES = pytest.StashKey[set[str]]()


def readme_table() -> dict[str, dict[str, str]]:
    """The table of formats: row -> column -> cell."""
    text = PAGE.read_text(encoding="utf-8").partition("| format | read |")[2]
    lines = text.partition("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row: dict(zip(COLUMNS, rest, strict=True)) for row, *rest in cells}
