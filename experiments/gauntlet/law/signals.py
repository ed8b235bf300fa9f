"""Which signal shows, after lift-off, that a rate is too low, in flat runs at six rates.

Each record is one run at a multiple of the tuned rate with the mean of every signal over steps 20
to 60. A signal chooses a rate as a loop would that raises it: the first multiple, from below, at
which it no longer says "too low", by one threshold for all networks and optimizers.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["ALIGNMENT", "Judged", "chosen", "judged", "label", "signals_of"]

Record = Mapping[str, Any]
ALIGNMENT = "pull: descent direction · way from the start"
"""The name of the alignment in the committed records."""
LOW, TUNED = 0.1, 1.0
"""A multiple of the tuned rate that is too low, and that of the tuned rate itself."""


@dataclass(frozen=True)
class Judged:
    """How well a signal chooses.

    Attributes:
        signal: its name.
        threshold: the best on the tuning networks.
        tuning, others: points of accuracy lost against the tuned rate, mean over the cells.
    """

    signal: str
    threshold: float
    tuning: float
    others: float


def signals_of(path: Path) -> list[Record]:
    """The records of a file as it is committed."""
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]


def label(signal: str) -> str:
    """What a signal of the committed records is called in the tables."""
    if signal == ALIGNMENT:
        return "alignment: descent direction · way from the first weights"
    return signal.replace("growth of the RMS", "growth of the output RMS")


def chosen(values: Sequence[float], threshold: float, sign: float) -> int:
    """The first place at which a signal no longer says "too low"; the last if it always does.

    Args:
        values: from the lowest rate to the highest; NaN, of a run that diverged, says enough.
        threshold: beyond it a rate is too low …
        sign: … upwards (1) or downwards (-1).
    """
    for place, value in enumerate(values):
        if not sign * (value - threshold) > 0:
            return place
    return len(values) - 1


def judged(records: Sequence[Record], tuning: Collection[str]) -> list[Judged]:
    """All signals, the best on all networks first.

    Args:
        records: one run a network, optimizer and multiple of the tuned rate.
        tuning: the networks on which the threshold is chosen.
    """
    runs: dict[tuple[str, str], dict[float, Record]] = {}
    for r in records:
        runs.setdefault((r["net"], r["optimizer"]), {})[r["times"]] = r
    times = sorted({r["times"] for r in records})
    accuracy = np.array([[own[t]["accuracy"] for t in times] for own in runs.values()])
    lost = 100 * (accuracy[:, [times.index(TUNED)]] - accuracy)
    inside = np.array([net in tuning for net, _ in runs])
    found = []
    for signal in records[0]["signals"]:
        table = [[own[t]["signals"][signal] for t in times] for own in runs.values()]
        values = np.array(table, dtype=float)  # None is NaN
        falls = values[inside, times.index(LOW)] - values[inside, times.index(TUNED)]
        sign = float(np.sign(np.nanmedian(falls))) or 1.0
        limits = np.unique(np.nanpercentile(values[inside], np.linspace(1, 99, 99)))
        taken = [[chosen(row, limit, sign) for row in values] for limit in limits]
        left = np.take_along_axis(lost[None], np.array(taken)[..., None], 2)[..., 0]
        best = int(np.argmin(left[:, inside].mean(1)))
        means = (float(left[best, some].mean()) for some in (inside, ~inside))
        found.append((float(left[best].mean()), Judged(signal, float(limits[best]), *means)))
    return [judgement for _, judgement in sorted(found, key=lambda item: item[0])]
