"""The tables of the matrix, in Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping

from tests.matrix.cells import Cell, Outcome

__all__ = ["fill", "markdown"]

SIGNS = {"passed": "✓", "refused": "refused", "unavailable": "n/a", "failed": "FAILED"}


def markdown(found: Mapping[Cell, Outcome]) -> str:
    """One table a section, rows and columns in the order of the cells, reasons below it.

    A place in the table that no cell stands for is shown as missing, never left empty.
    """
    parts = []
    for section in dict.fromkeys(cell.section for cell in found):
        own = {(c.row, c.column): o for c, o in found.items() if c.section == section}
        columns = list(dict.fromkeys(column for _, column in own))
        reasons: dict[str, int] = {}
        lines = [f"| {section} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for row in dict.fromkeys(row for row, _ in own):
            entries = []
            for column in columns:
                outcome = own.get((row, column))
                entry = "missing" if outcome is None else SIGNS[outcome.kind]
                if outcome is not None and outcome.reason:
                    entry += f" ({reasons.setdefault(outcome.reason, len(reasons) + 1)})"
                entries.append(entry)
            lines.append(f"| {row} | " + " | ".join(entries) + " |")
        notes = [f"{number}. {reason}" for reason, number in reasons.items()]
        parts.append("\n".join([*lines, "", *notes]).rstrip())
    return "\n\n".join(parts)


def fill(document: str, text: str) -> str:
    """``document`` with ``text`` in its one block named matrix.

    Raises:
        ValueError: there is no such block, or more than one.
    """
    pattern = r"(<!-- matrix -->\n).*?(<!-- /matrix -->)"
    if len(re.findall(pattern, document, re.DOTALL)) != 1:
        raise ValueError("the document must have one block named 'matrix'")
    return re.sub(pattern, lambda m: f"{m[1]}{text}\n{m[2]}", document, flags=re.DOTALL)
