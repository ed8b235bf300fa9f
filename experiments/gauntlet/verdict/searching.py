"""How near a search for the rate comes to the tuned flat rate, and to its rivals."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.train.arms import RIVALS

__all__ = ["FORMER", "Rule", "Search", "compare_rules", "mean_ranks", "searches"]

Record = dict[str, Any]

RANKED_WITH = "adamw"
"""Most rivals are of Adam's kind, so `free` is ranked among them with AdamW inside."""

FORMER = "each by itself"
"""The rule of `free` that every other one is compared with."""


@dataclass(frozen=True)
class Search:
    """`free` on one network, optimizer and starting rate.

    Attributes:
        net, optimizer, start: the cell; ``start`` is a factor on the tuned rate, before the 1e-4
            at which `free` begins.
        accuracies: of the seeds, in the order of `flat`.
        flat: of the tuned flat rate, for the same seeds.
    """

    net: str
    optimizer: str
    start: float
    accuracies: tuple[float, ...]
    flat: tuple[float, ...]

    @property
    def lost(self) -> float:
        """Mean accuracy of the flat rate less that of the search."""
        return float(np.mean(self.flat) - np.mean(self.accuracies))

    def __str__(self) -> str:
        return (
            f"{self.net} {self.optimizer} from {self.start:g}: free "
            f"{np.mean(self.accuracies):.3f}, flat {np.mean(self.flat):.3f}, n={len(self.flat)}"
        )


@dataclass(frozen=True)
class Rule:
    """A rule of search against the flat rate.

    Attributes:
        cells: runs with a flat run of the same seed, and one of the `FORMER` rule.
        lost: mean accuracy of the flat rate less that of the rule.
        reference: the same for the former rule, in the same cells.
        worst: the largest loss of one run.
    """

    cells: int
    lost: float
    reference: float
    worst: float


def compare_rules(records: Sequence[Record]) -> dict[str, Rule]:
    """Every arm but ``fixed``, run by run, in the order of the mean loss against `FORMER`'s."""
    lost: dict[str, dict[tuple[Any, ...], float]] = defaultdict(dict)
    flat = {
        (r["net"], r["optimizer"], r["seed"]): r["accuracy"]
        for r in records
        if r["arm"] == "fixed" and r["start"] == 1
    }
    for r in records:
        cell = (r["net"], r["optimizer"], r["seed"])
        if r["arm"] != "fixed" and cell in flat:
            lost[r["arm"]][*cell, r["start"]] = flat[cell] - r["accuracy"]
    found = {}
    for arm, own in lost.items():
        shared = sorted(own.keys() & lost[FORMER].keys())
        if shared:
            mean, other = (float(np.mean([x[c] for c in shared])) for x in (own, lost[FORMER]))
            found[arm] = Rule(len(shared), mean, other, max(own[c] for c in shared))
    return dict(sorted(found.items(), key=lambda item: item[1].lost - item[1].reference))


def _length(records: Sequence[Record]) -> int:
    """The number of steps of the search runs: flat runs of other suites have other lengths."""
    return max((r["steps"] for r in records if r["arm"] == "free"), default=0)


def searches(records: Sequence[Record]) -> list[Search]:
    """Every cell with `free` at a healthy condition and flat runs of the same length."""
    steps = _length(records)
    table: dict[tuple[str, str, str, float], dict[int, float]] = defaultdict(dict)
    for r in records:
        if r["condition"] == "flat" and r["steps"] == steps and r["batch"] == 32:
            table[r["arm"], r["net"], r["optimizer"], r["start"]][r["seed"]] = r["accuracy"]
    found = []
    for (arm, net, optimizer, start), runs in sorted(table.items()):
        flat = table.get(("fixed", net, optimizer, 1.0), {})
        seeds = sorted(runs.keys() & flat.keys())
        if arm == "free" and seeds:
            own, good = ([t[s] for s in seeds] for t in (runs, flat))
            found.append(Search(net, optimizer, start, tuple(own), tuple(good)))
    return found


def mean_ranks(records: Sequence[Record], inside: str = RANKED_WITH) -> dict[str, float]:
    """Mean rank over the networks, 1 the best, of `free` (all starts together) and each rival.

    Networks on which one of them was not run are left out; empty if none is left.

    Args:
        records: of any conditions and arms.
        inside: the optimizer that `free` is around.
    """
    steps = _length(records)
    scores: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for r in records:
        ours = r["arm"] == "free" and r["optimizer"] == inside
        if r["steps"] == steps and r["condition"] == "flat" and (ours or r["arm"] in RIVALS):
            scores[r["net"]][r["arm"]].append(r["accuracy"])
    arms = sorted({arm for own in scores.values() for arm in own})
    ranks: dict[str, list[float]] = {arm: [] for arm in arms}
    for own in scores.values():
        if len(own) < len(arms) or len(arms) < 2:
            continue
        means = {arm: float(np.mean(own[arm])) for arm in arms}
        for arm in arms:
            better = sum(m > means[arm] for m in means.values())
            equal = sum(m == means[arm] for m in means.values())
            ranks[arm].append(better + (equal + 1) / 2)
    return {arm: float(np.mean(r)) for arm, r in ranks.items() if r}
