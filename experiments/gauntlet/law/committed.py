"""The committed records, and what every table that is made of them needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tabulate import tabulate

from experiments.gauntlet.cells import read

__all__ = [
    "DEVELOPED_ON",
    "RESULTS",
    "Record",
    "by_cell",
    "cell_of",
    "markdown",
    "marked",
    "records_of",
]

RESULTS = Path(__file__).parents[1] / "results"

Record = dict[str, Any]
Key = tuple[str, ...]
DEVELOPED_ON = ("mlp_deep", "cnn_bn", "mixer", "gru")
"""Networks on which constants were chosen, with seeds of 100 and above."""


def records_of(name: str) -> list[Record]:
    """The committed records of a suite's file."""
    return list(read(RESULTS / f"{name}.jsonl.gz").values())


def cell_of(record: Record) -> tuple[Any, ...]:
    """What is the same in all arms of one run."""
    return tuple(record[n] for n in ("net", "optimizer", "condition", "seed", "start", "steps"))


def by_cell(
    records: Iterable[Record], what: Callable[[Record], Key | None]
) -> dict[Key, list[dict[str, float]]]:
    """The accuracies of the arms of each run, by ``what`` it is; those of None are left out."""
    runs: dict[Key, dict[tuple[Any, ...], dict[str, float]]] = {}
    for r in records:
        key = what(r)
        if key is not None:
            runs.setdefault(key, {}).setdefault(cell_of(r), {})[r["arm"]] = r["accuracy"]
    return {key: list(own.values()) for key, own in sorted(runs.items())}


def marked(net: str) -> str:
    """A network's name, marked where constants were chosen on it."""
    return net + (" (d)" if net in DEVELOPED_ON else "")


def markdown(rows: list[list[str]], head: list[str]) -> str:
    align = ["left", *["right"] * (len(head) - 1)]
    return tabulate(rows, head, tablefmt="github", colalign=align, disable_numparse=True)
