"""A gauntlet's results on one page.

The page is one HTML file that asks the network for nothing. The same records give the same bytes,
in whatever order they were trained.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.gauntlet.cells import Cell
from experiments.gauntlet.page import sections
from experiments.gauntlet.verdict import Record, judge
from experiments.report.page import csv_uri, environment, save

__all__ = ["command_line", "render", "write_page"]

LARGEST_CSV = 1_500_000
"""Bytes of raw records above which the page carries a summary of them instead."""

LARGEST_TABLE = 500
"""Records above which the table, not the download, is a summary."""

SHOWN_FAILURES = 100
_FIELDS = tuple(f.name for f in dataclasses.fields(Cell))
_OUTCOMES = ("accuracy", "test_loss", "train_loss", "weights", "seconds", "named", "named_at_end")
_SUMMARY = (
    *(name for name in _FIELDS if name != "seed"),
    "runs",
    "accuracy",
    "least",
    "most",
    "test_loss",
    "diverged",
)


def render(
    records: Sequence[Record], title: str, command: str, cells: Sequence[Cell] | None = None
) -> str:
    """The page as HTML.

    Args:
        records: of finished cells, in any order; of a cell that is there twice, the last counts.
        title: heading.
        command: what makes the page again.
        cells: what was planned; None: unknown.

    Raises:
        ValueError: there are no records.
    """
    if not records:
        raise ValueError("there are no records to report on: train some cells first")
    own = {_cell(record): record for record in records}
    records = sections.in_order(own.values())
    raw = _csv(records, _columns(records))
    whole = len(raw.encode()) <= LARGEST_CSV
    rows = sections.summary(records)
    pages = environment()
    pages.filters["percent"] = _percent
    judgements = list(judge(records))
    return pages.get_template("gauntlet.html.jinja").render(
        title=title,
        records=records,
        judgements=judgements,
        states={True: "holds", False: "fails", None: "no runs"},
        verdict=_verdict([j.holds for j in judgements]),
        shown=SHOWN_FAILURES,
        tally=sections.tally(records),
        diverged=sum(r["test_loss"] is None for r in records),
        missing=None if cells is None else [c for c in dict.fromkeys(cells) if c not in own],
        planned=None if cells is None else len(set(cells)),
        starved=sections.starved(records),
        naming=sections.naming(records),
        healthy=sections.healthy(records),
        search=sections.search(records),
        recovery=sections.recovery(records),
        ablated=sections.ablated(records),
        summary=rows,
        every=whole and len(records) <= LARGEST_TABLE,
        whole=whole,
        csv=csv_uri(raw if whole else _csv(rows, _SUMMARY)),
        command=command,
    )


def write_page(
    records: Sequence[Record],
    title: str,
    command: str,
    target: Path,
    cells: Sequence[Cell] | None = None,
) -> None:
    """Write the page, in one piece or not at all; arguments as in `render`.

    Raises:
        ValueError: there are no records.
        OSError: the page cannot be written.
    """
    save(render(records, title, command, cells), target)


def command_line(arguments: Sequence[str]) -> str:
    """The command line that trained the cells, without where and how fast."""
    # An absolute path says more about a desk than a report should.
    kept = [a for a in arguments if not a.startswith(("output=", "workers="))]
    return shlex.join(["python", "-m", "experiments.gauntlet", *kept])


def _cell(record: Record) -> Cell:
    return Cell(**{name: record[name] for name in _FIELDS})


def _verdict(answers: Sequence[bool | None]) -> str:
    """How many demands are met, in a sentence."""
    asked = sum(a is not None for a in answers)
    if not asked:
        return "None of the demands can be judged on these records."
    held = sum(a is True for a in answers)
    sentence = f"{held} of the {asked} demands that these records can answer are met."
    if held == asked == 1:
        sentence = "The one demand that these records can answer is met."
    elif held == asked:
        sentence = f"All {asked} demands that these records can answer are met."
    unasked = len(answers) - asked
    return sentence + (f" For {unasked} there are no runs." if unasked else "")


def _percent(value: float | None, digits: int = 0) -> str:
    if value is None:
        return "–"
    text = f"{100 * value:.{digits}f}"
    return ("0" if float(text) == 0 else text).replace("-", "−") + " %"


def _columns(records: Sequence[Record]) -> list[str]:
    """Cell, outcome, and whatever else a record holds."""
    known = [*_FIELDS, *_OUTCOMES]
    return [*known, *sorted({name for record in records for name in record} - set(known))]


def _csv(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(columns)
    for row in rows:
        table.writerow([_plain(row.get(name)) for name in columns])
    return text.getvalue()


def _plain(value: Any) -> Any:
    return json.dumps(value, separators=(",", ":")) if isinstance(value, list | dict) else value
