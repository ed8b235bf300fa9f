"""A gauntlet's results on one page: ``python -m experiments.gauntlet.page FILE.jsonl``."""

from __future__ import annotations

import argparse
import shlex
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

from experiments.gauntlet.cells import read
from experiments.gauntlet.page.page import write_page
from experiments.gauntlet.verdict import Record

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.gauntlet.page",
        description="Judge cells of the gauntlet that were trained before, and write one "
        "self-contained HTML page.",
        epilog="example: python -m experiments.gauntlet.page outputs/gauntlet/cells.jsonl",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="cells, as .jsonl or .jsonl.gz")
    parser.add_argument("--title", default="Gauntlet", help="heading (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="default: report.html beside the cells"
    )
    options = parser.parse_args(arguments)
    output = options.output or options.file.with_name("report.html")
    try:
        records = _read(options.file)
        name = options.file.name if options.file.is_absolute() else options.file.as_posix()
        again = shlex.join(["python", "-m", "experiments.gauntlet.page", name])
        write_page(records, options.title, again, output)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{len(records)} cells read")
    print(output)
    return 0


def _read(path: Path) -> list[Record]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        records = list(read(path).values())
    except (KeyError, TypeError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise ValueError(f"{path} does not hold cells of the gauntlet, one a line") from error
    if not records:
        raise ValueError(f"there is no finished cell in {path}: train some first")
    return records


if __name__ == "__main__":
    sys.exit(main())
