"""Find the good flat rate of each network and optimizer: ``python -m experiments.gauntlet.tune``.

The rate with the smallest mean test loss on seeds 100 and 101, which no report uses, on a grid
of half decades.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from experiments.gauntlet.cells import GOOD_RATES, OPTIMIZERS, Cell, run_cells
from experiments.train.tasks import NETS

GRIDS = {
    "sgd": (-2.5, 0.0),
    "adamw": (-3.5, -1.5),
    "rmsprop": (-4.0, -2.0),
    "lars": (-2.0, 1.5),
    "lamb": (-3.0, -0.5),
}
SEEDS = (100, 101)


def grid(optimizer: str) -> list[float]:
    low, high = GRIDS[optimizer]
    return [float(f"{10 ** (low + k / 2):.2g}") for k in range(round(2 * (high - low)) + 1)]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.gauntlet.tune", description=__doc__
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/gauntlet/tune.jsonl"))
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    tuned = [
        (net, optimizer)
        for net in NETS
        for optimizer in GRIDS
        if net != "resnet18" or optimizer in OPTIMIZERS  # ten times as dear as the others
    ]
    cells = {
        (net, optimizer, rate): [Cell(net, optimizer, seed=s, rate=rate) for s in SEEDS]
        for net, optimizer in tuned
        for rate in grid(optimizer)
    }
    records = run_cells(
        [c for group in cells.values() for c in group], options.output, options.workers
    )
    best: dict[str, dict[str, float]] = {}
    for (net, optimizer, rate), group in cells.items():
        losses = [records[c.key]["test_loss"] for c in group]
        mean = math.inf if None in losses else sum(losses) / len(losses)
        print(f"{net:16} {optimizer:8} {rate:<8g} {mean:.4f}")
        own = best.setdefault(net, {})
        if mean < own.get(f"{optimizer}-loss", math.inf):
            own[optimizer], own[f"{optimizer}-loss"] = rate, mean
    rates: dict[str, dict[str, float]] = {}
    for net, optimizer in tuned:
        rates.setdefault(net, {})[optimizer] = best[net][optimizer]
    GOOD_RATES.write_text(json.dumps(rates, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
