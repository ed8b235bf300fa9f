"""From the rows of a probe to one `StageReading` a stage: means over its taps, on the host."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from densitylr.density import BINS, ESTIMATORS, TABLE, summarise
from densitylr.probe import DORMANT, PEAK, SUMS, UNKEPT, VARIETY, Probe
from densitylr.records import StageReading
from densitylr.stages import Stage
from densitylr.taps import Tap

__all__ = ["combine", "tabulate"]

_SHARES = ("near_zero", "near_zero_absolute", "near_zero_present", "exactly_zero")
_MEANS = ("mean", "std", "rms", "rms0", "dormant", "variety", "peak")
_NUMBERS = (*_SHARES, *_MEANS, "untrained", "displacement")
_PEAK = _NUMBERS.index("peak")


def tabulate(
    taps: Sequence[Tap],
    probes: Mapping[torch.device, Probe],
    host: Mapping[torch.device, np.ndarray],
) -> np.ndarray:
    """The numbers of each tap; what a tap is compared with is left with it.

    Args:
        taps: all taps, by row.
        probes: the probes by device.
        host: of the devices that were read, the rows of their probe, float64.

    Returns:
        float64 ``[taps, len(TABLE) + BINS]``: `densitylr.density.TABLE` and the histogram; zeros
        and no peak where a tap was not read.
    """
    table = np.zeros((len(taps), len(TABLE) + BINS))
    table[:, TABLE.index("peak")] = UNKEPT
    for device, rows in host.items():
        probe = probes[device]
        sizes = np.array(probe.sizes)
        own = [tap for tap in taps if tap.device == device]
        at = np.array([tap.row for tap in own])
        found = dict(summarise(rows[at, :SUMS], sizes[at]))
        answered = [tap for tap in own if tap.answered]
        told: dict[int, tuple[float, float]] = {}  # by the twins: an answer may be all NaN
        if answered:
            twins = [probe.twin_row[tap.row] for tap in answered]
            answers = summarise(rows[twins, :SUMS], sizes[twins])
            for i, tap in enumerate(answered):
                told[tap.row] = (float(answers["count"][i]), float(answers["near_zero"][i]))
                if told[tap.row][0]:
                    tap.reference = told[tap.row]
        numbers = (found[name].tolist() for name in ("count", "near_zero", "rms0"))
        for tap, count, near_zero, rms0 in zip(own, *numbers, strict=True):
            if count:
                tap.rms0 = rms0
                tap.reference = tap.reference or (float(count), float(near_zero))
        references = np.array([told.get(tap.row, tap.reference) or (0.0, 0.0) for tap in own])
        found["reference_count"], found["reference_near_zero"] = references.T
        for name, column in (("dormant", DORMANT), ("variety", VARIETY), ("peak", PEAK)):
            found[name] = rows[at, column]
        found["estimator"] = np.array([ESTIMATORS.index(tap.estimator) for tap in own])
        columns = np.stack([found[name] for name in TABLE], 1)
        table[at] = np.concatenate((columns, found["histogram"]), 1)
    return table


def combine(stages: Mapping[str, Stage], table: np.ndarray) -> dict[str, StageReading]:
    """Means over the taps of each stage that were read and hold a finite element.

    Args:
        stages: the stages by name, each with a tap at least.
        table: from `tabulate`, the taps in the order of the stages.
    """
    column = {name: table[:, i] for i, name in enumerate(TABLE)}
    count, near = column["count"], column["near_zero"]
    count0, near0 = column["reference_count"], column["reference_near_zero"]
    live = (count > 0) & (count0 > 0)
    n, n0 = np.maximum(count, 1), np.maximum(count0, 1)
    # Half a count more keeps the logarithm finite and equal shares at exactly zero: half a count
    # of the smaller sample, or no outputs near zero would be fewer of more outputs.
    m = np.minimum(n, n0)
    log = [np.log((k * m / size + 0.5) / (m + 1)) for k, size in ((near, n), (near0, n0))]
    displacement = np.abs(log[0] - log[1])
    shares = [column[name] / n for name in _SHARES]
    means = np.stack([*shares, *(column[name] for name in _MEANS), near0 / n0, displacement], 1)
    nonfinite, estimator = column["nonfinite"], column["estimator"].astype(int)
    histogram = table[:, len(TABLE) :].astype(np.int64)
    # The rows of a stage follow one another.
    first = np.cumsum([0, *(len(stage.taps) for stage in stages.values())])
    begin = first[:-1]
    peak = column["peak"]
    kept = peak != UNKEPT
    means[:, _PEAK] = np.where(kept, np.where(np.isnan(peak), np.inf, peak), 0)
    sums = np.add.reduceat(np.where(live[:, None], means, 0), begin)
    alive = np.add.reduceat(live.astype(int), begin)
    counts = np.add.reduceat(np.where(live, count, 0), begin).astype(int).tolist()
    unusable = np.add.reduceat(nonfinite, begin).astype(int).tolist()
    histograms = np.add.reduceat(histogram, begin)
    best = np.maximum.reduceat(np.where(live, estimator, 0), begin).tolist()
    worst = np.minimum.reduceat(np.where(live, estimator, len(ESTIMATORS)), begin).tolist()
    read = np.repeat(alive[:, None], means.shape[1], axis=1)
    read[:, _PEAK] = np.add.reduceat(live & kept, begin)
    found = np.full_like(sums, np.nan)
    np.divide(sums, read, out=found, where=read > 0)
    readings = {}
    for i, (name, numbers) in enumerate(zip(stages, found.tolist(), strict=True)):
        told = ESTIMATORS[best[i]] if best[i] == worst[i] else "mixed"
        readings[name] = StageReading(
            # One NaN for all: readings compare.
            **{key: math.nan if x != x else x for key, x in zip(_NUMBERS, numbers, strict=True)},
            estimator=told if alive[i] else "first-probe",
            count=counts[i],
            nonfinite=unusable[i],
            histogram=histograms[i],
        )
    return readings
