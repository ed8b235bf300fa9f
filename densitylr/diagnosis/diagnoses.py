"""From the history to diagnoses: which stage is ill, of what, and on what evidence."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from densitylr.diagnosis.divergence import find_diverged
from densitylr.diagnosis.drift import Trace, Traces, all_levels, all_moved
from densitylr.history import LIFT_OFF, Cause, Decision, Diagnosis, Finding, History

__all__ = ["STILL_STEPS", "diagnose"]

STILL_STEPS = 35
"""Steps after which a stage that has not moved is not merely slow: the last reading before 40."""

STARVED = 8.0
"""Raise of a rate above which its stage was starved; a smaller one only helped it along."""


def diagnose(
    history: History,
    *,
    within_user_rates: bool = True,
    frozen: Collection[str] = (),
    excluded: Collection[str] = (),
    bad_gains: Mapping[str, str] | None = None,
    observe_only: bool = False,
) -> list[Diagnosis]:
    """Name the ill stages, in the model's order; no stage twice with the same kind.

    ``frozen``: no parameter can be trained, or the user's rate is zero.
    ``bad gain``: its initial weights are far larger or smaller than customary.
    ``dead``: all of its gradients are exactly zero, at the last two readings.
    ``starved``: under a policy that keeps within the user's rates, the stage stayed untrained, or
    near to it, while others had a larger rate, and its rate was raised more than eightfold; or no
    stage at all has moved, for which such a policy has no remedy. A low rate of a stage that was
    trained before is no illness.
    ``hot``: within the first steps its outputs ran away from their untrained scale (not judged
    where the initial gain was bad); or, while outputs below the head grew, they became the same
    for all examples.
    ``collapsed``: more than 60 % of the outputs are near zero against their own RMS, at the last
    three readings, and at least twice as many as at the first; or, in the midst of training, the
    outputs grew more than 4.5-fold from one reading to the next, and stayed. A stage that is hot
    is not called collapsed, too.
    ``non-finite``: NaN or infinite activations were seen.
    ``bad batch``, of the stage where the data come in: in the midst of training its outputs were
    more than ten times as large as ever in a single forward, or not finite.

    Where ``recover`` saw a collapse, that stage is ``collapsed`` on its evidence, with what was
    done about it, instead of hot or collapsed by these rules; and they leave out the readings
    that belong to that collapse, of all stages.

    Args:
        history: readings and decisions, as `DensityLR` records them.
        within_user_rates: of the policy that took the decisions, see `densitylr.policy.Policy`.
        frozen: stages without a trainable parameter.
        excluded: stages that the policy leaves alone, as they were trained before.
        bad_gains: stages whose initial weights are of an unusual spread, with the numbers.
        observe_only: the decisions were not carried out.
    """
    recovered = _recovered(history.decisions)
    history = _without_collapses(history)
    traces, decisions = history.traces(), history.decisions
    if not history.readings:
        return list(recovered.values())
    bad_gains, level = bad_gains or {}, all_levels(traces)
    still: set[str] = set()
    if _quiet(traces, decisions):
        still = _still_stages(traces, all_moved(traces), excluded)
    diverged = find_diverged(
        traces, level, within_user_rates=within_user_rates, bad_gains=bad_gains
    )
    found: list[Diagnosis | None] = []
    for stage, trace in traces.items():
        starved = _starved(stage, trace, decisions, observe_only) if within_user_rates else None
        if starved is None and stage in still:
            starved = _still(stage, traces, level[stage], within_user_rates)
        found += [
            _frozen(stage, trace, stage in frozen),
            _bad_gain(stage, trace, bad_gains[stage]) if stage in bad_gains else None,
            _dead(stage, trace),
            starved,
            recovered.get(stage) or diverged[stage].hot_or_collapsed,
            diverged[stage].non_finite,
            diverged[stage].outlier_batch,
        ]
    return [diagnosis for diagnosis in found if diagnosis is not None]


def _recovered(decisions: list[Decision]) -> dict[str, Diagnosis]:
    """What ``recover`` saw of stages first, and did about it last."""
    found = {}
    for stage in dict.fromkeys(d.stage for d in decisions if d.kind == "recover"):
        events = [d for d in decisions if (d.stage, d.kind) == (stage, "recover")]
        first, last = events[0], events[-1]
        numbers = {"first": first, "last": last, "times": len(events)}
        found[stage] = Diagnosis(stage, "collapsed", _since(first), Finding.RECOVERED, numbers)
    return found


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


def _frozen(stage: str, trace: Trace, untrainable: bool) -> Diagnosis | None:
    rates, steps = trace["rate"], trace["step"]
    if not untrainable and rates[-1] != 0:
        return None
    finding = Finding.UNTRAINABLE if untrainable else Finding.ZERO_RATE
    trained = np.flatnonzero(rates != 0) if not untrainable else np.array([], int)
    since = steps[trained[-1] + 1] if len(trained) else steps[0]
    return Diagnosis(stage, "frozen", int(since), finding)


def _bad_gain(stage: str, trace: Trace, weights: str) -> Diagnosis:
    since = int(trace["step"][0])
    return Diagnosis(stage, "bad gain", since, Finding.BAD_GAIN, {"weights": weights})


def _dead(stage: str, trace: Trace) -> Diagnosis | None:
    zero = trace["zero_gradient"] > 0
    if len(zero) < 2 or not zero[-2:].all():
        return None
    rate = trace["rate"][-1]
    if rate == 0:
        return None  # frozen says it
    start = int(np.flatnonzero(~zero)[-1]) + 1 if not zero.all() else 0
    numbers = {"readings": int(zero[start:].sum()), "rate": float(rate)}
    since = int(trace["step"][start])
    return Diagnosis(stage, "dead", since, Finding.ZERO_GRADIENT, numbers)


def _starved(
    stage: str, trace: Trace, decisions: list[Decision], observe_only: bool
) -> Diagnosis | None:
    own = [d for d in decisions if d.stage == stage and d.kind != "recover"]
    changes = [d for d in own if d.scale != d.scale_before]
    if max((d.scale for d in changes), default=1.0) <= STARVED:
        return None
    first, last = changes[0], changes[-1]
    if last.scale <= STARVED and last.cause is Cause.UNTRUSTED_MAXIMUM:
        return None  # it was raised only towards a rate that is too high
    lifted = [d for d in own if d.kind == "lift-off"]
    moved = trace["displacement"][trace["step"] < first.step]
    yours = last.rate / last.scale
    numbers = {
        "first": first,
        "last": last,
        "changes": len(changes),
        "observe_only": observe_only,
        "lifted_at": lifted[0].step if lifted else None,
        "lifted_before": bool((moved >= LIFT_OFF).any()),  # at its own rate, which is no decision
        "schedule_changed": not 0.5 < yours * first.scale_before / first.rate_before < 2,
    }
    return Diagnosis(stage, "starved", first.step, Finding.RAISED, numbers)


def _quiet(traces: Traces, decisions: list[Decision]) -> bool:
    """Whether there were enough steps since the policy last decided something."""
    steps = next(iter(traces.values()))["step"]
    acted = [d.step for d in decisions if d.kind != "recover"]
    return bool(steps[-1] - max(acted, default=steps[0]) >= STILL_STEPS)


def _still_stages(traces: Traces, moved: set[str], excluded: Collection[str]) -> set[str]:
    """The stages that could move, where none of them has ever moved."""
    able = {name for name, trace in traces.items() if name not in excluded and _can_move(trace)}
    if any(traces[name]["rate"][-1] > traces[name]["rate"][0] for name in able):
        return set()  # a warm-up is under way
    read = all(np.isfinite(traces[name]["displacement"]).any() for name in able)
    return able if read and not able & moved else set()


def _can_move(trace: Trace) -> bool:
    return bool(trace["rate"][-1] > 0 and not trace["zero_gradient"][-2:].all())


def _still(stage: str, traces: Traces, level: np.ndarray, within_user_rates: bool) -> Diagnosis:
    trace = traces[stage]
    steps = trace["step"]
    numbers = {
        "steps": int(steps[-1] - steps[0]),
        "moved": float(np.nanmax(level) - np.nanmin(level)),
        "rate": float(trace["rate"][-1]),
        "largest": float(max(other["rate"][-1] for other in traces.values())),
        "within_user_rates": within_user_rates,
    }
    return Diagnosis(stage, "starved", int(steps[0]), Finding.NOTHING_MOVES, numbers)
