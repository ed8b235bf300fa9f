"""From the rows of a probe to one `StageReading` a stage: means over its taps, on the host."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from densitylr.density import BINS, ESTIMATORS, TABLE, summarise
from densitylr.probe import DORMANT_AT, PEAK_AT, SUMS, UNKEPT, VARIETY_AT, Probe
from densitylr.records import StageReading
from densitylr.stages import Stage
from densitylr.taps import Tap

__all__ = ["combine", "tabulate"]

_SHARES = ("near_zero", "near_zero_absolute", "near_zero_present", "exactly_zero")
_MEANS = ("mean", "std", "rms", "rms0", "dormant", "variety", "peak")
_NUMBERS = (*_SHARES, *_MEANS, "untrained", "displacement")
_COUNTS = ("count", "near_zero", "reference_count", "reference_near_zero")
_COMPARED = ("reference_count", "reference_near_zero", "estimator")
_AT = {name: i for i, name in enumerate(TABLE)}


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
    table[:, _AT["peak"]] = UNKEPT
    for device, rows in host.items():
        probe = probes[device]
        # Of the taps, and behind them of the answers of the twins.
        found = dict(summarise(rows[:, :SUMS], np.array(probe.sizes)))
        count, near_zero, rms0 = (found[k].tolist() for k in ("count", "near_zero", "rms0"))
        own = [tap for tap in taps if tap.device == device]
        compared = [(0.0, 0.0, 0)] * len(rows)
        for tap in own:
            i, reference = tap.row, tap.reference
            if tap.answered:
                twin = probe.twin_row[i]
                reference = count[twin], near_zero[twin]  # it may be all NaN
                if count[twin]:
                    tap.reference = reference
            if count[i]:
                tap.rms0 = rms0[i]
                tap.reference = tap.reference or (count[i], near_zero[i])
            reference = reference or tap.reference or (0.0, 0.0)
            compared[i] = *reference, ESTIMATORS.index(tap.estimator)
        for name, column in zip(_COMPARED, np.array(compared).T, strict=True):
            found[name] = column
        for name, column in (("dormant", DORMANT_AT), ("variety", VARIETY_AT), ("peak", PEAK_AT)):
            found[name] = rows[:, column]
        columns = np.stack([found[name] for name in TABLE], 1)
        at = [tap.row for tap in own]
        table[at] = np.concatenate((columns, found["histogram"]), 1)[at]
    return table


def combine(stages: Mapping[str, Stage], table: np.ndarray) -> dict[str, StageReading]:
    """Means over the taps of each stage that were read and hold a finite element.

    Args:
        stages: the stages by name, each with a tap at least.
        table: from `tabulate`, the taps in the order of the stages.
    """
    count, near, count0, near0 = (table[:, _AT[name]] for name in _COUNTS)
    n, n0 = np.maximum(count, 1), np.maximum(count0, 1)
    # Half a count more keeps the logarithm finite and equal shares at exactly zero: half a count
    # of the smaller sample, or no outputs near zero would be fewer of more outputs.
    m = np.minimum(n, n0)
    log = [np.log((k * m / size + 0.5) / (m + 1)) for k, size in ((near, n), (near0, n0))]
    displacement = np.abs(log[0] - log[1])
    shares = table[:, [_AT[name] for name in _SHARES]] / n[:, None]
    means = table[:, [_AT[name] for name in _MEANS]]
    live, kept = (count > 0) & (count0 > 0), table[:, _AT["peak"]] != UNKEPT
    means[~kept, _MEANS.index("peak")] = 0
    extra = np.stack((near0 / n0, displacement, np.ones(len(table)), kept, count), 1)
    columns = np.concatenate((shares, means, extra), 1)
    columns[~live] = 0
    # The rows of a stage follow one another.
    ends = list(itertools.accumulate(len(stage.taps) for stage in stages.values()))
    begin = [0, *ends[:-1]]
    sums = np.add.reduceat(columns, begin).tolist()
    unusable = np.add.reduceat(table[:, _AT["nonfinite"]], begin).tolist()
    histograms = np.add.reduceat(table[:, len(TABLE) :].astype(np.int64), begin)
    estimators = [ESTIMATORS[int(i)] for i in table[:, _AT["estimator"]]]
    readings = {}
    for i, (name, begins, end) in enumerate(zip(stages, begin, ends, strict=True)):
        *totals, taps, peaks, finite = sums[i]
        numbers = dict(zip(_NUMBERS, totals, strict=True))
        peak = numbers.pop("peak")
        told = {estimators[tap] for tap in range(begins, end) if live[tap]} or {"first-probe"}
        readings[name] = StageReading(
            # One NaN for all: readings compare.
            **{k: x / taps if taps and x == x else math.nan for k, x in numbers.items()},
            peak=math.nan if not peaks else math.inf if peak != peak else peak / peaks,
            estimator=told.pop() if len(told) == 1 else "mixed",
            count=int(finite),
            nonfinite=int(unusable[i]),
            histogram=histograms[i],
        )
    return readings
