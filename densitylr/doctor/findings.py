"""Everything that was found in a run: what the terminal and the page show."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from densitylr.doctor.advice import Advice, advise
from densitylr.doctor.finding import Finder
from densitylr.doctor.states import StageState, states, verdict
from densitylr.doctor.watching import Watch
from densitylr.history import History

__all__ = ["Findings", "Patient", "findings"]


@dataclass(frozen=True)
class Patient:
    """One model.

    Attributes:
        name: what the script calls it.
        title: that with its class, its optimizers and their steps.
        verdict: one sentence on the whole.
        stages: the state of each stage, in the model's order.
        advice: what to do, worst first.
        history: all readings.
        acting: whether a `DensityLR` carried out the decisions in it.
    """

    name: str
    title: str
    verdict: str
    stages: list[StageState]
    advice: list[Advice]
    history: History
    acting: bool


@dataclass(frozen=True)
class Findings:
    """A run: what it was, its models, and what could not be followed."""

    headline: str
    command: str
    patients: list[Patient]
    notes: list[str]


def findings(finder: Finder, command: str, ending: str) -> Findings:
    """Put into words what a finder has seen.

    Args:
        finder: what watched the run.
        command: the command that was watched.
        ending: how it ended, where that was not as usual: ``"interrupted"``, …; else empty.
    """
    patients = [_patient(watch) for watch in finder.watches]
    ended = f", {ending}" if ending else ""
    notes = [*finder.notes, *(note for watch in finder.watches for note in watch.notes)]
    if patients:
        models = "1 model" if len(patients) == 1 else f"{len(patients)} models"
        headline = f"{command}{ended}: {models} trained"
    else:
        headline = f"{command}{ended}: no diagnosis, as {_why_none(finder)}"
    return Findings(headline, command, patients, notes)


def _patient(watch: Watch) -> Patient:
    found = states(watch)
    steps = "1 step" if watch.steps == 1 else f"{watch.steps} steps"
    kinds = " and ".join(dict.fromkeys(t.kind for t in watch.trainers)) or "an optimizer"
    kind = "" if watch.name == watch.kind else f" ({watch.kind})"
    mode = f", DensityLR in mode {watch.mode!r}" if watch.acting else ""
    title = f"{watch.name}{kind}, {steps} of {kinds}{mode}"
    return Patient(
        watch.name,
        title,
        verdict(watch, found),
        found,
        advise(watch, found),
        watch.history,
        watch.acting,
    )


def _why_none(finder: Finder) -> str:
    if finder.steps:
        return "no model could be watched"
    if finder.made:
        return "its optimizer took no step in this process"
    if "fastai.optimizer" in sys.modules:
        return (
            "fastai's own optimizers are no torch.optim.Optimizer and cannot be followed: give the "
            "Learner opt_func=partial(OptimWrapper, opt=torch.optim.Adam)"
        )
    return (
        "it made no torch optimizer in this process (what is trained in child processes, or by "
        "an optimizer that is not a torch.optim.Optimizer, is not seen)"
    )
