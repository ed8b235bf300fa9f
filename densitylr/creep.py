"""What becomes of the rates of `free` once all stages have lifted off. Pure, no torch.

A rate that is right at lift-off may be a sixth of what training can bear, and density does not
tell: displacement levels off whatever the rate. The gradient tells. While a rate is too low, the
weights have not come as far as gradients call for, and the descent direction goes on pointing
away from where they began: its cosine with the way they have come stays well above zero. The same
product is what D-Adaptation (Defazio and Mishchenko, 2023) and Prodigy (Mishchenko and Defazio,
2024) estimate the distance to a solution from; here it is only compared with a threshold.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

from densitylr.policy import StageState

__all__ = ["Crept", "Limits", "creeping"]


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
    stages: Mapping[str, StageState],
    since: Mapping[str, int],
    pulls: Mapping[str, float],
    step: int,
    limits: Limits,
) -> Crept:
    """Raise all rates by one factor, if gradients still pull the weights away from their start.

    Args:
        stages: those whose search is over, and which are followed.
        since: steps since the last reading of each.
        pulls: the mean cosine over these steps; NaN where none was seen.
        step: of the reading.
        limits: a raise is by ``creep``, where the mean over the stages, over ``pace`` steps, is
            above ``pull``; ``follow`` steps after the search nothing is raised any more.
    """
    followed, means, due = {}, [], []
    for name, stage in stages.items():
        steps = step - stage.judged
        if math.isfinite(pulls[name]):
            stage = dataclasses.replace(stage, pulled=stage.pulled + pulls[name] * since[name])
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
    why = f"gradients still pull away from the untrained weights ({mean:.2f})" if raised else ""
    return Crept(followed, why)
