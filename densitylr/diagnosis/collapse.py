"""What a collapse looks like: readings in, a sign with its numbers out.

The near-zero density alone does not show it: activations explode, or no longer depend on the
example. A healthy net does nothing of the kind from one reading to the next, once it has settled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from densitylr.diagnosis.divergence import COLLAPSED, VARIED
from densitylr.history import Reading, StageReading

__all__ = ["RECENT", "CollapseDetector", "CollapseSign", "find_sign"]

SETTLING = 20
"""Steps in which a healthy net may change by any factor: only what is not finite counts."""

EXPLODED = 5.0
"""RMS of a stage against the last healthy readings; it grew by up to 3 in healthy training."""

LOUD = 2.0
"""The same against the largest RMS of any stage: a quiet stage that lifts off late grows by
more."""

SAME = 0.02
"""Example variance against the last healthy readings; healthy falls were to 0.4, of a collapse to
0.001."""

TOGETHER = 0.4
"""The same, for the geometric mean over all stages."""

VANISHED = SAME / 10
"""The same, where one reading is enough."""

RECENT = 3
"""Healthy readings that a reading is compared with."""


Numbers = dict[str, float | str]


@dataclass(frozen=True)
class CollapseSign:
    """What shows that a stage has collapsed.

    Attributes:
        since: step of the first reading that showed it.
        stage: the first stage, in the model's order, that showed it.
        numbers: ``sign``, its name, and the numbers it rests on; see
            `densitylr.history.collapse_evidence`.
        sure: whether one reading is enough; otherwise the next one has to show it, too.
    """

    since: int
    stage: str
    numbers: Mapping[str, float | str]
    sure: bool


def find_sign(now: Reading, first: Reading, recent: Sequence[Reading]) -> CollapseSign | None:
    """What one reading shows, against the first and the last healthy ones."""
    for name, seen in now.stages.items():
        numbers = _not_finite(seen)
        if numbers:
            return CollapseSign(now.step, name, numbers, sure=True)
    if now.step - first.step < SETTLING or any(r is first for r in recent):
        return None
    found = None
    largest = max((_peak(r.stages[name]) for r in recent for name in r.stages), default=math.inf)
    for name, seen in now.stages.items():
        before = [r.stages[name] for r in recent]
        usual = max((_peak(s) for s in before), default=math.inf)
        if seen.count and seen.peak_rms > max(EXPLODED * usual, LOUD * largest):
            numbers = {"sign": "exploded", "peak_rms": seen.peak_rms, "usual": usual}
            return CollapseSign(now.step, name, numbers, sure=True)
        faded = _faded(seen, first.stages[name], before)
        if faded is not None and (found is None or faded[1] > found.sure):
            found = CollapseSign(now.step, name, *faded)
    return found or _faded_together(now, recent)


def _faded_together(now: Reading, recent: Sequence[Reading]) -> CollapseSign | None:
    """Where no stage has lost all that depends on the example, but all have lost much of it."""
    usual = {name: _usual_variance([r.stages[name] for r in recent]) for name in now.stages}
    ratios = {
        name: seen.example_variance / usual[name]
        for name, seen in now.stages.items()
        if usual[name] >= VARIED and seen.example_variance > 0
    }
    if len(ratios) < 2:
        return None
    mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
    if mean >= TOGETHER:
        return None
    name = min(ratios, key=ratios.__getitem__)
    variance = now.stages[name].example_variance
    numbers: Numbers = {"sign": "all alike", "example_variance": variance, "usual": usual[name]}
    return CollapseSign(now.step, name, {**numbers, "mean": mean}, sure=False)


def _usual_variance(before: Sequence[StageReading]) -> float:
    known = (s.example_variance for s in before if not math.isnan(s.example_variance))
    return min(known, default=0.0)


def _not_finite(seen: StageReading) -> Numbers:
    if seen.nonfinite:
        return {"sign": "non-finite", "nonfinite": seen.nonfinite}
    return {"sign": "non-finite step"} if math.isinf(seen.peak_rms) else {}


def _peak(seen: StageReading) -> float:
    return seen.peak_rms if seen.count else 0.0


def _faded(
    seen: StageReading, first: StageReading, before: list[StageReading]
) -> tuple[Numbers, bool] | None:
    usual = _usual_variance(before)
    if usual >= VARIED and seen.example_variance < SAME * usual:
        variance = seen.example_variance
        numbers: Numbers = {"sign": "alike", "example_variance": variance, "usual": usual}
        return numbers, variance < VANISHED * usual
    share, first_share = seen.near_zero_present, first.near_zero_present
    if share > COLLAPSED and share > 2 * first_share:
        return {"sign": "near zero", "share": share, "first": first_share}, False
    return None


class CollapseDetector:
    """Tell a collapse from healthy training, one reading after the other.

    Attributes:
        healthy: whether the last reading showed no sign of a collapse.
    """

    def __init__(self) -> None:
        self.first: Reading | None = None
        self.recent: list[Reading] = []
        self.suspicion: CollapseSign | None = None
        self.healthy = False

    def look(self, now: Reading) -> CollapseSign | None:
        """The sign, once it is enough."""
        found = find_sign(now, self.first or now, self.recent)
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
