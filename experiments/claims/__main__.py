"""Check what the README claims against finished runs: ``python -m experiments.claims FOLDER``.

The folder is what ``make claims`` trains: ``repair``, ``free`` and ``warmup`` below it. Each
claim is printed with its numbers and ``holds``, ``fails`` or ``no runs``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from experiments.claims.check import claims

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.claims", description=__doc__)
    parser.add_argument("folder", type=Path, help="where make claims left its runs")
    folder = parser.parse_args(arguments).folder
    if not folder.is_dir():
        print(f"error: {folder} is not a folder; make claims trains the runs", file=sys.stderr)
        return 2
    checked = list(claims(folder))
    print(*checked, sep="\n")
    print(f"{sum(c.holds is True for c in checked)} of {len(checked)} claims hold")
    return 0 if all(c.holds for c in checked) else 1


if __name__ == "__main__":
    sys.exit(main())
