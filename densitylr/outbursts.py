"""What outputs that got out of hand look like, in sentences. Pure: a history in."""

from __future__ import annotations

import math

import numpy as np

from densitylr.history import History
from densitylr.motion import fell_mute, levels, lost_hold, ran_away, strayed
from densitylr.records import Diagnosis

__all__ = ["COLLAPSED", "bad_batch", "broken", "collapsed", "hot", "mute", "nonfinite"]

COLLAPSED = 0.6
"""Near-zero share, against a stage's own present RMS, above which it has collapsed."""

CURE = "a lower rate does not bring it back: go back to a checkpoint before it, with a lower rate"


def hot(history: History, stage: str, mode: str) -> Diagnosis | None:
    start = ran_away(history, stage)
    if start is None:
        return None
    size = math.exp(min(700.0, levels(history, stage)[start]))
    return _too_high(
        history, stage, mode, start, f"its outputs are {size:.3g} times their untrained size"
    )


def mute(history: History, stage: str, mode: str) -> Diagnosis | None:
    start = fell_mute(history, stage)
    if start is None:
        return None
    variety = history.series(stage, "variety")
    return _too_high(
        history,
        stage,
        mode,
        start,
        f"its outputs are the same for all examples: {variety[start]:.2%} of their mean square "
        f"depends on the example, {variety[0]:.0%} untrained,",
    )


def _too_high(
    history: History, stage: str, mode: str, start: int, evidence: str
) -> Diagnosis | None:
    step, rate = history.steps[start], history.series(stage, "rate")[: start + 1].max()
    if not rate > 0:
        return None
    remedy = "lower the rate"
    if mode == "repair":
        remedy = "repair takes no rate below yours: lower it, or use mode='warmup'"
    evidence = f"{evidence} after {step} steps at rate {rate:.1e}"
    return Diagnosis(stage, "hot", int(step), evidence, remedy)


def broken(history: History, stage: str) -> Diagnosis | None:
    start = lost_hold(history, stage)
    if start is None:
        return None
    level = levels(history, stage)
    times = math.exp(min(700.0, level[start] - level[start - 1]))
    return Diagnosis(
        stage,
        "collapsed",
        int(history.steps[start]),
        f"its outputs grew {times:.3g} times from step {history.steps[start - 1]} to step "
        f"{history.steps[start]}, and stayed there",
        CURE,
    )


def collapsed(history: History, stage: str) -> Diagnosis | None:
    share = history.series(stage, "near_zero_present")
    ill = (share > COLLAPSED) & (share > 2 * share[0])
    if len(ill) < 3 or not ill[-3:].all():
        return None
    start = int(np.flatnonzero(~ill)[-1]) + 1  # the first reading is never ill
    return Diagnosis(
        stage,
        "collapsed",
        int(history.steps[start]),
        f"{share[-1]:.0%} of its outputs are below a tenth of their own RMS, {share[0]:.0%} at "
        "first",
        CURE,
    )


def nonfinite(history: History, stage: str) -> Diagnosis | None:
    bad = history.series(stage, "nonfinite")
    if not bad.any():
        return None
    first = int(np.flatnonzero(bad)[0])
    return Diagnosis(
        stage,
        "non-finite",
        int(history.steps[first]),
        f"{int(bad[first])} NaN or infinite activations at one probe",
        "a lower rate or gradient clipping, from a checkpoint before it",
    )


def bad_batch(history: History, stage: str) -> Diagnosis | None:
    at = strayed(history, stage)
    if at is None:
        return None
    peak, steps = history.series(stage, "peak"), history.steps
    return Diagnosis(
        stage,
        "bad batch",
        int(steps[at - 1]) + 1,
        f"the RMS of its outputs was {peak[at]:.3g} in a forward of steps {steps[at - 1] + 1} to "
        f"{steps[at]}, at most {np.nanmax(peak[:at]):.3g} before and {peak[at + 1]:.3g} after",
        "look at the data of these steps; such a batch fills the optimizer's averages and the "
        "running statistics of batch norm for long, so go back to a checkpoint before it",
    )
