"""What a collapse looks like: readings in, evidence in words out.

The near-zero density alone does not show it: activations explode, or no longer depend on the
example. A healthy net does nothing of the kind from one probe to the next, once it has settled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from densitylr.motion import VARIED
from densitylr.outbursts import COLLAPSED
from densitylr.records import Reading, StageReading

__all__ = ["Evidence", "Watch", "evidence"]

SETTLING = 20
"""Steps in which a healthy net may change by any factor: only what is not finite counts."""

EXPLODED = 5.0
"""RMS of a stage against the last healthy probes; it grew by up to 3 in healthy training."""

LOUD = 2.0
"""The same against the loudest stage: a quiet one that lifts off late grows by more than that."""

SAME = 0.02
"""Variety against the last healthy probes; healthy falls were to 0.4, of a collapse to 0.001."""

TOGETHER = 0.4
"""The same, for the geometric mean over all stages."""

VANISHED = SAME / 10
"""The same, where one probe is enough."""

RECENT = 3
"""Healthy probes that a reading is compared with."""


@dataclass(frozen=True)
class Evidence:
    """What shows that a stage has collapsed.

    Attributes:
        since: step of the first reading that showed it.
        stage: the first stage, in the model's order, that showed it.
        reason: the numbers, in words.
        sure: whether one reading is enough; otherwise the next one has to show it, too.
    """

    since: int
    stage: str
    reason: str
    sure: bool


def evidence(now: Reading, first: Reading, recent: Sequence[Reading]) -> Evidence | None:
    """What one reading shows, against the first and the last healthy ones."""
    for name, seen in now.stages.items():
        reason = _broken(seen)
        if reason is not None:
            return Evidence(now.step, name, reason, sure=True)
    if now.step - first.step < SETTLING or any(r is first for r in recent):
        return None
    found = None
    loudest = max((_peak(r.stages[name]) for r in recent for name in r.stages), default=math.inf)
    for name, seen in now.stages.items():
        before = [r.stages[name] for r in recent]
        usual = max((_peak(s) for s in before), default=math.inf)
        if seen.count and seen.peak > max(EXPLODED * usual, LOUD * loudest):
            reason = f"RMS of its activations {seen.peak:.3g}, at most {usual:.3g} before"
            return Evidence(now.step, name, reason, sure=True)
        faded = _faded(seen, first.stages[name], before)
        if faded is not None and (found is None or faded[1] > found.sure):
            found = Evidence(now.step, name, *faded)
    return found or _faded_together(now, recent)


def _faded_together(now: Reading, recent: Sequence[Reading]) -> Evidence | None:
    """Where no stage has lost all that depends on the example, but all have lost much of it."""
    usual = {name: _variety([r.stages[name] for r in recent]) for name in now.stages}
    ratios = {
        name: seen.variety / usual[name]
        for name, seen in now.stages.items()
        if usual[name] >= VARIED and seen.variety > 0
    }
    if len(ratios) < 2:
        return None
    mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
    if mean >= TOGETHER:
        return None
    name = min(ratios, key=ratios.__getitem__)
    reason = (
        f"{now.stages[name].variety:.2%} of what it says depends on the example, {usual[name]:.1%} "
        f"before, and over all stages {mean:.0%} as much as before"
    )
    return Evidence(now.step, name, reason, sure=False)


def _variety(before: Sequence[StageReading]) -> float:
    return min((s.variety for s in before if not math.isnan(s.variety)), default=0.0)


def _broken(seen: StageReading) -> str | None:
    if seen.nonfinite:
        return f"{seen.nonfinite} of its activations are NaN or infinite"
    if math.isinf(seen.peak):
        return "its activations were not finite in a step since the last probe"
    return None


def _peak(seen: StageReading) -> float:
    return seen.peak if seen.count else 0.0


def _faded(
    seen: StageReading, first: StageReading, before: list[StageReading]
) -> tuple[str, bool] | None:
    usual = _variety(before)
    if usual >= VARIED and seen.variety < SAME * usual:
        reason = f"{seen.variety:.2%} of what it says depends on the example, {usual:.1%} before"
        return reason, seen.variety < VANISHED * usual
    share = seen.near_zero_present
    if share > COLLAPSED and share > 2 * first.near_zero_present:
        reason = f"{share:.0%} of its outputs are below a tenth of their own RMS"
        return f"{reason}, {first.near_zero_present:.0%} at first", False
    return None


class Watch:
    """Tell a collapse from healthy training, one reading after the other.

    Attributes:
        healthy: whether the last reading was; one that is only suspicious is not.
    """

    def __init__(self) -> None:
        self.first: Reading | None = None
        self.recent: list[Reading] = []
        self.suspicion: Evidence | None = None
        self.healthy = False

    def see(self, now: Reading) -> Evidence | None:
        """The evidence, once it is enough."""
        found = evidence(now, self.first or now, self.recent)
        self.healthy = found is None
        if found is None:
            self.first = self.first or now
            self.recent = [*self.recent[1 - RECENT :], now]
        elif not found.sure and self.suspicion is None:
            self.suspicion = found
            return None
        elif self.suspicion is not None:
            found = replace(found, since=self.suspicion.since)
        self.suspicion = None
        return found

    def go_back(self, recent: Sequence[Reading]) -> None:
        """Compare with the readings that were the last healthy ones then."""
        self.recent, self.suspicion = list(recent), None
