"""Has a stage moved at all? A test of the drift of its outputs against their noise. Pure functions.

The RMS of a stage's outputs shows their drift more reliably than the near-zero density: it varies
less between batches, and it has no upper bound. *Levels* are ``ln(rms / rms0)``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

__all__ = ["Trace", "Traces", "all_levels", "all_moved", "has_moved", "levels"]

Trace = Mapping[str, np.ndarray]
Traces = Mapping[str, Trace]
"""What `densitylr.History.traces` gives."""

CERTAIN = 3.2
"""Standard errors from which a drift is significant; stages that did not move reached 2.3."""

SLIGHT, LARGE = 0.02, 0.1
"""Drifts of the level: below the first a stage has not moved, however small the error; above the
second it has, however large the error."""

PAIRED, OUTPUTS = 0.02, 3.0
"""A stage has moved if its displacement from a twin exceeds `PAIRED` and more than `OUTPUTS`
near-zero outputs changed, …"""

PAIRED_TWICE = 0.2
"""… or if its displacement exceeds this at two readings."""


def all_levels(traces: Traces) -> dict[str, np.ndarray]:
    """`levels` of each stage."""
    return {stage: levels(trace) for stage, trace in traces.items()}


def all_moved(traces: Traces) -> set[str]:
    """The stages that have moved."""
    return {stage for stage, trace in traces.items() if has_moved(trace)}


def levels(trace: Trace) -> np.ndarray:
    """``ln(rms / rms0)`` at each reading; NaN where nothing was read or either RMS was zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        level = np.log(trace["rms"] / trace["rms0"])
    return np.where(np.isinf(level), np.nan, level)


def has_moved(trace: Trace) -> bool:
    """Whether the outputs of a stage drifted more than they vary between batches; False if unread.

    A straight line is fitted to the level, to the mean and to the logarithm of the near-zero
    density. A displacement from a twin carries no batch noise, so there a change of a few outputs
    suffices.
    """
    twin = trace["twin"]
    moved = trace["displacement"][twin]
    near_zero = (trace["untrained"] * trace["count"])[twin]
    by_outputs = (moved > PAIRED) & (moved * near_zero > OUTPUTS)
    if by_outputs.any() or (moved > PAIRED_TWICE).sum() >= 2:
        return True
    steps = trace["step"].astype(float)
    count = trace["count"]
    near = np.log((trace["near_zero"] * count + 0.5) / (count + 1))
    drift, error = _drift(steps, levels(trace))
    if drift >= LARGE or (drift >= SLIGHT and drift >= CERTAIN * error):
        return True
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = trace["mean"] / trace["rms0"]
    drift, error = _drift(steps, mean)
    if drift >= SLIGHT and drift >= 1.5 * CERTAIN * error:
        return True
    # A small stage counts few near-zero outputs, so that their share needs to be surer.
    drift, error = _drift(steps, near)
    return bool(drift >= LARGE and drift >= 2 * CERTAIN * error)


def _drift(steps: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """Change along the fitted line from the first to the last step, and its standard error."""
    read = np.isfinite(values)
    if read.sum() < 4:
        return 0.0, math.inf
    x, y = steps[read] - steps[read].mean(), values[read] - values[read].mean()
    slope = (x @ y) / (x @ x)
    rest = y - slope * x
    error = math.sqrt((rest @ rest) / (len(x) - 2) / (x @ x))
    span = steps[read][-1] - steps[read][0]
    return float(abs(slope) * span), float(error * span)
