"""What state each stage of a watched model is in, and on what evidence: numbers to words."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from densitylr.cadence import EARLY
from densitylr.diagnosis import STILL_STEPS
from densitylr.doctor.watching import Watch
from densitylr.history import History
from densitylr.liftoff import LiftOff
from densitylr.motion import has_moved
from densitylr.records import Diagnosis

__all__ = ["FINE", "ILL", "StageState", "peak_rate", "states", "verdict"]

ILL = ("non-finite", "collapsed", "hot", "dead", "starved", "left out", "bad batch", "bad gain")
"""The states that ask for something, worst first."""

FINE = ("learning", "repaired")

STILL = 0.01
"""Displacement that a stage with a twin stays below as long as it learns nothing at all."""

FEW = 4
"""Readings below which nothing can be said of a stage that has not lifted off."""


@dataclass(frozen=True)
class StageState:
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


def states(watch: Watch) -> list[StageState]:
    """One `StageState` a stage, in the model's order; empty if nothing was read."""
    if not len(watch.history):
        return []
    worst: dict[str, Diagnosis] = {}
    for found in sorted(watch.diagnose(), key=lambda d: _severity(d.kind)):
        worst.setdefault(found.stage, found)
    hot = sum(found.kind == "hot" for found in worst.values())
    return [_state(watch, name, worst.get(name), hot) for name in watch.history.stages]


def verdict(watch: Watch, found: list[StageState]) -> str:
    """One sentence for the whole model."""
    n = len(found)
    if not found:
        return f"{watch.steps} steps, but no training forward of its layers was seen: no diagnosis"
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


def _state(watch: Watch, stage: str, found: Diagnosis | None, hot: int) -> StageState:
    history = watch.history
    lifted = _lifted(history, stage)
    word, evidence = _judged(watch, stage, found, lifted, hot)
    return StageState(
        stage,
        word,
        evidence,
        history.series(stage, "near_zero"),
        peak_rate(history, stage),
        lifted,
        found,
    )


def peak_rate(history: History, stage: str) -> float:
    """The largest effective rate of a stage: a schedule may have ended at next to nothing."""
    scale = np.nan_to_num(history.series(stage, "scale"), nan=1.0)
    return float(np.nanmax(history.series(stage, "rate") * scale))


def _judged(
    watch: Watch, stage: str, found: Diagnosis | None, lifted: int | None, hot: int
) -> tuple[str, str]:
    """State and evidence; ``hot``: how many stages are."""
    history = watch.history
    held = any(trainer.groups.get(stage) for trainer in watch.trainers)
    if found is not None:
        evidence = f"since step {found.since_step}: {found.evidence}"
        if found.kind == "frozen" and found.evidence.startswith("its learning rate") and not held:
            return "left out", "it can be trained, but no optimizer holds its parameters"
        if found.kind == "hot" and _is_head(history, stage) and hot == 1:
            return "unsure", f"{evidence}; the outputs of a head may grow so in good health"
        raised = bool((history.series(stage, "scale") > 1).any())
        if found.kind == "starved" and watch.acting and raised and lifted is not None:
            return "repaired", f"starved {evidence}; {found.action}"
        if found.kind == "starved" and not watch.acting:
            return _held_back(watch, stage, lifted)
        return found.kind, evidence
    if stage in watch.kept:
        return "not judged", watch.kept[stage]
    read = np.isfinite(history.series(stage, "displacement"))
    if not read.any():
        return "unsure", "no training forward of its layers was seen"
    density = history.series(stage, "near_zero")[read]
    untrained = history.series(stage, "untrained")[read]
    numbers = f"near-zero density {density[-1]:.3f}, untrained {untrained[-1]:.3f}"
    if lifted is not None:
        return "learning", f"lifted off at step {lifted}: {numbers}"
    if _still(history, stage):
        others = [
            f"{name} at step {step}" for name in history.stages if (step := _lifted(history, name))
        ]
        if others:
            return "starved", (
                f"its outputs are those of its untrained twin after {history.steps[-1]} steps at "
                f"rate {peak_rate(history, stage):.1e}: {numbers}; lifted off: {', '.join(others)}"
            )
    if has_moved(history, stage):
        return "learning", f"moving, not yet far: {numbers}"
    if read.sum() < FEW:
        return "unsure", f"only {read.sum()} readings: {numbers}"
    return "unsure", f"not moved by more than its batches differ: {numbers}"


def _held_back(watch: Watch, stage: str, lifted: int | None) -> tuple[str, str]:
    """What came of a stage whose rate ``repair`` would have raised, as nobody did."""
    history = watch.history
    near, untrained = (history.series(stage, name) for name in ("near_zero", "untrained"))
    last = np.flatnonzero(np.isfinite(near))[-1]
    evidence = (
        f"near-zero density {near[last]:.3f}, untrained {untrained[last]:.3f}, after "
        f"{history.steps[last]} steps at rate {peak_rate(history, stage):.1e}"
    )
    largest = max(peak_rate(history, name) for name in history.stages)
    if largest > peak_rate(history, stage):
        evidence += f"; your largest is {largest:.1e}"
    if lifted is not None and has_moved(history, stage):  # not by a single output
        return "slow", f"lifted off at step {lifted} only: {evidence}"
    if watch.steps < EARLY:
        return (
            "unsure",
            f"looks starved, but {watch.steps} steps are too few to be sure: {evidence}",
        )
    return "starved", evidence


def _lifted(history: History, stage: str) -> int | None:
    """The step of the first reading with the displacement that the law calls lift-off."""
    far = np.flatnonzero(history.series(stage, "displacement") >= LiftOff().healthy)
    return int(history.steps[far[0]]) if len(far) else None


def _still(history: History, stage: str) -> bool:
    """Whether it answers as its untrained twin does, by every reading of a whole while."""
    twins = all(r.stages[stage].estimator == "twin" for r in history.readings)
    moved = history.series(stage, "displacement")
    return (
        twins
        and history.steps[-1] - history.steps[0] >= STILL_STEPS
        and bool((moved[np.isfinite(moved)] < STILL).all())
        and not has_moved(history, stage)
    )


def _is_head(history: History, stage: str) -> bool:
    """Whether it is the last stage, at no larger rate than another."""
    *others, last = history.stages
    rates = [peak_rate(history, name) for name in others]
    return stage == last and bool(rates) and peak_rate(history, stage) <= max(rates)


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
