"""From the rows of a reading to the numbers of each stage, on the host.

Three steps: `tabulate` makes one row a layer of what was read here; `pool_ranks` makes one row of
those of several processes; `pool_layers` makes the numbers of a stage from the rows of its layers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from densitylr.history import BINS
from densitylr.monitor.measure.buffer import (
    EXAMPLE_VARIANCE_AT,
    PEAK_AT,
    SUMS,
    UNKEPT,
    SampleBuffer,
)
from densitylr.monitor.measure.statistics import ESTIMATORS, TABLE, summarise

__all__ = ["Compared", "pool_layers", "pool_ranks", "tabulate"]

COLUMN = {name: i for i, name in enumerate(TABLE)}
"""Where each number stands in a row."""

_SHARES = ("near_zero", "near_zero_present")
_MEANS = ("mean", "rms", "rms0", "example_variance", "peak_rms")
_NUMBERS = (*_SHARES, *_MEANS, "untrained", "displacement")
_COUNTS = ("count", "near_zero", "reference_count", "reference_near_zero")


class Compared(NamedTuple):
    """A layer that was read, and what its outputs are compared with.

    Attributes:
        row: of the layer.
        twin: whether its twin has answered.
        reference: finite and near-zero outputs of the untrained layer, known from before.
        estimator: a name in `ESTIMATORS`.
    """

    row: int
    twin: bool
    reference: tuple[float, float] | None
    estimator: str


class References(NamedTuple):
    """What later readings of a layer refer to.

    Attributes:
        rms0: its untrained RMS; None where nothing finite was read.
        reference: finite and near-zero outputs of the untrained layer.
    """

    rms0: float | None
    reference: tuple[float, float] | None


def tabulate(
    layers: Sequence[Compared], buffer: SampleBuffer, rows: np.ndarray
) -> tuple[np.ndarray, dict[int, References]]:
    """The numbers of each layer that was read on one device.

    Args:
        layers: those that were read.
        buffer: of that device.
        rows: its rows, on the host, float64.

    Returns:
        float64 ``[layers, len(TABLE) + BINS]``: `TABLE` and the histogram of each layer, in their
        order; and by row what later readings refer to.
    """
    # Of the layers, and behind them of the answers of the twins.
    found = dict(summarise(rows[:, :SUMS], np.array(buffer.sizes)))
    count, near_zero, rms0 = (found[k].tolist() for k in ("count", "near_zero", "rms0"))
    compared = np.zeros((len(rows), 3))
    references = {}
    for layer in layers:
        i, reference = layer.row, layer.reference
        kept, answer = reference, reference
        if layer.twin:
            twin = buffer.twin_row[i]
            answer = count[twin], near_zero[twin]
            if count[twin]:  # it may be all NaN
                kept = answer
        if count[i]:
            kept = kept or (count[i], near_zero[i])
        references[i] = References(rms0[i] if count[i] else None, kept)
        compared[i] = *(answer or kept or (0.0, 0.0)), ESTIMATORS.index(layer.estimator)
    for name, column in zip(
        ("reference_count", "reference_near_zero", "estimator"), compared.T, strict=True
    ):
        found[name] = column
    found["example_variance"], found["peak_rms"] = rows[:, EXAMPLE_VARIANCE_AT], rows[:, PEAK_AT]
    columns = np.stack([found[name] for name in TABLE], 1)
    at = [layer.row for layer in layers]
    return np.concatenate((columns, found["histogram"]), 1)[at], references


def unread(layers: int) -> np.ndarray:
    """The rows of layers that were not read: zeros, and no peak."""
    table = np.zeros((layers, len(TABLE) + BINS))
    table[:, COLUMN["peak_rms"]] = UNKEPT
    return table


def pool_ranks(rows: np.ndarray) -> np.ndarray:
    """The rows of the concatenated batch, from those of its parts.

    Counts, histograms included, are added; moments are weighted by the finite outputs they were
    taken over; the peak is the largest, NaN if one is NaN. This is what one process would have
    read, but for two things. Near zero is near zero against the RMS of each rank's own untrained
    twin on its own examples, so that the share and that of the twin, which is counted in the same
    way, stay comparable. And ``example_variance`` is that within the ranks, over those with enough
    examples: with n examples a rank it is about 1/n lower than over all of them. ``estimator`` is
    the best of theirs.

    Args:
        rows: float64 ``[ranks, layers, statistics]``: `TABLE` and the histogram; zeros, and no
            peak, where a rank has not read a layer.

    Returns:
        ``[layers, statistics]``.
    """
    out = rows.sum(axis=0)
    count, mean, rms, rms0, variance = (
        rows[..., COLUMN[k]] for k in ("count", "mean", "rms", "rms0", "example_variance")
    )
    n = np.maximum(1, count.sum(axis=0))
    out[:, COLUMN["mean"]] = (count * mean).sum(axis=0) / n
    out[:, COLUMN["rms"]] = np.sqrt((count * rms**2).sum(axis=0) / n)
    compared = rows[..., COLUMN["reference_count"]]
    n0 = np.maximum(1, compared.sum(axis=0))
    out[:, COLUMN["rms0"]] = np.sqrt((compared * rms0**2).sum(axis=0) / n0)
    square = np.where(np.isnan(variance), 0, count * rms**2)
    with np.errstate(invalid="ignore"):
        within = (np.nan_to_num(variance) * square).sum(axis=0) / square.sum(axis=0)
    out[:, COLUMN["example_variance"]] = within
    out[:, COLUMN["estimator"]] = rows[..., COLUMN["estimator"]].max(axis=0)
    out[:, COLUMN["peak_rms"]] = rows[..., COLUMN["peak_rms"]].max(axis=0)
    return out


def pool_layers(stages: Mapping[str, int], table: np.ndarray) -> dict[str, dict[str, Any]]:
    """Means over the layers of each stage that were read and hold a finite element.

    Args:
        stages: the number of layers of each stage, one at least.
        table: the rows of the layers, in the order of the stages.

    Returns:
        The arguments of a `densitylr.StageReading` by stage.
    """
    count, near, count0, near0 = (table[:, COLUMN[name]] for name in _COUNTS)
    n, n0 = np.maximum(count, 1), np.maximum(count0, 1)
    # Half a count more keeps the logarithm finite and equal shares at exactly zero: half a count
    # of the smaller sample, or no outputs near zero would be fewer of more outputs.
    m = np.minimum(n, n0)
    log = [np.log((k * m / size + 0.5) / (m + 1)) for k, size in ((near, n), (near0, n0))]
    displacement = np.abs(log[0] - log[1])
    shares = table[:, [COLUMN[name] for name in _SHARES]] / n[:, None]
    means = table[:, [COLUMN[name] for name in _MEANS]]
    live, kept = (count > 0) & (count0 > 0), table[:, COLUMN["peak_rms"]] != UNKEPT
    means[~kept, _MEANS.index("peak_rms")] = 0
    extra = np.stack((near0 / n0, displacement, np.ones(len(table)), kept, count), 1)
    columns = np.concatenate((shares, means, extra), 1)
    columns[~live] = 0
    # The rows of a stage follow one another.
    ends = list(itertools.accumulate(stages.values()))
    begin = [0, *ends[:-1]]
    sums = np.add.reduceat(columns, begin).tolist()
    unusable = np.add.reduceat(table[:, COLUMN["nonfinite"]], begin).tolist()
    histograms = np.add.reduceat(table[:, len(TABLE) :].astype(np.int64), begin)
    estimators = [ESTIMATORS[int(i)] for i in table[:, COLUMN["estimator"]]]
    found = {}
    for i, (name, begins, end) in enumerate(zip(stages, begin, ends, strict=True)):
        *totals, layers, peaks, finite = sums[i]
        numbers = dict(zip(_NUMBERS, totals, strict=True))
        peak = numbers.pop("peak_rms")
        known = {estimators[row] for row in range(begins, end) if live[row]} or {"first-probe"}
        found[name] = {
            # One NaN for all: readings compare.
            **{k: x / layers if layers and x == x else math.nan for k, x in numbers.items()},
            "peak_rms": math.nan if not peaks else math.inf if peak != peak else peak / peaks,
            "estimator": known.pop() if len(known) == 1 else "mixed",
            "count": int(finite),
            "nonfinite": int(unusable[i]),
            "histogram": histograms[i],
        }
    return found
