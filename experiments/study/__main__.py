"""The study: declared in ``conf/experiment``, run in parts, packed small, and recomputed.

    python -m experiments.study story rate profile fresh    # train what is not trained yet
    python -m experiments.study --pack                      # into experiments/study/results
    python -m experiments.study --write                     # docs/study.md, its figures, README.md
    python -m experiments.study --check                     # is every number in them the runs'?

A part is one or more sweeps of ``experiments.train``; each can be killed and given again. Words
with ``=`` are overrides for all of its sweeps, ``launch=cores`` among them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

from experiments.report.page import fill
from experiments.study.packing import pack
from experiments.study.parts import PARTS, commands
from experiments.study.tables import FIGURES, README_TABLES, TABLES
from experiments.train.runs import find_runs

__all__ = ["main"]

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).with_name("results")
OUTPUTS = Path("outputs") / "study"
DOCUMENT = ROOT / "docs" / "study.md"
README = ROOT / "README.md"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("words", nargs="*", metavar="PART|KEY=VALUE", help=", ".join(PARTS))
    parser.add_argument("--pack", action="store_true", help="collect the finished runs")
    parser.add_argument(
        "--write", action="store_true", help="refill docs/study.md and README.md, draw figures"
    )
    parser.add_argument("--check", action="store_true", help="recompute every number in them")
    parser.add_argument("--outputs", type=Path, default=OUTPUTS, help="where the runs are")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where packed ones are")
    options = parser.parse_args(arguments)
    parts = [word for word in options.words if "=" not in word]
    overrides = [word for word in options.words if "=" in word]
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"a part is one of {', '.join(PARTS)}, got {unknown[0]!r}")
    failed = 0
    for part in parts:
        for command in commands(part, [*overrides, f"output={options.outputs / part}"]):
            print(" ".join(["python", *command[1:]]), flush=True)
            failed += subprocess.run(command, cwd=ROOT).returncode != 0
    if failed:
        print(f"{failed} sweeps failed: their runs have a traceback.txt", file=sys.stderr)
        return 1
    if options.pack:
        for part in PARTS:
            folder = options.outputs / part
            if folder.is_dir() and (runs := find_runs([folder])):
                print(f"{part}: {pack(runs, options.results / part, part == 'story')}")
            else:
                print(f"{part}: not run, what was packed before stays")
    if options.write or options.check:
        return _documents(options.results, write=options.write)
    return 0


def _documents(results: Path, write: bool) -> int:
    stale = 0
    for document, blocks in ((DOCUMENT, TABLES), (README, README_TABLES)):
        before = document.read_text(encoding="utf-8")
        tables = {name: (lambda table=table: table(results)) for name, table in blocks.items()}
        after = fill(before, tables)
        name = document.relative_to(ROOT)
        if write:
            document.write_text(after, encoding="utf-8")
            print(f"{name} written")
        elif before != after:
            stale += 1
            lines = zip_longest(before.splitlines(), after.splitlines(), fillvalue="(nothing)")
            old, new = next((old, new) for old, new in lines if old != new)
            print(f"{name} says\n  {old}\nthe runs say\n  {new}", file=sys.stderr)
        else:
            print(f"every number of the study in {name} is the runs'")
    for file, figure in FIGURES.items() if write else ():
        if (drawn := figure(results)) is not None:
            (DOCUMENT.parent / file).write_bytes(drawn)
    return int(stale > 0)


if __name__ == "__main__":
    sys.exit(main())
