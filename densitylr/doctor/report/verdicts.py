"""What state each stage of a watched model is in, and on what evidence: numbers to words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from densitylr.diagnosis import STILL_STEPS, has_moved
from densitylr.doctor.watch import Observer
from densitylr.history import EARLY, LIFT_OFF, Diagnosis, Finding

__all__ = ["FINE", "ILL", "StageVerdict", "states", "verdict"]

ILL = ("non-finite", "collapsed", "hot", "dead", "starved", "left out", "bad batch", "bad gain")
"""The states that need an action, worst first."""

FINE = ("learning", "repaired")

STILL = 0.01
"""Displacement that a stage with a twin stays below as long as it learns nothing at all."""

FEW = 4
"""Readings below which nothing can be said of a stage that has not lifted off."""


@dataclass(frozen=True)
class StageVerdict:
    """One stage at the end of a run.

    Attributes:
        stage: its name.
        word: one of `ILL`, ``"slow"``, ``"frozen"``, ``"unsure"``, ``"not judged"``, or one of
            `FINE`.
        evidence: the numbers it rests on.
        density: its near-zero density over time, float64 ``[readings]``, NaN where unread.
        rate: the largest learning rate it had at any reading.
        lifted: the step at which it had lifted off, or None.
        diagnosis: what `DensityLR.diagnose` says of it, the worst first; None where nothing.
    """

    stage: str
    word: str
    evidence: str
    density: np.ndarray
    rate: float
    lifted: int | None
    diagnosis: Diagnosis | None


def states(observer: Observer) -> list[StageVerdict]:
    """One `StageVerdict` a stage, in the model's order; empty if nothing was read."""
    if not len(observer.history):
        return []
    worst: dict[str, Diagnosis] = {}
    for found in sorted(observer.diagnose(), key=lambda d: _severity(d.kind)):
        worst.setdefault(found.stage, found)
    traces = observer.history.traces()
    run = _Run(
        observer,
        traces,
        {name: _lifted(trace) for name, trace in traces.items()},
        {name: _peak_rate(trace) for name, trace in traces.items()},
        sum(found.kind == "hot" for found in worst.values()),
    )
    return [_state(run, name, worst.get(name)) for name in traces]


def verdict(observer: Observer, found: list[StageVerdict]) -> str:
    """One sentence for the whole model."""
    n = len(found)
    if not found:
        return (
            f"{observer.steps} steps, but no training forward of its layers was seen: no diagnosis"
        )
    ill = [s for s in found if s.word in ILL]
    unsure = [s for s in found if s.word == "unsure"]
    frozen = [s for s in found if s.word == "frozen"]
    if ill:
        kinds = {s.word: [t.stage for t in ill if t.word == s.word] for s in ill}
        words = "; ".join(
            f"{_some(names)} {'is' if len(names) == 1 else 'are'} {_adjective(word)}"
            for word, names in sorted(kinds.items(), key=lambda item: _severity(item[0]))
        )
        return f"{len(ill)} of {_stages(n)} {'needs' if len(ill) == 1 else 'need'} help: {words}"
    if any(s.word == "not judged" for s in found):
        return "its weights look trained already, so that low rates may be right: not judged"
    if unsure:
        return f"nothing surely wrong; unsure about {_some([s.stage for s in unsure])}"
    lifted = [s.lifted for s in found if s.word in FINE]
    slow = [s.stage for s in found if s.word == "slow"]
    if len(slow) == n:
        return "all learn, but late"
    if slow:
        return f"all learn, but {_some(slow)} late, at a rate far below the others'"
    rest = f", {_stages(len(frozen))} frozen; if that is meant, nothing to do"
    repaired = [s.stage for s in found if s.word == "repaired"]
    end = rest if frozen else "; nothing to do"
    if repaired:
        end = f", {_some(repaired)} after the rate was raised"
    if lifted and all(step is not None for step in lifted):
        last = max(step for step in lifted if step is not None)
        return f"{_all(len(lifted))} lifted off within {last} steps{end}"
    return f"{_all(len(lifted))} learning{end}"


@dataclass(frozen=True)
class _Run:
    """What the verdicts on the stages of a model rest on.

    Attributes:
        observer: of the model.
        traces: see `densitylr.History.traces`.
        lifted: the step of the first reading at which each stage had lifted off, or None.
        rates: the largest effective rate of each stage.
        hot: how many stages are.
    """

    observer: Observer
    traces: Mapping[str, Mapping[str, np.ndarray]]
    lifted: Mapping[str, int | None]
    rates: Mapping[str, float]
    hot: int


def _state(run: _Run, stage: str, found: Diagnosis | None) -> StageVerdict:
    word, evidence = _judged(run, stage, found)
    density = run.traces[stage]["near_zero"]
    return StageVerdict(stage, word, evidence, density, run.rates[stage], run.lifted[stage], found)


def _peak_rate(trace: Mapping[str, np.ndarray]) -> float:
    """The largest effective rate of a stage: a schedule may have ended at next to nothing."""
    return float(np.nanmax(trace["rate"] * np.nan_to_num(trace["scale"], nan=1.0)))


def _judged(run: _Run, stage: str, found: Diagnosis | None) -> tuple[str, str]:
    """State and evidence."""
    observer, trace, lifted = run.observer, run.traces[stage], run.lifted[stage]
    held = any(trainer.groups.get(stage) for trainer in observer.trainers)
    if found is not None:
        evidence = f"since step {found.since_step}: {found.evidence}"
        if found.finding is Finding.ZERO_RATE and not held:
            return "left out", "it can be trained, but no optimizer holds its parameters"
        if found.kind == "hot" and _is_head(run, stage) and run.hot == 1:
            return "unsure", f"{evidence}; the outputs of a head may grow so in good health"
        raised = bool((trace["scale"] > 1).any())
        if found.kind == "starved" and observer.acting and raised and lifted is not None:
            return "repaired", f"starved {evidence}; {found.action}"
        if found.kind == "starved" and not observer.acting:
            return _held_back(run, stage)
        return found.kind, evidence
    if stage in observer.excluded:
        return "not judged", observer.excluded[stage]
    read = np.isfinite(trace["displacement"])
    if not read.any():
        return "unsure", "no training forward of its layers was seen"
    density, untrained = trace["near_zero"][read], trace["untrained"][read]
    numbers = f"near-zero density {density[-1]:.3f}, untrained {untrained[-1]:.3f}"
    if lifted is not None:
        return "learning", f"lifted off at step {lifted}: {numbers}"
    if _still(trace):
        others = [f"{name} at step {step}" for name, step in run.lifted.items() if step]
        if others:
            return "starved", (
                f"its outputs are those of its untrained twin after {trace['step'][-1]} steps at "
                f"rate {run.rates[stage]:.1e}: {numbers}; lifted off: {_some(others)}"
            )
    if has_moved(trace):
        return "learning", f"moving, not yet far: {numbers}"
    if read.sum() < FEW:
        return "unsure", f"only {read.sum()} readings: {numbers}"
    return "unsure", f"its outputs changed less than they vary between batches: {numbers}"


def _held_back(run: _Run, stage: str) -> tuple[str, str]:
    """What became of a stage whose rate ``repair`` would have raised, at its own rate."""
    trace, rate, lifted = run.traces[stage], run.rates[stage], run.lifted[stage]
    last = np.flatnonzero(np.isfinite(trace["near_zero"]))[-1]
    evidence = (
        f"near-zero density {trace['near_zero'][last]:.3f}, untrained "
        f"{trace['untrained'][last]:.3f}, after {trace['step'][last]} steps at rate {rate:.1e}"
    )
    largest = max(run.rates.values())
    if largest > rate:
        evidence += f"; your largest is {largest:.1e}"
    if lifted is not None and has_moved(trace):  # not by a single output
        return "slow", f"lifted off at step {lifted} only: {evidence}"
    steps = run.observer.steps
    if steps < EARLY:
        return "unsure", f"looks starved, but {steps} steps are too few to be sure: {evidence}"
    return "starved", evidence


def _lifted(trace: Mapping[str, np.ndarray]) -> int | None:
    """The step of the first reading at which it had lifted off."""
    far = np.flatnonzero(trace["displacement"] >= LIFT_OFF)
    return int(trace["step"][far[0]]) if len(far) else None


def _still(trace: Mapping[str, np.ndarray]) -> bool:
    """Whether its outputs are those of its untrained twin, at every one of several readings."""
    moved, steps = trace["displacement"], trace["step"]
    return (
        bool(trace["twin"].all())
        and bool(steps[-1] - steps[0] >= STILL_STEPS)
        and bool((moved[np.isfinite(moved)] < STILL).all())
        and not has_moved(trace)
    )


def _is_head(run: _Run, stage: str) -> bool:
    """Whether it is the last stage, at no larger rate than another."""
    *others, last = run.traces
    rates = [run.rates[name] for name in others]
    return stage == last and bool(rates) and run.rates[stage] <= max(rates)


def _severity(kind: str) -> int:
    return ILL.index(kind) if kind in ILL else len(ILL)


def _adjective(word: str) -> str:
    return {"bad gain": "badly scaled", "bad batch": "given a bad batch"}.get(word, word)


def _stages(n: int) -> str:
    return "1 stage" if n == 1 else f"{n} stages"


def _all(n: int) -> str:
    return {1: "the one stage", 2: "both stages"}.get(n, f"all {n} stages")


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
