"""Everything that was found in a run: what the terminal and the page show."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from densitylr.doctor.report.advice import Advice, advise
from densitylr.doctor.report.verdicts import StageVerdict, states, verdict
from densitylr.doctor.watch import ModelDiscovery, Observer
from densitylr.history import History

__all__ = ["ModelReport", "Report", "report"]


@dataclass(frozen=True)
class ModelReport:
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
    stages: list[StageVerdict]
    advice: list[Advice]
    history: History
    acting: bool


@dataclass(frozen=True)
class Report:
    """A run: what it was, its models, and what could not be followed."""

    headline: str
    command: str
    models: list[ModelReport]
    notes: list[str]


def report(discovery: ModelDiscovery, command: str, ending: str) -> Report:
    """Put into words what a discovery has seen.

    Args:
        discovery: what watched the run.
        command: the command that was watched.
        ending: how it ended, where that was not as usual: ``"interrupted"``, …; else empty.
    """
    models = [_model_report(observer) for observer in discovery.observers]
    ended = f", {ending}" if ending else ""
    notes = [
        *discovery.notes,
        *(note for observer in discovery.observers for note in observer.notes),
    ]
    if models:
        trained = "1 model" if len(models) == 1 else f"{len(models)} models"
        headline = f"{command}{ended}: {trained} trained"
    else:
        headline = f"{command}{ended}: no diagnosis, as {_why_none(discovery)}"
    return Report(headline, command, models, notes)


def _model_report(observer: Observer) -> ModelReport:
    found = states(observer)
    steps = "1 step" if observer.steps == 1 else f"{observer.steps} steps"
    kinds = " and ".join(dict.fromkeys(t.kind for t in observer.trainers)) or "an optimizer"
    kind = "" if observer.name == observer.kind else f" ({observer.kind})"
    mode = f", run by DensityLR with {observer.acting}" if observer.acting else ""
    title = f"{observer.name}{kind}, {steps} of {kinds}{mode}"
    return ModelReport(
        observer.name,
        title,
        verdict(observer, found),
        found,
        advise(observer, found),
        observer.history,
        bool(observer.acting),
    )


def _why_none(discovery: ModelDiscovery) -> str:
    if discovery.steps:
        return "no model could be watched"
    if discovery.made:
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
