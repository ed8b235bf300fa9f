"""What becomes of rates once stages have lifted off. Pure, no torch.

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
from collections.abc import Mapping
from typing import NamedTuple

from densitylr.policy import StageState
from densitylr.records import Reading

__all__ = ["PULLED", "Crept", "Limits", "creeping"]

PULLED = "gradients still pull away from the untrained weights"


class Limits(NamedTuple):
    """The constants: see `densitylr.liftoff.LiftOff`."""

    pull: float
    creep: float
    pace: int
    follow: int


class Crept(NamedTuple):
    """The stages as they go on, and why their rates were raised; empty if they were not."""

    stages: dict[str, StageState]
    why: str


def creeping(
    before: Mapping[str, StageState],
    after: Mapping[str, StageState],
    reading: Reading,
    rates: Mapping[str, float],
    limits: Limits,
    *,
    together: bool,
) -> list[Crept]:
    """Raise the rates of followed stages where gradients still pull weights away from their start.

    Args:
        before: the stages as they were until this reading.
        after: the same at this reading.
        reading: with the mean cosine of each stage since the last one; NaN where none was seen.
        rates: the user's own rate of each stage; one of 0 moves nothing, so that its weights lag
            behind whatever the scale: such a stage waits.
        limits: a raise is by ``creep``, where the mean over ``pace`` steps is above ``pull``;
            ``follow`` steps after lift-off nothing is raised any more.
        together: all by one factor, by the mean over the stages; otherwise each by its own.
    """
    followed = {name: after[name] for name in after if before[name].following}
    waiting = {
        name: dataclasses.replace(stage, pulled=0.0, judged=max(stage.judged, reading.step))
        for name, stage in followed.items()
        if rates.get(name, 0.0) <= 0
    }
    names = [name for name in followed if name not in waiting]
    groups = [names] if together else [[name] for name in names]
    found = [_crept({n: followed[n] for n in group}, before, reading, limits) for group in groups]
    return [*found, Crept(waiting, "")]


def _crept(
    stages: Mapping[str, StageState],
    before: Mapping[str, StageState],
    reading: Reading,
    limits: Limits,
) -> Crept:
    step = reading.step
    followed, means, due = {}, [], []
    for name, stage in stages.items():
        steps, pull = step - stage.judged, reading.stages[name].pull
        if steps > 0 and math.isfinite(pull):
            since = min(step - before[name].step, steps)
            stage = dataclasses.replace(stage, pulled=stage.pulled + pull * since)
            means.append(stage.pulled / max(1, steps))
        followed[name] = stage
        if steps >= limits.pace:
            due.append(name)
    mean = sum(means) / len(means) if means else 0.0
    raised = bool(due) and mean > limits.pull
    for name in due:
        stage = followed[name]
        left = limits.follow - (step - (stage.over or 0))
        followed[name] = dataclasses.replace(
            stage,
            scale=stage.scale * (limits.creep if raised and left >= 0 else 1.0),
            pulled=0.0,
            judged=step,
            following=left > 0,
        )
    why = f"{PULLED} ({mean:.2f})" if raised else ""
    return Crept(followed, why)
