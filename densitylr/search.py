"""What the search for a rate knows beyond a single stage and a single step. Pure, no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import NamedTuple

from densitylr.policy import Ruling, StageState
from densitylr.records import Reading, StageReading

__all__ = ["Agreement", "agreed", "reached", "together", "visible"]

ENOUGH = 0.25
"""Share of the most near-zero outputs of any stage, from which on a stage can judge itself."""

LONG = 10_000
"""Steps after which every buffer is taken to be full."""


def reached(start: int, stop: int, momentum: float, memory: float, nesterov: bool = False) -> float:
    """How many steps at full effect the steps ``start`` … ``stop - 1`` amount to.

    With a constant gradient g, a buffer that begins empty holds ``g (1 - momentum**t) /
    (1 - momentum)`` in step t = 1, 2, …, and is one step ahead with Nesterov's; an average of
    squares that begins at zero is ``g² (1 - memory**t)``, by the root of which RMSprop divides,
    before the momentum.

    Args:
        start, stop: steps that were taken before, counted from 0.
        momentum: 0 for none.
        memory: 0 where the average is corrected for its beginning, or there is none.
        nesterov: of the momentum, where there is no memory.
    """
    if start >= LONG or not (momentum or memory):
        return float(stop - start)
    if not memory:
        lacking = momentum ** (start + 1 + nesterov) - momentum ** (stop + 1 + nesterov)
        return stop - start - lacking / (1 - momentum)
    if not momentum:
        return sum(1 / math.sqrt(1 - memory**t) for t in range(start + 1, stop + 1))
    held, total = 0.0, 0.0
    for t in range(1, stop + 1):
        held = momentum * held + (1 - momentum) / math.sqrt(1 - memory**t)
        total += held if t > start else 0.0
    return total


class Agreement(NamedTuple):
    """The rates at which stages meet.

    Attributes:
        rates: of each stage.
        middle: the median of the rates asked for.
        followers: stages that had no say.
    """

    rates: dict[str, float]
    middle: float
    followers: set[str]

    def why(self, name: str, alone: float, why: str) -> str:
        """Why a stage that asked for the rate ``alone``, with that reason, gets its own."""
        if name in self.followers:
            return "too few near-zero outputs to judge by; takes the median of the others"
        why = why or "lifted off before"
        met = self.rates[name] != alone
        return f"{why}; half-way to the median, {self.middle:.1e}" if met else why


def agreed(
    alone: Mapping[str, float],
    near_zero: Mapping[str, float],
    heard: Collection[str],
    lifted: Collection[str] = (),
) -> Agreement:
    """Where stages meet that each ask for a rate of their own.

    The rate that a stage solves for is right to a factor of two or three either way, so each is
    given the geometric mean of its own and the median. A head, with a handful of near-zero
    outputs, lifts off by chance at a small part of a good rate: it is given the median. As long
    as a displacement is not visible, the rate has only been raised blindly, and does not count in
    the median.

    Args:
        alone: the rate each stage asks for.
        near_zero: outputs that each stage is judged by.
        heard: stages whose displacement is visible; where none is, all are heard.
        lifted: stages that have judged themselves, and keep their say however few outputs they
            have beside one that joins late.
    """
    enough = ENOUGH * max(near_zero[name] for name in alone)
    followers = {n for n in alone if near_zero[n] < enough and n not in lifted}
    asked = {name: rate for name, rate in alone.items() if name not in followers}
    ranked = sorted([asked[name] for name in asked if name in heard] or asked.values())
    middle = math.sqrt(ranked[(len(ranked) - 1) // 2] * ranked[len(ranked) // 2])
    met = {name: math.sqrt(rate * middle) for name, rate in asked.items()}
    return Agreement({name: met.get(name, middle) for name in alone}, middle, followers)


def visible(moved: float, seen: StageReading, least: float) -> bool:
    """Whether a displacement is above ``least`` and its sampling noise, and says how much."""
    return moved >= max(least, 2 / math.sqrt(max(1.0, seen.count * seen.untrained)))


def together(
    before: Mapping[str, StageState],
    after: Mapping[str, StageState],
    reading: Reading,
    rates: Mapping[str, float],
    why: Mapping[str, str],
    *,
    least: float,
    follow: bool,
) -> Ruling:
    """Let the stages meet half-way; once all have lifted off, the search is over.

    Args:
        before: the stages as they were until this reading.
        after: the same with the scales they ask for by themselves.
        reading: of all stages.
        rates: the user's own rate of each stage.
        why: of the stages that were judged at this reading, what they have to say.
        least: of a displacement that is `visible`.
        follow: gradients may call for more once the search is over.

    Returns:
        The stages that are searching, and of those that were judged why they have their rates.
    """
    alone, near_zero, heard = {}, {}, set()
    for name, stage in after.items():
        own, seen = rates.get(name, 0.0), reading.stages[name]
        begun = stage.first is not None and stage.step > stage.first
        read = stage.lifted or (begun and math.isfinite(seen.displacement))
        if own > 0 and read and not seen.zero_gradient:
            alone[name] = own * (stage.scale if stage.alone is None else stage.alone)
            near_zero[name] = stage.near_zero or seen.count * seen.untrained
            if stage.lifted or visible(stage.most, seen, least):
                heard.add(name)
    met = Ruling({}, {})
    if not alone:
        return met
    judged = any(why.values())
    found = agreed(alone, near_zero, heard, {name for name in alone if before[name].lifted})
    over = all(after[name].lifted for name in alone.keys() - found.followers)
    for name, rate in found.rates.items():
        stage = after[name]
        if stage.alone is None:
            continue  # its search was over before
        if judged:
            met.why[name] = found.why(name, alone[name], why.get(name, ""))
            stage = dataclasses.replace(stage, scale=stage.alone * (rate / alone[name]))
        lifted = over or (stage.lifted and name not in found.followers)
        stage = dataclasses.replace(stage, lifted=lifted, alone=None if over else stage.alone)
        if over and follow:
            now, first = reading.step, not any(s.over is not None for s in before.values())
            stage = dataclasses.replace(stage, over=now, judged=now, following=first)
        met.stages[name] = stage
    return met
