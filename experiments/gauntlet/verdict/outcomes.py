"""From records to outcomes: how well the cells of the gauntlet ended."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from densitylr import find_stages
from experiments.gauntlet.cells import Condition, condition
from experiments.report.comparison import Gap, gap_closed
from experiments.train.tasks import build

__all__ = [
    "AGAIN",
    "ENOUGH",
    "LEAST_GAP",
    "SETTING",
    "SLACK",
    "WIDE_GAP",
    "Closed",
    "Record",
    "Recovered",
    "closed",
    "closed_by_luck",
    "family",
    "flat_runs",
    "group",
    "label",
    "recovered",
    "what",
]

Record = dict[str, Any]

LEAST_GAP = 0.02
"""Accuracy below which flat and fixed rates count as equal: seeds alone differ by as much."""

ENOUGH = 0.9
"""Share of a gap that is to be closed."""

WIDE_GAP = 0.1
"""Loss of accuracy that stands well above the difference of seeds."""

AGAIN = 5
"""Seeds between a flat run and the one that is taken for a repaired one, see `closed_by_luck`."""

SLACK = 1e-9
"""Accuracies have five decimals; a difference of two of them is on a limit if it is this near."""


@dataclass(frozen=True)
class Closed:
    """How much of the gap between fixed and flat rates an arm, `repair`, closed in one cell.

    Attributes:
        net, optimizer, profile: the cell.
        fixed, repaired, flat: mean test accuracy over the seeds.
        gap: with its interval, over the seeds.
    """

    net: str
    optimizer: str
    profile: str
    fixed: float
    repaired: float
    flat: float
    gap: Gap

    @property
    def there(self) -> bool:
        """Whether there is a gap to close."""
        return self.flat - self.fixed >= LEAST_GAP - SLACK

    @property
    def passed(self) -> bool:
        """90 % of the gap are closed; or nothing was lost, where there is none."""
        if self.there:
            return self.gap.fraction >= ENOUGH - SLACK
        return self.repaired >= self.flat - LEAST_GAP - SLACK

    def __str__(self) -> str:
        interval = ""
        if self.gap.low is not None and self.gap.high is not None:
            interval = f" ({self.gap.low:.0%} to {self.gap.high:.0%})"
        share = f"closed {self.gap.fraction:.0%}{interval}" if self.there else "no gap"
        return (
            f"{self.net} {self.optimizer} {self.profile}: {share}; fixed {self.fixed:.3f}, "
            f"repair {self.repaired:.3f}, flat {self.flat:.3f}, n={self.gap.n}"
        )


def group(
    records: Iterable[Record], *names: str
) -> dict[tuple[Any, ...], dict[tuple[str, int], Record]]:
    """Records by the named fields, and in each group by arm and seed."""
    table: dict[tuple[Any, ...], dict[tuple[str, int], Record]] = defaultdict(dict)
    for record in records:
        table[tuple(record[n] for n in names)][record["arm"], record["seed"]] = record
    return dict(table)


SETTING = ("net", "optimizer", "batch", "steps", "schedule")
"""What a run shares with the flat run that it is compared with."""


def flat_runs(
    records: Iterable[Record],
) -> dict[tuple[Any, ...], dict[tuple[str, int], Record]]:
    """Runs at the good flat rate, by setting, and in each by arm and seed."""
    flat = (r for r in records if r["condition"] == "flat" and _usual(r))
    return group(flat, *SETTING)


def _usual(record: Record) -> bool:
    """Rates stand on the net's good rate itself, not on a multiple of it or on another."""
    return record["start"] == 1 and record["rate"] is None


def closed(records: Sequence[Record], arm: str = "repair") -> list[Closed]:
    """Every starved cell: network, optimizer and profile, over all of its seeds.

    Args:
        records: of any conditions and arms.
        arm: which one is to close the gap.
    """
    return _closed(records, lambda runs, flat, seed: runs.get((arm, seed)))


def closed_by_luck(records: Sequence[Record]) -> list[Closed]:
    """The same with flat runs of other seeds, `AGAIN` further on, in the place of the arm.

    What an arm would reach that is as good as flat rates, and differs from them by its seeds.
    """
    return _closed(records, lambda runs, flat, seed: flat.get(("fixed", seed + AGAIN)))


_Runs = Mapping[tuple[str, int], Record]


def _closed(
    records: Sequence[Record], repaired: Callable[[_Runs, _Runs, int], Record | None]
) -> list[Closed]:
    flats = flat_runs(records)
    cells = []
    starved = (r for r in records if family(r) == "starved" and _usual(r))
    for key, runs in group(starved, *SETTING, "condition").items():
        flat = flats.get(key[:-1], {})
        own: list[list[float]] = []
        for arm, seed in sorted(runs):
            mended = repaired(runs, flat, seed)
            if arm == "fixed" and ("fixed", seed) in flat and mended is not None:
                three = runs["fixed", seed], mended, flat["fixed", seed]
                own.append([record["accuracy"] for record in three])
        if not own:
            continue
        fixed, ours, good = (list(numbers) for numbers in zip(*own, strict=True))
        gap = gap_closed(ours, fixed, good)
        means = [float(np.mean(numbers)) for numbers in (fixed, ours, good)]
        cells.append(Closed(key[0], key[1], key[-1], means[0], means[1], means[2], gap))
    return cells


def family(record: Record) -> str:
    return what(record).family


def what(record: Record) -> Condition:
    """The condition of a record."""
    return _condition(record["net"], record["condition"])


_conditions: dict[tuple[str, str], Condition] = {}


def _condition(net: str, name: str) -> Condition:
    if (net, name) not in _conditions:
        if net not in _stages:
            _stages[net] = list(find_stages(build(net, 0)))
        _conditions[net, name] = condition(name, _stages[net])
    return _conditions[net, name]


_stages: dict[str, list[str]] = {}


@dataclass(frozen=True)
class Recovered:
    """One cell that was made to collapse.

    Attributes:
        net, optimizer, condition: the cell.
        fixed: mean test accuracy without help; None without such runs.
        recovered, never: with ``recover=True``, and where nothing had happened.
        n: seeds.
    """

    net: str
    optimizer: str
    condition: str
    fixed: float | None
    recovered: float
    never: float
    n: int

    @property
    def passed(self) -> bool:
        return self.recovered >= self.never - 0.02 - SLACK

    def __str__(self) -> str:
        alone = "" if self.fixed is None else f", not recovered {self.fixed:.3f}"
        return (
            f"{self.net} {self.optimizer} {self.condition}: recovered {self.recovered:.3f}, "
            f"never collapsed {self.never:.3f}{alone}, n={self.n}"
        )


def recovered(records: Sequence[Record]) -> list[Recovered]:
    """Every cell that was made to collapse and has both ``recover`` and flat runs."""
    flats = flat_runs(records)
    collapsed = (r for r in records if family(r) == "collapse" and _usual(r))
    cells = []
    for key, runs in group(collapsed, *SETTING, "condition").items():
        flat = flats.get(key[:-1], {})
        seeds = sorted(s for a, s in runs if a == "recover" and ("fixed", s) in flat)
        if not seeds:
            continue
        alone = [runs["fixed", s]["accuracy"] for s in seeds if ("fixed", s) in runs]
        mended, never = (
            float(np.mean([t[a, s]["accuracy"] for s in seeds]))
            for t, a in ((runs, "recover"), (flat, "fixed"))
        )
        without = float(np.mean(alone)) if alone else None
        cells.append(Recovered(key[0], key[1], key[-1], without, mended, never, len(seeds)))
    return cells


def label(record: Record) -> str:
    """A run in a few words."""
    text = f"{record['net']} {record['optimizer']} {record['condition']}"
    if record["batch"] != 32:
        text += f" batch {record['batch']}"
    return f"{text} seed {record['seed']}"
