"""What watching costs: ``python -m experiments.overhead`` times training steps, arms interleaved.

It is a benchmark, not a test: run it on a machine that does nothing else. Results are kept in a
JSON file with a page beside it; ``--show FILE`` prints a kept file's table and times nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from experiments.overhead.arms import CASES
from experiments.overhead.measure import measure
from experiments.overhead.page import render
from experiments.overhead.tables import PRIMARY, disturbed, lines, readme_tables, said, table
from experiments.report.page import fill, save

__all__ = ["main"]

BATCHES = (32, 64, 128, 256, 512)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns 1 if a line fails."""
    parser = argparse.ArgumentParser(prog="python -m experiments.overhead", description=__doc__)
    parser.add_argument("--rounds", type=int, default=40, help="steps of each arm (default 40)")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="models")
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES), help="sizes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="where to keep the results, and a page beside it"
    )
    parser.add_argument(
        "--show", type=Path, nargs="+", metavar="FILE", help="time nothing: print the table of the "
        "first kept file and of one with Composer, and what holds and fails in the others"
    )  # fmt: skip
    parser.add_argument(
        "--write", type=Path, metavar="DOCUMENT", help="with --show: put it into a Markdown "
        "document, too, between <!-- cost --> and <!-- /cost -->, composer and asked"
    )  # fmt: skip
    parser.add_argument("--threads", type=int, help="torch's threads on the CPU (default: its own)")
    options = parser.parse_args(arguments)
    if options.show is not None:
        shown = [json.loads(file.read_text(encoding="utf-8")) for file in options.show]
        tables = readme_tables(shown)
        print(*tables.values(), sep="\n\n")
        if options.write is not None:
            document = options.write.read_text(encoding="utf-8")
            text = fill(document, {name: partial(str, text) for name, text in tables.items()})
            options.write.write_text(text, encoding="utf-8")
        return 0
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if PRIMARY not in options.cases:
        parser.error(f"--cases must name {PRIMARY}, of which the lines speak")
    cases = sorted(options.cases, key=lambda name: name != PRIMARY)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what other packages say on being imported
        result = measure(options.rounds, torch.device(options.device), cases, options.batches)
    target = options.json or Path("outputs") / "overhead" / f"{options.device}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(_rounded(result), indent=1) + "\n", encoding="utf-8")
    save(render(result, disturbed(result["machine"])), target.with_suffix(".html"))
    machine = result["machine"]
    print(table(result), "", sep="\n")
    judged = lines(result)
    print(*map(said, judged), sep="\n")
    loads = " and ".join(f"{v:.2f}" for v in machine["load"])
    print(f"{machine['threads']} threads; load average before and after {loads}")
    if warning := disturbed(machine):
        print(f"warning: {warning}")
    print(f"{target}\n{target.with_suffix('.html')}")
    return int(any(line["holds"] is False for line in judged))


def _rounded(value: Any) -> Any:
    """Five digits are more than a time holds."""
    if isinstance(value, Mapping):
        return {key: _rounded(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(v) for v in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
