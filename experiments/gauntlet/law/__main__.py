"""The tables and the figure of ``docs/law.md``: ``python -m experiments.gauntlet.law --write``.

The README's list of demands is written, too. Without ``--write`` the tables are printed.
Everything is computed from the committed records.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.gauntlet.cells import ABLATIONS
from experiments.gauntlet.law.committed import records_of
from experiments.gauntlet.law.figure import trade_off
from experiments.gauntlet.law.tables import README_TABLES, TABLES, compare
from experiments.report.page import fill

__all__ = ["main"]

ROOT = Path(__file__).parents[3]
DOCUMENT = ROOT / "docs" / "law.md"
FIGURE = ROOT / "docs" / "law_trade_off.png"
README = ROOT / "README.md"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.gauntlet.law", description=__doc__)
    parser.add_argument(
        "--write", action="store_true", help="write docs/law.md, its figure and the README"
    )
    if not parser.parse_args().write:
        for name, table in TABLES.items():
            print(f"{name}\n{table()}\n")
        return
    for path, tables in ((DOCUMENT, TABLES), (README, README_TABLES)):
        path.write_text(fill(path.read_text(encoding="utf-8"), tables), encoding="utf-8")
    points = {
        "constants of repair": compare(
            records_of("sensitivity"), lambda arm: arm.startswith("repair")
        ),
        "other measurements": compare(records_of("ablations"), lambda arm: arm in ABLATIONS),
    }
    FIGURE.write_bytes(trade_off(points))


if __name__ == "__main__":
    main()
