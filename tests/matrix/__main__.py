"""``python -m tests.matrix``: try every cell, print one table a section.

``--section NAME`` (may be repeated) tries some sections only, ``--write FILE`` puts the tables
between ``<!-- matrix -->`` and ``<!-- /matrix -->`` of a Markdown file. The exit code is 1 if a
cell failed.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

from tests.matrix.cells import Cell, Outcome, try_cell
from tests.matrix.sections import SECTIONS, cells_of
from tests.matrix.table import fill, markdown


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    parser.add_argument("--section", action="append", choices=SECTIONS, help="try only this one")
    parser.add_argument("--write", type=Path, metavar="FILE", help="a Markdown file to fill")
    options = parser.parse_args(argv)
    found: dict[Cell, Outcome] = {}
    for section in options.section or SECTIONS:
        for cell in cells_of(section):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found[cell] = outcome = try_cell(cell)
            print(f"{outcome.kind:>11} {outcome.seconds:6.1f} s  {cell}", file=sys.stderr)
    text = markdown(found)
    print(text)
    if options.write is not None:
        document = options.write.read_text(encoding="utf-8")
        options.write.write_text(fill(document, text), encoding="utf-8")
    return int(any(outcome.kind == "failed" for outcome in found.values()))


if __name__ == "__main__":
    sys.exit(main())
