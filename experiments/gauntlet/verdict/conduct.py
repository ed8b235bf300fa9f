"""What a run diagnosed and changed: faults named, healthy networks left alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from experiments.gauntlet.cells import NAMED_WITHIN
from experiments.gauntlet.verdict.outcomes import (
    SETTING,
    SLACK,
    Record,
    family,
    flat_runs,
    group,
    label,
    what,
)

__all__ = ["ILL_LOSS", "Named", "Quiet", "named", "quiet"]

ILL_LOSS = 0.05
"""Loss of accuracy against the flat rate above which a hot rate counts as an illness."""


@dataclass(frozen=True)
class Named:
    """Whether an ill run's illness was named in time.

    Attributes:
        record: the run.
        ill: it is really ill; a hot rate under which training ends well is none.
        missing: ill stages without a name that fits, 40 steps after the onset.
        wrong: findings that do not fit, as (stage, kind).
    """

    record: Record
    ill: bool
    missing: tuple[str, ...]
    wrong: tuple[tuple[str, str], ...]

    @property
    def rightly(self) -> bool:
        """Every ill stage; where all are hot or collapse, the worst ones stand for all."""
        some = len(self.missing) < len(what(self.record).ill)
        return some if self.family in ("hot", "collapse") else not self.missing

    @property
    def family(self) -> str:
        return family(self.record)


def named(records: Sequence[Record]) -> list[Named]:
    """Every `repair` run of an ill condition, with what was missed and what was wrong.

    A run that ended before it was asked says nothing about names and is left out.
    """
    flats = flat_runs(records)
    found = []
    fixed = group(records, *SETTING, "condition", "start", "rate")
    for key, runs in fixed.items():
        for (arm, seed), record in runs.items():
            it = what(record)
            if arm != "repair" or not it.ill or record["steps"] <= it.onset + NAMED_WITHIN:
                continue
            flat = flats.get(key[: len(SETTING)], {})
            good = [r["accuracy"] for (a, _), r in flat.items() if a == "fixed"]
            ill = True
            if it.family in ("hot", "collapse"):
                alone = runs.get(("fixed", seed), record)["accuracy"]
                ill = bool(good) and alone < float(np.mean(good)) - ILL_LOSS - SLACK
            names = [(s, k) for s, k, _ in record["named"]]
            missing = tuple(
                s for s in it.ill if not any(n == s and k in it.kinds for n, k in names)
            )
            fits = (
                set(it.ill) if it.family != "starved" else {s for s, f in it.rates.items() if f < 1}
            )
            wrong = tuple((s, k) for s, k in names if s not in fits or k not in it.kinds)
            found.append(Named(record, ill, missing, wrong))
    return found


@dataclass(frozen=True)
class Quiet:
    """Whether a run that needs no help was left alone.

    Attributes:
        record: the run.
        paired: whether there is a fixed run of the same seed to compare with.
        changed: its weights are not those of the fixed run.
    """

    record: Record
    paired: bool
    changed: bool

    @property
    def acted(self) -> bool:
        return bool(self.record["raised"]) or any(v != 1 for v in self.record["scales"].values())

    @property
    def alarmed(self) -> bool:
        return bool(self.record["named_at_end"])

    @property
    def silent(self) -> bool:
        return not (self.changed or self.acted or self.alarmed)

    def __str__(self) -> str:
        says = ", ".join(f"{s} {k}" for s, k, _ in self.record["named_at_end"])
        moved = [s for s, v in self.record["scales"].items() if v != 1]
        parts = [
            f"raised {', '.join(self.record['raised'])}" if self.record["raised"] else "",
            f"scaled {', '.join(moved)}" if moved and not self.record["raised"] else "",
            "other weights than without" if self.changed else "",
            says or "says nothing",
        ]
        return f"{label(self.record)}: {'; '.join(p for p in parts if p)}"


def quiet(records: Sequence[Record]) -> list[Quiet]:
    """Every `repair` run of a healthy or pretrained network."""
    names = (*SETTING, "condition", "start", "rate")
    runs = group((r for r in records if family(r) in ("healthy", "pretrained")), *names)
    found = []
    for cell in runs.values():
        for (arm, seed), record in cell.items():
            if arm == "repair":
                other = cell.get(("fixed", seed))
                changed = other is not None and other["weights"] != record["weights"]
                found.append(Quiet(record, other is not None, changed))
    return found
