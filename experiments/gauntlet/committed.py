"""The committed records, and what every table that is made of them needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tabulate import tabulate

from experiments.gauntlet.pool import read

__all__ = ["DEVELOPED_ON", "RESULTS", "Record", "cell_of", "markdown", "marked", "records_of"]

RESULTS = Path(__file__).parent / "results"

Record = dict[str, Any]
DEVELOPED_ON = ("mlp_deep", "cnn_bn", "mixer", "gru")
"""Networks on which constants were chosen, with seeds of 100 and above."""


def records_of(name: str) -> list[Record]:
    """The committed records of a suite's file."""
    return list(read(RESULTS / f"{name}.jsonl.gz").values())


def cell_of(record: Record) -> tuple[Any, ...]:
    """What is the same in all arms of one run."""
    return tuple(record[n] for n in ("net", "optimizer", "condition", "seed", "start", "steps"))


def marked(net: str) -> str:
    """A network's name, marked where constants were chosen on it."""
    return net + (" (d)" if net in DEVELOPED_ON else "")


def markdown(rows: list[list[str]], head: list[str]) -> str:
    align = ["left", *["right"] * (len(head) - 1)]
    return tabulate(rows, head, tablefmt="github", colalign=align, disable_numparse=True)
