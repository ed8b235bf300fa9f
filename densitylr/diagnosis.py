"""From the history to sentences: which stage is ill, of what, and on what evidence."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from densitylr.heat import DOUBT
from densitylr.history import History
from densitylr.liftoff import LiftOff
from densitylr.motion import has_moved, levels
from densitylr.outbursts import bad_batch, broken, collapsed, hot, mute, nonfinite
from densitylr.records import Decision, Diagnosis

__all__ = ["diagnose"]

STILL_STEPS = 35
"""Steps after which a stage that has not moved is not merely slow: the last probe before 40."""

STARVED = 8.0
"""Raise of a rate above which its stage was starved; a smaller one only helped it along."""


def diagnose(
    history: History,
    *,
    mode: str = "repair",
    frozen: Collection[str] = (),
    kept: Collection[str] = (),
    gains: Mapping[str, str] | None = None,
    observe_only: bool = False,
) -> list[Diagnosis]:
    """Name the ill stages, in the model's order; no stage twice with the same kind.

    ``frozen``: no parameter can be trained, or the user's rate is zero.
    ``bad gain``: its initial weights are far larger or smaller than customary.
    ``dead``: all of its gradients are exactly zero, at the last two probes.
    ``starved``: in ``repair``, the stage stayed untrained, or near to it, while others had a larger
    rate, and its rate was raised more than eightfold; or no stage at all has moved, for which
    ``repair`` has no remedy. Of stages that were trained before, a low rate is no illness.
    ``hot``: within the first steps its outputs ran away from their untrained scale (not judged
    where the initial gain was bad); or, while outputs below the head grew, they became the same
    for all examples.
    ``collapsed``: more than 60 % of the outputs are near zero against their own RMS, at the last
    three probes, and at least twice as many as at the first; or, in the midst of training, the
    outputs grew more than 4.5-fold from one probe to the next, and stayed. A stage that is hot
    is not called collapsed, too.
    ``non-finite``: NaN or infinite activations were seen.
    ``bad batch``, of the stage where the data come in: in the midst of training its outputs were
    more than ten times as large as ever in a single forward, or not finite.

    Where ``recover`` saw a collapse, that stage is ``collapsed`` on its evidence, with what was
    done about it, instead of hot or collapsed by these rules; and they leave out the readings
    that belong to that collapse, of all stages.

    Args:
        history: readings and decisions, as `DensityLR` records them.
        mode: the mode of the policy that took the decisions.
        frozen: stages without a trainable parameter.
        kept: stages that the policy leaves alone, as they were trained before.
        gains: stages whose initial weights are of an unusual spread, with the numbers.
        observe_only: the decisions were not carried out.
    """
    found: list[Diagnosis] = []
    recovered = {stage: _recovered(history, stage) for stage in history.stages}
    history = _without_collapses(history)
    if not history.readings:
        return [d for d in recovered.values() if d is not None]
    gains, all_still = gains or {}, _all_still(history, kept)
    watched = (s for s in history.stages if not np.isnan(history.series(s, "peak")).all())
    entry = next(watched, None)
    for stage in history.stages:
        own = [
            _frozen(history, stage, stage in frozen),
            _bad_gain(history, stage, gains[stage]) if stage in gains else None,
            _dead(history, stage),
            (_starved(history, stage, observe_only) if mode == "repair" else None)
            or (_still(history, stage, mode) if all_still and stage not in kept else None),
            recovered[stage]
            or (None if stage in gains else hot(history, stage, mode))
            or (None if gains else mute(history, stage, mode))
            or collapsed(history, stage)
            or broken(history, stage),
            nonfinite(history, stage),
            bad_batch(history, stage) if stage == entry else None,
        ]
        found += [d for d in own if d is not None]
    return found


def _recovered(history: History, stage: str) -> Diagnosis | None:
    """What ``recover`` saw of a stage first, and did about it last."""
    events = [d for d in history.decisions if (d.stage, d.kind) == (stage, "recover")]
    if not events:
        return None
    first, last = events[0], events[-1]
    evidence, _ = _parts(first)
    _, action = _parts(last)
    if len(events) > 1:
        evidence += f" (the first of {len(events)} times)"
        action = f"at step {last.step} {action}"
    return Diagnosis(stage, "collapsed", _since(first), evidence, action)


def _parts(event: Decision) -> tuple[str, str]:
    """The evidence and the action of a ``"recover"``."""
    evidence, _, action = event.reason.removeprefix("collapsed: ").partition("; ")
    return evidence, action


def _since(event: Decision) -> int:
    return event.step if event.since is None else event.since


def _without_collapses(history: History) -> History:
    """The history less the readings between first evidence and what ``recover`` did about it."""
    spans = [(_since(d), d.step) for d in history.decisions if d.kind == "recover"]
    if not spans:
        return history
    kept = History(history.budget)
    for reading, rates, scales in history.observations():
        if not any(first <= reading.step <= last for first, last in spans):
            kept.record(reading, rates, scales)
    kept.decisions = history.decisions
    return kept


def _frozen(history: History, stage: str, untrainable: bool) -> Diagnosis | None:
    rates = history.series(stage, "rate")
    if untrainable:
        evidence, action = "none of its parameters has requires_grad", "left alone"
    elif rates[-1] == 0:
        evidence = "its learning rate is 0"
        action = "left alone, as no scale moves a rate of 0: give it one if it is to learn"
    else:
        return None
    zero = np.flatnonzero(rates != 0) if not untrainable else np.array([], int)
    since = history.steps[zero[-1] + 1] if len(zero) else history.steps[0]
    return Diagnosis(stage, "frozen", int(since), evidence, action)


def _bad_gain(history: History, stage: str, evidence: str) -> Diagnosis:
    return Diagnosis(
        stage,
        "bad gain",
        int(history.steps[0]),
        evidence,
        "left alone, as no learning rate mends it: initialise it anew",
    )


def _dead(history: History, stage: str) -> Diagnosis | None:
    zero = history.series(stage, "zero_gradient") > 0
    if len(zero) < 2 or not zero[-2:].all():
        return None
    rate = history.series(stage, "rate")[-1]
    if rate == 0:
        return None  # frozen says it
    start = int(np.flatnonzero(~zero)[-1]) + 1 if not zero.all() else 0
    return Diagnosis(
        stage,
        "dead",
        int(history.steps[start]),
        f"all of its gradients are exactly zero at the last {int(zero[start:].sum())} probes, "
        f"at rate {rate:.1e}",
        "left alone, as no learning rate moves it: look for units that never fire after it, such "
        "as a large negative bias before a ReLU, and initialise them anew",
    )


def _starved(history: History, stage: str, observe_only: bool) -> Diagnosis | None:
    own = [d for d in history.decisions if d.stage == stage and d.kind != "recover"]
    changes = [d for d in own if d.scale != d.scale_before]
    if max((d.scale for d in changes), default=1.0) <= STARVED:
        return None
    first, last = changes[0], changes[-1]
    if last.scale <= STARVED and DOUBT in last.reason:
        return None  # it was raised only towards a rate that is too high
    lifted = [d for d in history.decisions if d.stage == stage and d.kind == "lift-off"]
    moved = history.series(stage, "displacement")[history.steps < first.step]
    evidence = f"{first.reason.split('; rate ')[0]} at rate {first.rate_before:.1e}"
    times = "1 decision" if len(changes) == 1 else f"{len(changes)} decisions"
    change = f"rate ×{last.scale:.4g} to {last.rate:.1e} in {times}"
    yours = last.rate / last.scale
    if not 0.5 < yours * first.scale_before / first.rate_before < 2:  # by a schedule
        change += f", as yours was {yours:.1e} by then"
    if observe_only:
        action = f"only observed; it would have been {change}"
    elif lifted:
        action = f"{change}; lifted off at step {lifted[0].step}"
    elif (moved >= LiftOff().healthy).any():  # at its own rate, which is no decision
        action = f"{change}; had lifted off before"
    else:
        action = f"{change}; not yet lifted off"
    return Diagnosis(stage, "starved", first.step, evidence, action)


def _all_still(history: History, kept: Collection[str]) -> bool:
    """No stage with a rate has ever moved, over enough steps since the law decided something."""
    acted = [d.step for d in history.decisions if d.kind != "recover"]
    if history.steps[-1] - max(acted, default=history.steps[0]) < STILL_STEPS:
        return False
    trained = [s for s in history.stages if s not in kept and _can_move(history, s)]
    if any(_rises(history, s) for s in trained):
        return False  # a warm-up is under way
    read = all(np.isfinite(history.series(s, "displacement")).any() for s in trained)
    return bool(trained) and read and not any(has_moved(history, s) for s in trained)


def _can_move(history: History, stage: str) -> bool:
    zero = history.series(stage, "zero_gradient")
    return bool(history.series(stage, "rate")[-1] > 0 and not zero[-2:].all())


def _rises(history: History, stage: str) -> bool:
    rates = history.series(stage, "rate")
    return bool(rates[-1] > rates[0])


def _still(history: History, stage: str, mode: str) -> Diagnosis | None:
    if not _can_move(history, stage):
        return None
    rate = history.series(stage, "rate")[-1]
    level = levels(history, stage)
    moved = np.nanmax(level) - np.nanmin(level)
    span = history.steps[-1] - history.steps[0]
    remedy = "raise the learning rate"
    if mode == "repair":
        largest = max(history.series(s, "rate")[-1] for s in history.stages)
        why = (
            "no group has a larger rate to go by" if rate == largest else "no rate is large enough"
        )
        remedy = f"{why}: {remedy}, or use mode='free'"
    return Diagnosis(
        stage,
        "starved",
        int(history.steps[0]),
        f"no stage has moved by more than its batches differ in {span} steps; the RMS of this one "
        f"against its untrained one varied by {moved:.1%} at rate {rate:.1e}",
        remedy,
    )
