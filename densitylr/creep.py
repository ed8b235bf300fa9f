"""Rates that are raised because gradients call for it. Pure, no torch.

A stage lifts off at a tenth of a good rate, too, and a rate that is right at lift-off may be a
sixth of what training can bear. Density does not tell: displacement levels off whatever the rate.
The gradient tells. While a rate is too low, the weights have not come as far as gradients call for,
and the descent direction goes on pointing away from where they began: its cosine with the way they
have come stays well above zero. The same product is what D-Adaptation (Defazio and Mishchenko,
2023) and Prodigy (Mishchenko and Defazio, 2024) estimate the distance to a solution from; here it
is only compared with a threshold.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from densitylr.policy import Ruling, StageState
from densitylr.records import Reading

__all__ = ["Limits", "creeping"]

PULLED = "gradients still pull away from the untrained weights"


class Limits(NamedTuple):
    """The constants: see `densitylr.liftoff.LiftOff`."""

    pull: float
    creep: float
    pace: int
    follow: int


def creeping(
    before: Mapping[str, StageState],
    after: Mapping[str, StageState],
    reading: Reading,
    rates: Mapping[str, float],
    limits: Limits,
    *,
    together: bool,
) -> Ruling:
    """Raise the rates of followed stages where gradients still pull weights away from their start.

    Args:
        before: the stages as they were until this reading.
        after: the same at this reading; one that has been raised at it begins anew.
        reading: with the mean cosine of each stage since the last one; NaN where none was seen.
        rates: the user's own rate of each stage; one of 0 moves nothing, so that its weights lag
            behind whatever the scale: such a stage waits.
        limits: a raise is by ``creep``, where the mean over ``pace`` steps is above ``pull``;
            ``follow`` steps after lift-off nothing is raised any more.
        together: all by one factor, by the mean over the stages. Otherwise each by its own, but
            only while the mean over all of them is above ``pull``, too: where it is not, it is
            the largest rate that is too high.

    Returns:
        The followed stages, and of those that were raised why.
    """
    pulled = _pulled(before, after, reading, rates)
    anew = [n for n in pulled.steps if not together and after[n].scale != before[n].scale]
    due = [n for n, steps in pulled.steps.items() if steps >= limits.pace]
    if together:
        raised = _by_one_mean(pulled, due, limits.pull)
    else:
        raised = _each_by_its_own(pulled, [n for n in due if n not in anew], limits.pull)
    now, stages, why = reading.step, dict(pulled.stages), {}
    for name in dict.fromkeys([*due, *anew]):
        stage = stages[name]
        left = limits.follow - (now - (now if stage.over is None else stage.over))
        if name in raised and left >= 0:
            stage = dataclasses.replace(stage, scale=stage.scale * limits.creep)
            why[name] = f"{PULLED} ({raised[name]:.2f})"
            if not together:  # it lifts off at a reading at which it is not raised
                old = before[name]
                stage = dataclasses.replace(stage, lifted=old.lifted, over=old.over)
        judged, following = max(stage.judged, now), left > 0
        stages[name] = dataclasses.replace(stage, pulled=0.0, judged=judged, following=following)
    return Ruling(stages, why)


class _Pulled(NamedTuple):
    """The followed stages with what was added to their pull.

    Attributes:
        stages: all of them.
        steps: of those with a rate, the steps since they were judged.
        means: of those whose pull was seen at this reading, its mean over these steps.
    """

    stages: dict[str, StageState]
    steps: dict[str, int]
    means: dict[str, float]


def _pulled(
    before: Mapping[str, StageState],
    after: Mapping[str, StageState],
    reading: Reading,
    rates: Mapping[str, float],
) -> _Pulled:
    found = _Pulled({}, {}, {})
    for name in (n for n in after if before[n].following and after[n].following):
        stage, pull = after[name], reading.stages[name].pull
        if rates.get(name, 0.0) <= 0:
            judged = max(stage.judged, reading.step)
            found.stages[name] = dataclasses.replace(stage, pulled=0.0, judged=judged)
            continue
        steps = reading.step - stage.judged
        if steps > 0 and math.isfinite(pull):
            since = min(reading.step - before[name].step, steps)
            stage = dataclasses.replace(stage, pulled=stage.pulled + pull * since)
            found.means[name] = stage.pulled / steps
        found.stages[name], found.steps[name] = stage, steps
    return found


def _by_one_mean(pulled: _Pulled, due: Sequence[str], least: float) -> dict[str, float]:
    """The stages to raise, with the mean that calls for it: all that are due, or none."""
    mean = sum(pulled.means.values()) / max(1, len(pulled.means))
    return dict.fromkeys(due, mean) if mean > least else {}


def _each_by_its_own(pulled: _Pulled, due: Sequence[str], least: float) -> dict[str, float]:
    """Those of the due ones whose own mean is above ``least``, where that of all steps is, too."""
    seen = sum(pulled.steps[name] for name in pulled.means)
    if sum(pulled.stages[name].pulled for name in pulled.means) <= least * seen:
        return {}
    means = {name: pulled.stages[name].pulled / pulled.steps[name] for name in due}
    return {name: mean for name, mean in means.items() if mean > least}
