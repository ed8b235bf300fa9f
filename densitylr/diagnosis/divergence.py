"""Diagnoses of outputs that diverge, become the same for all examples, or vanish. Pure
functions."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from densitylr.diagnosis.drift import Trace, Traces
from densitylr.history import PATIENCE, YOUNG, Diagnosis, Finding

__all__ = ["COLLAPSED", "VARIED", "Diverged", "find_diverged"]

COLLAPSED = 0.6
"""Near-zero share, against a stage's own present RMS, above which it has collapsed."""

START = 12
"""Steps within which a rate that is too high shows in the level itself."""

EARLY = 25
"""Steps up to which a sudden growth is put down to the rate the training began with."""

AWAY = math.log(40)
"""Level within `START` steps of a stage that is hot; healthy heads reach 20 times. Later a layer
that begins with small weights may well have grown by as much."""

AWAY_ALONE, OUTSTANDING = math.log(14), 5.0
"""The same for a stage whose rate is so many times the median rate of all stages."""

MOVED_ALONE, FAR_OUT = 1.0, 50.0
"""And of one whose rate is as many times the median as this."""

JUMP = math.log(12)
"""Growth from one reading to the next that no healthy training shows after the first steps."""

BREAK = math.log(4.5)
"""The same after `EARLY` steps, when a net has its scale."""

NEAR = 25
"""Most steps between two readings that count as neighbours …"""

NEAR_SHARE = 1 / PATIENCE
"""… or this share of the steps so far: later on readings are as far apart as that."""

SETTLED = 20
"""Steps after which a bounded output that is at its bounds will stay there."""

ALIKE = 0.01
"""Example variance, against the untrained, below which outputs are alike; healthy: 0.03."""

VARIED = 0.1
"""Example variance below which outputs do not depend on the example even untrained."""

GREW = 1.3
"""Level that a stage below the head has passed where a high rate is the cause, and no decay."""

STRAY, STRAY_ERRORS = 10.0, 5.0
"""RMS of a forward, over the largest before it, that only its batch explains; and, as inputs may
have heavy tails, the standard deviations of the logarithm of those before that it is above them."""

STRAY_AFTER = 8
"""Readings from which on it is known how much they differ."""

RATE_JUMP = 3.5
"""Growth of a rate that may explain it, too: more than `free` gives it from three readings to the
next, less than one raise of `repair`."""

BOUND_LEVEL, BOUND_SHARE, BOUND_REST = 1.1, 0.3, 0.1
"""Level and near-zero share above which, and change below which, an output is at its bounds."""


class Diverged(NamedTuple):
    """What was found of one stage; None where nothing was.

    Attributes:
        hot_or_collapsed: it is hot or has collapsed, the first that holds.
        non_finite: NaN or infinite activations were seen.
        outlier_batch: the outputs of one forward were out of line.
    """

    hot_or_collapsed: Diagnosis | None
    non_finite: Diagnosis | None
    outlier_batch: Diagnosis | None


@dataclass(frozen=True)
class _Seen:
    """A history, as the detectors look at it."""

    traces: Traces
    levels: dict[str, np.ndarray]
    steps: np.ndarray
    within_user_rates: bool


def find_diverged(
    traces: Traces,
    levels: dict[str, np.ndarray],
    *,
    within_user_rates: bool,
    bad_gains: Collection[str],
) -> dict[str, Diverged]:
    """What is found of each stage.

    Args:
        traces: of `densitylr.History.traces`, with one reading at least.
        levels: of each stage, see `all_levels`.
        within_user_rates: of the policy, see `densitylr.policy.Policy`.
        bad_gains: stages whose initial weights are of an unusual spread; they may grow, and
            while there are any, outputs may become alike.
    """
    steps = next(iter(traces.values()))["step"]
    seen = _Seen(traces, levels, steps, within_user_rates)
    watched = (n for n, trace in traces.items() if not np.isnan(trace["peak_rms"]).all())
    entry = next(watched, None)
    return {
        stage: Diverged(
            (None if stage in bad_gains else _grown(seen, stage))
            or (None if bad_gains else _alike(seen, stage))
            or _collapsed(stage, trace)
            or _suddenly_grown(seen, stage),
            _non_finite(stage, trace),
            _outlier_batch(stage, trace) if stage == entry else None,
        )
        for stage, trace in traces.items()
    }


def _grown(seen: _Seen, stage: str) -> Diagnosis | None:
    """``hot``: its outputs ran away from their untrained size within the first steps."""
    start = _ran_away(seen, stage)
    if start is None:
        return None
    times = math.exp(min(700.0, seen.levels[stage][start]))
    return _hot(seen, stage, start, Finding.OUTPUTS_GREW, times=times)


def _alike(seen: _Seen, stage: str) -> Diagnosis | None:
    """``hot``: its outputs became the same for all examples."""
    start = _examples_alike(seen, stage)
    if start is None:
        return None
    share = seen.traces[stage]["example_variance"]
    numbers = {"share": float(share[start]), "first": float(share[0])}
    return _hot(seen, stage, start, Finding.OUTPUTS_ALIKE, **numbers)


def _hot(
    seen: _Seen, stage: str, start: int, finding: Finding, **numbers: float
) -> Diagnosis | None:
    step = int(seen.steps[start])
    rate = float(seen.traces[stage]["rate"][: start + 1].max())
    if not rate > 0:
        return None
    within = {"within_user_rates": seen.within_user_rates}
    return Diagnosis(stage, "hot", step, finding, {**numbers, "step": step, "rate": rate, **within})


def _suddenly_grown(seen: _Seen, stage: str) -> Diagnosis | None:
    """``collapsed``: its outputs grew all at once in the midst of training, and stayed."""
    start = _sudden_growth(seen, stage)
    if start is None:
        return None
    level, steps = seen.levels[stage], seen.steps
    times = math.exp(min(700.0, level[start] - level[start - 1]))
    numbers: dict[str, Any] = {"times": times, "begin": int(steps[start - 1])}
    numbers["end"] = int(steps[start])
    return Diagnosis(stage, "collapsed", numbers["end"], Finding.SUDDEN_GROWTH, numbers)


def _collapsed(stage: str, trace: Trace) -> Diagnosis | None:
    """``collapsed``: most of its outputs are near zero against their own RMS."""
    share = trace["near_zero_present"]
    ill = (share > COLLAPSED) & (share > 2 * share[0])
    if len(ill) < 3 or not ill[-3:].all():
        return None
    start = int(np.flatnonzero(~ill)[-1]) + 1  # the first reading is never ill
    numbers = {"share": float(share[-1]), "first": float(share[0])}
    return Diagnosis(stage, "collapsed", int(trace["step"][start]), Finding.NEAR_ZERO, numbers)


def _non_finite(stage: str, trace: Trace) -> Diagnosis | None:
    """``non-finite``: NaN or infinite activations were seen."""
    bad = trace["nonfinite"]
    if not bad.any():
        return None
    first = int(np.flatnonzero(bad)[0])
    step, numbers = int(trace["step"][first]), {"nonfinite": int(bad[first])}
    return Diagnosis(stage, "non-finite", step, Finding.NON_FINITE, numbers)


def _outlier_batch(stage: str, trace: Trace) -> Diagnosis | None:
    """``bad batch``: the outputs of one forward were out of line."""
    at = _outlier_forward(trace)
    if at is None:
        return None
    peak, steps = trace["peak_rms"], trace["step"]
    begin = int(steps[at - 1]) + 1
    numbers = {
        "peak": float(peak[at]),
        "before": float(np.nanmax(peak[:at])),
        "after": float(peak[at + 1]),
        "begin": begin,
        "end": int(steps[at]),
    }
    return Diagnosis(stage, "bad batch", begin, Finding.OUTLIER_BATCH, numbers)


# The detectors


def _times_median(traces: Traces, stage: str) -> float:
    """The first rate of a stage over the median of all; 1 for the last stage.

    A head may have many times the rate of the rest, as in fine-tuning, and its outputs grow
    more than all others in any training.
    """
    rates = [float(trace["rate"][0]) for trace in traces.values()]
    middle = float(np.median(rates))
    own = float(traces[stage]["rate"][0])
    return own / middle if middle > 0 and stage != list(traces)[-1] else 1.0


def _ran_away(seen: _Seen, stage: str) -> int | None:
    """Index of the first reading at which a stage was away from where it began, or None.

    Twice within the first steps: its outputs were 40 times as large as untrained (less, where
    its rate stands out), or, where they are bounded, at their bounds. Or, a little later,
    they grew twelvefold from one reading to the next, and stayed.
    """
    steps, level = seen.steps, seen.levels[stage]
    share = seen.traces[stage]["near_zero_present"]
    times = _times_median(seen.traces, stage)
    bound = AWAY if times < OUTSTANDING else AWAY_ALONE if times < FAR_OUT else MOVED_ALONE
    away = np.flatnonzero((level > bound) & (steps <= steps[0] + START))
    if len(away) >= 2:
        return int(away[0])
    rest = np.abs(np.diff(level, prepend=np.nan)) < BOUND_REST
    at_bounds = (level > BOUND_LEVEL) & (share > max(BOUND_SHARE, 2 * share[0])) & rest
    early = np.flatnonzero(steps <= steps[0] + EARLY)
    if steps[early[-1]] >= steps[0] + SETTLED and at_bounds[early[-3:]].all():
        return int(np.flatnonzero(at_bounds)[0])
    return _jump(steps, level, JUMP, 1, steps[0] + EARLY)


def _examples_alike(seen: _Seen, stage: str) -> int | None:
    """Index of the first reading from which on all outputs of a stage were alike, or None.

    From there to `YOUNG` steps after the first reading, at four readings at least, its example
    variance was a hundredth of the untrained, while outputs below the head grew almost fourfold.
    """
    *below, head = seen.traces
    begun = seen.steps[0]
    early = seen.steps <= begun + YOUNG
    if stage == head or seen.steps[early][-1] < begun + SETTLED:
        return None
    share = seen.traces[stage]["example_variance"][early]
    told = np.flatnonzero(~(share < ALIKE * share[0]))  # one that was not read is no evidence
    first = int(told[-1]) + 1
    if not share[0] >= VARIED or len(share) - first < 4:
        return None
    top = max(np.nanmax(seen.levels[s][early], initial=-np.inf) for s in below)
    return first if top > GREW else None


def _sudden_growth(seen: _Seen, stage: str) -> int | None:
    """Index of the first reading of a sudden growth in the midst of training, or None."""
    steps = seen.steps
    first = int(np.searchsorted(steps, steps[0] + EARLY, side="right"))
    return _jump(steps, seen.levels[stage], BREAK, max(1, first), math.inf)


def _jump(steps: np.ndarray, level: np.ndarray, size: float, first: int, last: float) -> int | None:
    """The first index at which the level rose by ``size`` over its neighbours, and stayed."""
    for i in range(max(2, first), len(level) - 1):
        if steps[i] > last or steps[i] - steps[i - 1] > max(NEAR, NEAR_SHARE * steps[i]):
            continue
        before = level[max(0, i - 3) : i]
        if not np.isfinite(before).any():
            continue
        if min(level[i], level[i + 1]) - np.nanmax(before) > size:
            return i
    return None


def _outlier_forward(trace: Trace) -> int | None:
    """Index of the first reading up to which one forward was out of line, or None.

    Its RMS was not finite, while what was read at the readings was; or it was ten times that of any
    forward before, and by more than these differ, and of those up to the next reading. Growth
    that stays is not meant, nor what comes with a sudden rise of the rate.
    """
    steps, peak = trace["step"], trace["peak_rms"]
    broken = trace["nonfinite"]
    rate = trace["rate"] * np.nan_to_num(trace["scale"], nan=1.0)
    for i in np.flatnonzero(peak[:-1] > STRAY * peak[1:]):
        before = peak[:i][np.isfinite(peak[:i]) & (peak[:i] > 0)]
        if steps[i] < steps[0] + SETTLED or len(before) < STRAY_AFTER or broken[: i + 2].any():
            continue
        if rate[i - 1 : i + 2].max() > RATE_JUMP * rate[i - 3 : i - 1].max():
            continue
        if peak[i] > before.max() * max(STRAY, math.exp(STRAY_ERRORS * np.log(before).std())):
            return int(i)
    return None
