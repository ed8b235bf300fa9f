"""How the outputs of a stage moved: not at all, or away all at once. Pure: a history in.

The scale of a stage's outputs, its RMS, says both more surely than the near-zero density: it
varies less from batch to batch, and it has no ceiling. Levels here are ``ln(rms / rms0)``.
"""

from __future__ import annotations

import math

import numpy as np

from densitylr.cadence import PATIENCE, YOUNG
from densitylr.history import History

__all__ = [
    "EARLY",
    "VARIED",
    "fell_mute",
    "has_moved",
    "levels",
    "lost_hold",
    "ran_away",
    "strayed",
]

CERTAIN = 3.2
"""Standard errors of a drift that is no chance; most among all stages that stood still: 2.3."""

SLIGHT, LARGE = 0.02, 0.1
"""Drift of the level that is no movement however sure, and one that is however noisy."""

PAIRED, OUTPUTS = 0.02, 3.0
"""Displacement from a twin that is movement, if it is by as many near-zero outputs …"""

PAIRED_TWICE = 0.2
"""… or, in a stage that has hardly any, as large as this at two readings."""

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
"""Growth from one probe to the next that no healthy training shows after the first steps."""

BREAK = math.log(4.5)
"""The same after `EARLY` steps, when a net has its scale."""

NEAR = 25
"""Most steps between two probes that count as neighbours …"""

NEAR_SHARE = 1 / PATIENCE
"""… or this share of the steps so far: later on probes are as far apart as that."""

SETTLED = 20
"""Steps after which a bounded output that is at its bounds will stay there."""

MUTE = 0.01
"""Variety, against the untrained, of a stage that no longer tells examples apart; healthy: 0.03."""

VARIED = 0.1
"""Variety below which a stage says nothing about the example anyway, as some do untrained."""

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


def levels(history: History, stage: str) -> np.ndarray:
    """``ln(rms / rms0)`` at each reading; NaN where nothing was read or either RMS was zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        level = np.log(history.series(stage, "rms") / history.series(stage, "rms0"))
    return np.where(np.isinf(level), np.nan, level)


def has_moved(history: History, stage: str) -> bool:
    """Whether the outputs of a stage drifted by more than batches differ; False if unread.

    A straight line is fitted to the level, to the mean and to the logarithm of the near-zero
    density. Where there is a twin, no batch is in the way, and a displacement by more than a few
    outputs suffices.
    """
    twin = np.array([r.stages[stage].estimator == "twin" for r in history.readings])
    moved = history.series(stage, "displacement")[twin]
    near_zero = (history.series(stage, "untrained") * history.series(stage, "count"))[twin]
    by_outputs = (moved > PAIRED) & (moved * near_zero > OUTPUTS)
    if by_outputs.any() or (moved > PAIRED_TWICE).sum() >= 2:
        return True
    steps = history.steps.astype(float)
    count = history.series(stage, "count")
    near = np.log((history.series(stage, "near_zero") * count + 0.5) / (count + 1))
    drift, error = _drift(steps, levels(history, stage))
    if drift >= LARGE or (drift >= SLIGHT and drift >= CERTAIN * error):
        return True
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = history.series(stage, "mean") / history.series(stage, "rms0")
    drift, error = _drift(steps, mean)
    if drift >= SLIGHT and drift >= 1.5 * CERTAIN * error:
        return True
    # A small stage counts few near-zero outputs, so that their share needs to be surer.
    drift, error = _drift(steps, near)
    return bool(drift >= LARGE and drift >= 2 * CERTAIN * error)


def _drift(steps: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """Change along the fitted line from the first to the last step, and its standard error."""
    read = np.isfinite(values)
    if read.sum() < 4:
        return 0.0, math.inf
    x, y = steps[read] - steps[read].mean(), values[read] - values[read].mean()
    slope = (x @ y) / (x @ x)
    rest = y - slope * x
    error = math.sqrt((rest @ rest) / (len(x) - 2) / (x @ x))
    span = steps[read][-1] - steps[read][0]
    return float(abs(slope) * span), float(error * span)


def _times_median(history: History, stage: str) -> float:
    """The first rate of a stage over the median of all; 1 for the last stage.

    A head may have many times the rate of the rest, as in fine-tuning, and its outputs grow
    more than all others in any training.
    """
    rates = [float(history.series(s, "rate")[0]) for s in history.stages]
    middle = float(np.median(rates))
    own = float(history.series(stage, "rate")[0])
    return own / middle if middle > 0 and stage != history.stages[-1] else 1.0


def ran_away(history: History, stage: str) -> int | None:
    """Index of the first reading at which a stage was away from where it began, or None.

    Twice within the first steps: its outputs were 40 times as large as untrained (less, where
    its rate stands out), or, where they are bounded, at their bounds. Or, a little later,
    they grew twelvefold from one probe to the next, and stayed.
    """
    steps, level = history.steps, levels(history, stage)
    share = history.series(stage, "near_zero_present")
    times = _times_median(history, stage)
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


def fell_mute(history: History, stage: str) -> int | None:
    """Index of the first reading from which on a stage told no examples apart any more, or None.

    From there to `YOUNG` steps after the first reading, at four readings at least, its variety
    was a hundredth of the untrained, while outputs below the head grew almost fourfold.
    """
    *below, head = history.stages
    begun = history.steps[0]
    early = history.steps <= begun + YOUNG
    if stage == head or history.steps[early][-1] < begun + SETTLED:
        return None
    variety = history.series(stage, "variety")[early]
    told = np.flatnonzero(~(variety < MUTE * variety[0]))  # one that was not read is no evidence
    first = int(told[-1]) + 1
    if not variety[0] >= VARIED or len(variety) - first < 4:
        return None
    top = max(np.nanmax(levels(history, s)[early], initial=-np.inf) for s in below)
    return first if top > GREW else None


def lost_hold(history: History, stage: str) -> int | None:
    """Index of the first reading of a sudden growth in the midst of training, or None."""
    steps = history.steps
    first = int(np.searchsorted(steps, steps[0] + EARLY, side="right"))
    return _jump(steps, levels(history, stage), BREAK, max(1, first), math.inf)


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


def strayed(history: History, stage: str) -> int | None:
    """Index of the first reading up to which one forward was out of line, or None.

    Its RMS was not finite, while what was read at the probes was; or it was ten times that of any
    forward before, and by more than these differ, and of those up to the next reading. Growth
    that stays is not meant, nor what comes with a sudden rise of the rate.
    """
    steps, peak = history.steps, history.series(stage, "peak")
    broken = history.series(stage, "nonfinite")
    rate = history.series(stage, "rate") * np.nan_to_num(history.series(stage, "scale"), nan=1.0)
    for i in np.flatnonzero(peak[:-1] > STRAY * peak[1:]):
        before = peak[:i][np.isfinite(peak[:i]) & (peak[:i] > 0)]
        if steps[i] < steps[0] + SETTLED or len(before) < STRAY_AFTER or broken[: i + 2].any():
            continue
        if rate[i - 1 : i + 2].max() > RATE_JUMP * rate[i - 3 : i - 1].max():
            continue
        if peak[i] > before.max() * max(STRAY, math.exp(STRAY_ERRORS * np.log(before).std())):
            return int(i)
    return None
