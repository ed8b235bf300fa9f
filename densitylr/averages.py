"""From the rows of a probe to one `StageReading` a stage: means over its taps, on the host."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from densitylr.density import summarise
from densitylr.probe import DORMANT, PEAK, SUMS, VARIETY, Probe
from densitylr.records import StageReading
from densitylr.stages import Stage
from densitylr.taps import Tap

__all__ = ["Numbers", "combine", "numbers"]

_SHARES = ("near_zero", "near_zero_absolute", "near_zero_present", "exactly_zero")
_AVERAGED = (*_SHARES, "mean", "std", "rms", "rms0")
_NUMBERS = (*_AVERAGED, "untrained", "displacement", "dormant", "variety", "peak")


@dataclass(frozen=True)
class Numbers:
    """The numbers of all taps that were read at a probe, ``[taps]`` unless said."""

    taps: list[Tap]
    live: np.ndarray  # whether it holds a finite element
    means: np.ndarray  # _NUMBERS, [taps, numbers]
    count: np.ndarray
    nonfinite: np.ndarray
    histogram: np.ndarray  # [taps, BINS]


def numbers(
    taps: list[Tap], probes: Mapping[torch.device, Probe], host: Mapping[torch.device, np.ndarray]
) -> Numbers:
    """What the rows of the taps say; new references are left with the taps."""

    def rows(of: list[Tap], twins: bool) -> tuple[np.ndarray, Mapping[str, np.ndarray]]:
        at = [
            (tap.device, probes[tap.device].twin_row[tap.row] if twins else tap.row)
            for tap in of
            if tap.device is not None
        ]
        found = np.array([host[device][row] for device, row in at])
        sizes = np.array([probes[device].sizes[row] for device, row in at])
        return found, summarise(found[:, :SUMS], sizes)

    found, sums = rows(taps, twins=False)
    answered = [tap for tap in taps if tap.answered]
    if answered:
        _, answers = rows(answered, twins=True)
        for i, tap in enumerate(answered):
            tap.reference = (float(answers["count"][i]), float(answers["near_zero"][i]))
    for i, tap in enumerate(taps):
        if sums["count"][i]:
            tap.rms0 = float(sums["rms0"][i])
            tap.reference = tap.reference or (
                float(sums["count"][i]),
                float(sums["near_zero"][i]),
            )
    count0, near0 = np.array([tap.reference or (0.0, 0.0) for tap in taps]).T
    live = (sums["count"] > 0) & (count0 > 0)
    n, n0 = np.maximum(sums["count"], 1), np.maximum(count0, 1)
    # Half a count more keeps the logarithm finite and equal counts at exactly zero.
    now = np.log((sums["near_zero"] + 0.5) / (n + 1))
    means = np.stack(
        [
            *(sums[name] / n for name in _SHARES),
            *(sums[name] for name in _AVERAGED[len(_SHARES) :]),
            near0 / n0,
            np.abs(now - np.log((near0 + 0.5) / (n0 + 1))),
            found[:, DORMANT],
            found[:, VARIETY],
            found[:, PEAK],
        ],
        axis=1,
    )
    return Numbers(taps, live, means, sums["count"], sums["nonfinite"], sums["histogram"])


def combine(stages: Mapping[str, Stage], seen: Numbers) -> dict[str, StageReading]:
    """Means over the taps of each stage that were read and hold a finite element."""
    row_of = {tap.name: i for i, tap in enumerate(seen.taps)}
    readings = {}
    for stage in stages.values():
        own = [row_of[name] for name in stage.taps if name in row_of]
        live = [i for i in own if seen.live[i]]
        unread = [math.nan] * len(_NUMBERS)
        found = seen.means[live].mean(0).tolist() if live else unread
        found = [math.nan if math.isnan(x) else x for x in found]  # one object: readings compare
        estimators = {seen.taps[i].estimator for i in live} or {"first-probe"}
        readings[stage.name] = StageReading(
            **dict(zip(_NUMBERS, found, strict=True)),
            estimator=estimators.pop() if len(estimators) == 1 else "mixed",
            count=int(seen.count[live].sum()),
            nonfinite=int(seen.nonfinite[own].sum()),
            histogram=seen.histogram[own].sum(0),
        )
    return readings
