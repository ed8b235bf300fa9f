"""Is a rate still too low? Gradients show it where density no longer does. Pure functions.

A stage lifts off at a tenth of a good rate, too, and displacement levels off whatever the rate.
While a rate is too low the weights have not come as far as gradients call for, and the descent
direction goes on pointing away from their first values: its cosine with the displacement of the
weights, the *alignment*, stays well above zero. D-Adaptation (Defazio and Mishchenko, 2023) and
Prodigy (Mishchenko and Defazio, 2024) estimate the distance to a solution from the same product;
here it is only compared with a threshold.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from densitylr.history import Count, Finite
from densitylr.policy.base import Observation

__all__ = ["AlignmentWindow", "Averages", "average", "each_above", "together_above"]


@dataclass(frozen=True)
class AlignmentWindow:
    """The alignment of a stage, averaged over the steps since it was last judged.

    Attributes:
        open: it is being measured.
        start: step of the last judgement, or from which it counts.
        total: sum of the alignment over the steps since then.
    """

    open: bool = False
    start: Count = 0
    total: Finite = 0.0

    def judged(self, step: int, *, open: bool) -> AlignmentWindow:
        """Begin anew."""
        return AlignmentWindow(open, max(self.start, step))


class Averages(NamedTuple):
    """The open windows at an update.

    Attributes:
        windows: all of them.
        steps: of those whose stage has a rate, the steps since they were judged.
        means: of those measured at this update, the mean over these steps.
    """

    windows: dict[str, AlignmentWindow]
    steps: dict[str, int]
    means: dict[str, float]

    def over(self, steps: int) -> list[str]:
        """The stages whose window is as long as that, so that they can be judged."""
        return [name for name, length in self.steps.items() if length >= steps]


def average(windows: Mapping[str, AlignmentWindow], seen: Observation, last: int) -> Averages:
    """Add what was measured since the last update.

    A stage at a rate of 0 does not move, so that its weights lag behind whatever the scale: its
    window begins when it has one.

    Args:
        windows: the open ones.
        seen: the stages now.
        last: step of the last update.
    """
    found = Averages({}, {}, {})
    for name, window in windows.items():
        view = seen.stages[name]
        if view.lr <= 0:
            found.windows[name] = window.judged(seen.step, open=True)
            continue
        steps = seen.step - window.start
        if steps > 0 and math.isfinite(view.alignment):
            total = window.total + view.alignment * min(seen.step - last, steps)
            window = dataclasses.replace(window, total=total)
            found.means[name] = total / steps
        found.windows[name], found.steps[name] = window, steps
    return found


def together_above(averages: Averages, due: Collection[str], threshold: float) -> dict[str, float]:
    """All due stages, with the mean over the measured ones, where that is above the threshold."""
    mean = sum(averages.means.values()) / max(1, len(averages.means))
    return dict.fromkeys(due, mean) if mean > threshold else {}


def each_above(averages: Averages, due: Collection[str], threshold: float) -> dict[str, float]:
    """The due stages whose own mean is above the threshold, if the mean over all measured steps is,
    too: where that is not, it is the largest rate that is too high.
    """
    steps = sum(averages.steps[name] for name in averages.means)
    if sum(averages.windows[name].total for name in averages.means) <= threshold * steps:
        return {}
    means = {name: averages.windows[name].total / averages.steps[name] for name in due}
    return {name: mean for name, mean in means.items() if mean > threshold}
