"""Every cell of the compatibility matrix, and the table that shows them."""

from __future__ import annotations

import pytest

from tests.matrix.cells import Cell, UnavailableError, try_cell
from tests.matrix.sections import SECTIONS, cells_of
from tests.matrix.table import fill, markdown

CELLS = [cell for section in SECTIONS for cell in cells_of(section)]


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_cell(cell: Cell) -> None:
    try:
        cell.run()
    except UnavailableError as why:
        pytest.skip(str(why))


def test_a_table_shows_every_outcome_with_its_reason_and_every_gap() -> None:
    def unavailable() -> None:
        raise UnavailableError("no GPU here")

    cells = [
        Cell("a", "one", "x", lambda: None),
        Cell("a", "one", "y", lambda: "wants one rate"),
        Cell("a", "two", "x", unavailable),
        Cell("b", "one", "x", lambda: 1 // 0),
    ]
    text = markdown({cell: try_cell(cell) for cell in cells})
    assert "| one | ✓ | refused (1) |\n| two | n/a (2) | missing |" in text
    assert "1. wants one rate\n2. no GPU here" in text
    assert "1. ZeroDivisionError: " in text


def test_the_table_takes_the_place_of_the_old_one() -> None:
    document = "before\n<!-- matrix -->\nold\n<!-- /matrix -->\nafter"
    assert fill(document, r"new \1") == document.replace("old", r"new \1")
    with pytest.raises(ValueError, match="one block named 'matrix'"):
        fill("nothing", "new")
