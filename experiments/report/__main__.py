"""Sweep results on one page: ``python -m experiments.report FOLDER``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.report.report import write_report

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.report",
        description="Compare controlled with fixed learning rates, seed by seed, and write one "
        "self-contained HTML page. Every run below the folders is accounted for: finished, "
        "diverged, failed, killed or damaged.",
        epilog="example: python -m experiments.report multirun/first outputs/extra --output r.html",
    )
    parser.add_argument(
        "folders",
        nargs="+",
        metavar="FOLDER",
        help="run folder, or a folder with runs at any depth",
    )
    parser.add_argument(
        "--output", metavar="FILE", help="where to write (default: report.html in the first FOLDER)"
    )
    options = parser.parse_args(arguments)
    output = Path(options.output) if options.output else Path(options.folders[0]) / "report.html"
    try:
        count = write_report(options.folders, output)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{count} runs read")
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
