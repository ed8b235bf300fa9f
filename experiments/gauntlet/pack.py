"""Pack finished cells for ``results``: ``python -m experiments.gauntlet.pack CELLS.jsonl NAME``.

Sorted, and compressed without a date, so that the same cells are always the same bytes:
``python -m experiments.gauntlet.pack outputs/gauntlet/full/cells.jsonl gauntlet``.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path

from experiments.gauntlet.cells import read

__all__ = ["pack"]

RESULTS = Path(__file__).parent / "results"


def pack(source: Path, target: Path) -> int:
    """Write the cells of ``source``, each once, to ``target``; returns their number.

    Raises:
        ValueError: there is no finished cell in ``source``.
    """
    lines = sorted(json.dumps(record) for record in read(source).values())
    if not lines:
        raise ValueError(f"there is no finished cell in {source}")
    text = "\n".join(lines) + "\n"
    target.write_bytes(gzip.compress(text.encode(), mtime=0))
    return len(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.gauntlet.pack", description=__doc__
    )
    parser.add_argument("source", type=Path, help="cells.jsonl of a suite")
    parser.add_argument("name", help="of the file in experiments/gauntlet/results")
    options = parser.parse_args()
    target = RESULTS / f"{options.name}.jsonl.gz"
    print(f"{pack(options.source, target)} cells in {target}")


if __name__ == "__main__":
    main()
