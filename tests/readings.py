"""Readings by hand: a displacement a stage, and whatever else is asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from densitylr import Decision, History, Reading, StageReading
from densitylr.density import BINS


def stage_reading(displacement: float = 0.0, **numbers: Any) -> StageReading:
    defaults: dict[str, Any] = {
        "near_zero": 0.08 * math.exp(-max(-5.0, displacement)),
        "untrained": 0.08,
        "displacement": displacement,
        "estimator": "twin",
        "near_zero_absolute": 0.04,
        "near_zero_present": 0.08,
        "exactly_zero": 0.0,
        "mean": 0.01,
        "std": 0.9,
        "rms": 1.0,
        "rms0": 1.0,
        "count": 2**17,
        "nonfinite": 0,
        "histogram": np.arange(BINS, dtype=np.int64),
    }
    return StageReading(**{**defaults, **numbers})


def reading(step: int, displacements: Mapping[str, float]) -> Reading:
    return Reading(step, {name: stage_reading(d) for name, d in displacements.items()})


def history_of(
    traces: Mapping[str, list[StageReading]],
    rates: Mapping[str, float],
    *,
    every: int = 5,
    decisions: Mapping[int, list[Decision]] | None = None,
) -> History:
    """One reading every so many steps; ``decisions`` by step."""
    history = History()
    for i in range(max(len(trace) for trace in traces.values())):
        step = every * i
        seen = Reading(step, {name: trace[i] for name, trace in traces.items()})
        history.record(seen, rates, dict.fromkeys(rates, 1.0), (decisions or {}).get(step, []))
    return history
