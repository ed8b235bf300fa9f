"""HTML pages from templates, and Markdown documents with tables filled in."""

from __future__ import annotations

import base64
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import jinja2

from experiments.report.comparison import signed

__all__ = ["csv_uri", "environment", "fill", "save"]

_DIGITS = {"steps": 0}  # decimals; four for everything else


def environment() -> jinja2.Environment:
    """The templates, with filters that write numbers as every page does."""
    pages = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters.update(
        number=_number, signed=signed, interval=_interval, unit=lambda m: _DIGITS.get(m, 4)
    )
    return pages


def save(page: str, target: Path) -> None:
    """Write a page, in one piece or not at all."""
    with tempfile.NamedTemporaryFile(
        "w",
        dir=target.parent,
        prefix=f".{target.name}.",
        encoding="utf-8",
        errors="replace",  # what a run says of itself may be no text at all
        newline="\n",
        delete=False,
    ) as file:
        try:
            file.write(page)
            file.close()
            os.chmod(file.name, 0o644)
            os.replace(file.name, target)
        except BaseException:
            os.unlink(file.name)
            raise


def csv_uri(text: str) -> str:
    """Comma-separated values as something to download."""
    data = base64.b64encode(text.encode("utf-8", "replace")).decode("ascii")
    return f"data:text/csv;charset=utf-8;base64,{data}"


def fill(text: str, tables: Mapping[str, Callable[[], str]]) -> str:
    """A document with the block of every table computed anew.

    Raises:
        ValueError: it lacks the markers of a table.
    """
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"the document must have one block named {name!r}")
        before, rest = text.split(begin)
        text = f"{before}{begin}{table()}\n{end}{rest.split(end)[1]}"
    return text


def _number(value: float | None, digits: int = 4) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.{digits}f}".replace("-", "−")


def _interval(low: float | None, high: float | None, digits: int = 4) -> str:
    if low is None or high is None:
        return "none"
    return f"{signed(low, digits)} to {signed(high, digits)}"
