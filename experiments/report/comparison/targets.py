"""Steps to the target, with runs that never reach it counted for what is known of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Reached", "reached"]


@dataclass(frozen=True)
class Reached:
    """When the runs of an arm reached the target.

    Attributes:
        arm: the arm.
        n: runs.
        steps: at which those that reached it did, ascending.
        last: the largest step to which a run that did not was followed; 0 where all did.
        median: of all runs; None where fewer than half of them reached it.
        share: steps and shares of all runs, ``[(step, share), …]``: the curve's corners.
    """

    arm: str
    n: int
    steps: list[float]
    last: float
    median: float | None
    share: list[tuple[float, float]]


def reached(arm: str, outcomes: Sequence[tuple[float, bool]]) -> Reached:
    """The share of an arm's runs that has reached the target, by step (Kaplan and Meier, 1958).

    A run that never reached it was followed to its last step and counts until then; where all
    runs are equally long the curve is the plain share of runs.

    Args:
        arm: its name.
        outcomes: of each run the step, and True where the target was not reached by then.
    """
    times = np.array([step for step, _ in outcomes], dtype=np.float64)
    late = np.array([censored for _, censored in outcomes], dtype=bool)
    left, corners, median = 1.0, [(0.0, 0.0)], None
    for at in np.unique(times[~late]):
        left *= 1 - float(np.sum((times == at) & ~late)) / float(np.sum(times >= at))
        corners.append((float(at), 1 - left))
        if median is None and left <= 0.5 + 1e-12:
            median = float(at)
    last = float(times[late].max()) if late.any() else 0.0
    steps = sorted(times[~late].tolist())
    end = float(times.max()) if len(times) else 0.0
    corners.append((end, 1 - left))
    return Reached(arm, len(times), steps, last, median, corners)
