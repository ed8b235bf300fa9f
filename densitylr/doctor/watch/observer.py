"""Observe one model learn: what `DensityLR` would see and decide, without touching anything.

An `Observer` runs the controller's own loop with ``observe_only``. The optimizers stay untouched:
the caller reports their steps to the observer. An error in here ends the observation, never the
training.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from densitylr.controller import ControlLoop, DensityLR, StageRate, build_up_of
from densitylr.diagnosis import diagnose
from densitylr.doctor.script import Call
from densitylr.history import Diagnosis, History
from densitylr.model import Stage, untrainable
from densitylr.monitor import Baseline
from densitylr.policy import BuildUp, Observation, Repair, Scales, StageNeeds

__all__ = ["ControllerObserver", "Observer", "Trainer"]

EVERY = 5
"""Steps from one reading to the next, as in `DensityLR`; half of that in the first steps."""


@dataclass(frozen=True)
class Trainer:
    """What is remembered of an optimizer of a model, as the script may drop it.

    Attributes:
        kind: the name of its class.
        made: where the script made it, where that is known.
        groups: the numbers of the parameter groups that hold parameters of each stage.
    """

    kind: str
    made: Call | None
    groups: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, repr=False)
class _RepairEach(Repair):
    """`Repair`, for the stages of each optimizer apart: a rate of Adam says nothing about SGD's."""

    def update(self, state: Any, seen: Observation) -> tuple[Scales, Any]:
        scales: dict[str, Any] = {}
        stages = dict(state.stages)
        for kind in dict.fromkeys(view.optimizer for view in seen.stages.values()):
            own = {n: view for n, view in seen.stages.items() if view.optimizer == kind}
            part = dataclasses.replace(state, stages={n: state.stages[n] for n in own})
            found, after = super().update(part, dataclasses.replace(seen, stages=own))
            scales |= found
            stages |= after.stages
        return scales, dataclasses.replace(state, step=seen.step, stages=stages)

    def requires(self, state: Any) -> Mapping[str, StageNeeds]:
        """As `Repair`, with a twin of each stage: the report is about all of them."""
        needs = super().requires(state)
        return {n: dataclasses.replace(s, twin=s.twin or s.undecided) for n, s in needs.items()}


class _Rates:
    """The rates that the optimizers of a model give its stages, while these are there."""

    def __init__(self, stages: Mapping[str, Stage]) -> None:
        self.stages = stages
        self.optimizers: list[weakref.ref[Optimizer]] = []
        self._build_ups: dict[int, BuildUp] = {}

    def living(self) -> Iterator[Optimizer]:
        return (found for ref in self.optimizers if (found := ref()) is not None)

    def add(self, optimizer: Optimizer) -> None:
        self.optimizers.append(weakref.ref(optimizer))
        self._build_ups[id(optimizer)] = build_up_of(optimizer)

    def now(self) -> dict[str, StageRate]:
        known: dict[int, tuple[float, str]] = {}
        build_ups = {"": BuildUp()}
        for optimizer in self.living():  # a newer one takes over what an older one had
            kind = type(optimizer).__name__
            build_ups[kind] = self._build_ups[id(optimizer)]
            for group in optimizer.param_groups:
                rate = (float(group["lr"]), kind)
                known.update((id(p), rate) for p in group["params"] if p.requires_grad)
        best = {
            name: max(
                (known.get(id(p), (0.0, "")) for p in stage.parameters.values()), default=(0.0, "")
            )
            for name, stage in self.stages.items()
        }
        largest = {
            kind: max(lr for lr, k in best.values() if k == kind) for _, kind in best.values()
        }
        return {n: StageRate(lr, largest[k], k, build_ups[k]) for n, (lr, k) in best.items()}


class Observer:
    """One model and the optimizers that train it, observed from its first training forward on.

    Args:
        model: the model, not yet trained.
        name: what the script calls it.
        called: where the script called it first, where that is known.

    Attributes:
        kind: the name of the model's class.
        stages: `densitylr.Stage` by name; empty once the model is gone.
        layers: the qualified names of each stage's weight layers.
        history: every reading, and the decisions that ``repair`` would have taken.
        acting: the name of the policy that runs the rates; empty where none does.
        excluded: the stages that are not judged, as their weights are no fresh initialisation, with
            the reason.
        trainers: one `Trainer` an optimizer, in the order they were made.
        steps: optimizer steps seen.
        notes: sentences on what could not be followed.

    Raises:
        ValueError: the model cannot be divided into stages. Nothing is hooked then.
    """

    acting = ""

    def __init__(self, model: nn.Module, name: str, called: Call | None = None) -> None:
        self.name, self.kind, self.called = name, type(model).__name__, called
        self.notes: list[str] = []
        self.trainers: list[Trainer] = []
        baseline = Baseline.capture(model)
        self.stages: dict[str, Stage] = baseline.stages
        self.layers = {name: list(stage.layers) for name, stage in self.stages.items()}
        self._checks = baseline.checks
        self.excluded: Mapping[str, str] = self._checks.excluded
        self._rates = _Rates(self.stages)
        self._ascending: set[int] = set()
        self._loop: ControlLoop | None = ControlLoop(
            model,
            baseline,
            self._rates,
            _RepairEach(),
            every=EVERY,
            observe_only=True,
            ascending=self._ascending,
            quiet=True,
            on_failure=self._give_up,
        )
        self.history: History = self._loop.history
        self._steps = 0
        self._lead: weakref.ref[Optimizer] | None = None
        self._waiting: dict[int, int] = {}  # steps of others since the last one of the lead
        self._frozen: list[str] = []
        # A model that the script has let go of is not to be kept alive by who observed it.
        weakref.finalize(model, _forget, weakref.ref(self)).atexit = False

    @property
    def steps(self) -> int:
        return self._steps

    @property
    def optimizers(self) -> Iterator[Optimizer]:
        """Those that train the model and are still there, in the order they were made."""
        return self._rates.living()

    def follow(self, optimizer: Optimizer, made: Call | None = None) -> None:
        """Count the steps, and take the rates, of one more optimizer, made where it is said."""
        if any(known is optimizer for known in self.optimizers):
            return
        self._rates.add(optimizer)
        upwards = (g["params"] for g in optimizer.param_groups if g.get("maximize"))
        self._ascending.update(id(p) for group in upwards for p in group)
        self.trainers.append(_trainer(optimizer, made, self.stages))

    def before_step(self, optimizer: Optimizer) -> None:
        """To be called when the gradients of a step are there."""
        if self._loop is not None and not self._loop.monitor.closed and self._leads(optimizer):
            self._loop.before_step()

    def after_step(self, optimizer: Optimizer) -> None:
        """To be called after each step."""
        if self._lead is None:  # the model was found in the midst of this step
            self._lead = weakref.ref(optimizer)
        if self._loop is not None and self._lead() is optimizer:
            self._steps += 1
            self._loop.after_step()

    def diagnose(self) -> list[Diagnosis]:
        """As `DensityLR.diagnose`."""
        return diagnose(
            self.history,
            frozen=self._frozen or untrainable(self.stages),
            excluded=self._checks.trained,
            bad_gains=self._checks.bad_gains,
            observe_only=True,
        )

    def forget(self) -> None:
        """Let go of every part of the model; what was seen stays."""
        self._frozen = untrainable(self.stages)
        self.close()
        self._loop = None
        self.stages = self._rates.stages = {}

    def close(self) -> None:
        """Take all hooks off the model."""
        if self._loop is not None:
            self._loop.close()

    def _give_up(self, doing: str, error: Exception) -> None:
        self.notes.append(
            f"{self.name}: {doing} failed ({type(error).__name__}: {error}), so it was observed "
            f"for {self.steps} steps only; the training went on"
        )

    def _leads(self, optimizer: Optimizer) -> bool:
        """Whether this step counts: of several optimizers, one that is stepped every time."""
        lead = self._lead() if self._lead is not None else None
        if lead is not optimizer:
            waited = self._waiting[id(optimizer)] = self._waiting.get(id(optimizer), 0) + 1
            if lead is not None and waited < 2:
                return False
            self._lead = weakref.ref(optimizer)
        self._waiting.clear()
        return True


class ControllerObserver(Observer):
    """A model that a `DensityLR` runs: the doctor's, or one that the script made itself.

    Args:
        controller: it, made before the first training forward.
        name, called: as in `Observer`.
        model: the model.
        own: the script made the controller itself.
    """

    def __init__(
        self, controller: DensityLR, model: nn.Module, name: str, called: Call | None, own: bool
    ) -> None:
        self.name, self.kind, self.called = name, type(model).__name__, called
        self.controller = controller
        self.stages, self.history = controller.stages, controller.history
        self.layers = {name: list(stage.layers) for name, stage in self.stages.items()}
        self.acting = "" if controller.observe_only else type(controller.policy).__name__
        self.excluded = controller.excluded
        self.notes = [f"{name}: your script has a DensityLR already; this is its history"] * own
        self.trainers = []
        self._rates = _Rates(self.stages)
        self._steps = 0

    def follow(self, optimizer: Optimizer, made: Call | None = None) -> None:
        if not any(known is optimizer for known in self.optimizers):
            self._rates.add(optimizer)
            self.trainers.append(_trainer(optimizer, made, self.stages))

    def before_step(self, optimizer: Optimizer) -> None:
        """Nothing: the controller has hooks of its own."""

    def after_step(self, optimizer: Optimizer) -> None:
        self._steps += optimizer is self.controller.inner

    def diagnose(self) -> list[Diagnosis]:
        return self.controller.diagnose()

    def close(self) -> None:
        """Nothing: it belongs to the script, or the script has ended."""


def _trainer(optimizer: Optimizer, made: Call | None, stages: Mapping[str, Stage]) -> Trainer:
    held = [{id(p) for p in group["params"]} for group in optimizer.param_groups]
    groups = {
        name: tuple(
            i for i, ids in enumerate(held) if any(id(p) in ids for p in stage.parameters.values())
        )
        for name, stage in stages.items()
    }
    return Trainer(type(optimizer).__name__, made, groups)


def _forget(observer: weakref.ref[Observer]) -> None:
    found = observer()
    if found is not None:
        found.forget()
