"""Watch one model learn: what `DensityLR` would see and decide, with no hand on anything.

The machinery is that of `DensityLR`: its eyes (with an untrained twin for every stage), its law,
its diagnoses. The optimizers stay untouched: whoever holds them tells a `Watch` of their steps.
What goes wrong in here ends the watching, never the training.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from densitylr.cadence import Cadence
from densitylr.controller import DensityLR
from densitylr.diagnosis import diagnose
from densitylr.doctor.source import Call
from densitylr.gradients import without_gradient
from densitylr.history import History
from densitylr.liftoff import LiftOff
from densitylr.monitor import DensityMonitor
from densitylr.policy import LawState
from densitylr.pretrained import pretrained_stages
from densitylr.rates import startup
from densitylr.records import Diagnosis
from densitylr.stages import Stage, find_stages, untrainable

__all__ = ["Controlled", "Trainer", "Watch"]

EVERY = 5
"""Steps from one probe to the next, as in `DensityLR`; half of that in the first steps."""


class _Eyes(DensityMonitor):
    """A monitor that neither raises nor warns in somebody's training."""

    def __init__(self, model: nn.Module, twins: list[str], watch: Watch) -> None:
        super().__init__(model, every=None, twins=twins, guard=True)
        self._watch = weakref.ref(watch)
        self._warned.update(self.stages)  # the diagnosis tells of NaN

    def _read(self, name: str, args: Any, kwargs: Any, output: Any) -> None:
        try:
            super()._read(name, args, kwargs, output)
        except Exception as error:
            watch = self._watch()
            if watch is not None:
                watch.give_up(f"reading the outputs of {name}", error)


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


class Watch:
    """One model and the optimizers that train it, watched from its first training forward on.

    Args:
        model: the model, not yet trained.
        name: what the script calls it.
        called: where the script called it first, where that is known.

    Attributes:
        kind: the name of the model's class.
        stages: `Stage` by name; empty once the model is gone.
        layers: the qualified names of each stage's weight layers.
        history: every reading, and the decisions that ``repair`` would have taken.
        mode: the mode of these decisions.
        acting: whether they are carried out.
        kept: the stages that are not judged, as their weights are no fresh initialisation,
            with the reason.
        trainers: one `Trainer` an optimizer, in the order they were made.
        steps: optimizer steps seen.
        notes: sentences on what could not be followed.

    Raises:
        ValueError: the model cannot be divided into stages. Nothing is hooked then.
    """

    mode = "repair"
    acting = False

    def __init__(self, model: nn.Module, name: str, called: Call | None = None) -> None:
        self.name, self.kind, self.called = name, type(model).__name__, called
        self.steps = 0
        self._cadence = Cadence(EVERY)
        self.notes: list[str] = []
        self.stages: dict[str, Stage] = find_stages(model)
        self.layers = {name: list(stage.taps) for name, stage in self.stages.items()}
        self.kept, self._gains = pretrained_stages(model, self.stages, None)
        free = [stage for stage in self.stages if stage not in self.kept]
        self._law = LiftOff(self.mode)
        self._state = self._law.init(free)
        self._optimizers: list[weakref.ref[Optimizer]] = []
        self.trainers: list[Trainer] = []
        self._lead: weakref.ref[Optimizer] | None = None
        self._waiting: dict[int, int] = {}  # steps of others since the last one of the lead
        self._eyes: _Eyes | None = _Eyes(model, free, self)
        self._eyes.arm(variety=True)
        self.history: History = self._eyes.history
        self._frozen: list[str] = []
        # A model that the script has let go of is not to be kept alive by those who watched it.
        weakref.finalize(model, _forget, weakref.ref(self)).atexit = False

    @property
    def optimizers(self) -> Iterator[Optimizer]:
        """Those that train the model and are still there, in the order they were made."""
        return (found for ref in self._optimizers if (found := ref()) is not None)

    def follow(self, optimizer: Optimizer, made: Call | None = None) -> None:
        """Count the steps, and take the rates, of one more optimizer, made where it is said."""
        if any(known is optimizer for known in self.optimizers):
            return
        self._optimizers.append(weakref.ref(optimizer))
        held = [{id(p) for p in group["params"]} for group in optimizer.param_groups]
        groups = {
            name: tuple(
                i
                for i, ids in enumerate(held)
                if any(id(p) in ids for p in stage.parameters.values())
            )
            for name, stage in self.stages.items()
        }
        self.trainers.append(Trainer(type(optimizer).__name__, made, groups))

    def before_step(self, optimizer: Optimizer, closure: bool = False) -> None:
        """To be called before each step; ``closure``: the step makes its gradients itself."""
        eyes = self._eyes
        if eyes is None or eyes.closed or not self._leads(optimizer):
            return
        try:
            self._probe(eyes, closure)
        except Exception as error:
            self.give_up(f"the probe at step {self.steps}", error)

    def after_step(self, optimizer: Optimizer) -> None:
        """To be called after each step."""
        eyes = self._eyes
        if self._lead is None:  # the model was found in the midst of this step
            self._lead = weakref.ref(optimizer)
        if eyes is None or self._lead() is not optimizer:
            return
        self.steps += 1
        if self.steps >= self._cadence.due and not (eyes.armed or eyes.closed):
            eyes.arm(variety=self._cadence.young(self.steps))

    def diagnose(self) -> list[Diagnosis]:
        """As `DensityLR.diagnose`."""
        return diagnose(
            self.history,
            mode=self.mode,
            frozen=self._frozen or untrainable(self.stages),
            kept=self.kept.keys() - self._gains.keys(),
            gains=self._gains,
            observe_only=True,
        )

    def forget(self) -> None:
        """Let go of every part of the model; what was seen stays."""
        self._frozen = untrainable(self.stages)
        self.close()
        self._eyes = None
        self.stages = {}

    def give_up(self, doing: str, error: Exception) -> None:
        """End the watching, and note why; the readings so far stay."""
        self.notes.append(
            f"{self.name}: {doing} failed ({type(error).__name__}: {error}), so it was watched for "
            f"{self.steps} steps only; the training went on"
        )
        self.close()

    def close(self) -> None:
        """Take all hooks off the model."""
        if self._eyes is not None:
            self._eyes.close()

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

    def _probe(self, eyes: _Eyes, closure: bool) -> None:
        reading = eyes.collect(self.steps)
        if reading is None:
            return
        if not closure:
            reading = without_gradient(reading, self.stages)
        rates, kinds = self._rates()
        decisions = []
        state = dict(self._state.stages)
        laws = {type(o).__name__: replace(self._law, **startup(o)) for o in self.optimizers}
        for kind in dict.fromkeys(kinds.values()):  # a rate of Adam says nothing about one of SGD
            own = {name: rates[name] for name, other in kinds.items() if other == kind}
            part = LawState({name: stage for name, stage in state.items() if name in own})
            law = laws.get(kind, self._law)
            after, taken = law.decide(part, reading, own, max(own.values()))
            state.update(after.stages)
            decisions += taken
        self._state = LawState(state)
        self._cadence.looked(reading.step, bool(decisions))
        self.history.record(reading, rates, dict.fromkeys(self.stages, 1.0), decisions)
        for name, stage in self._state.stages.items():
            if stage.lifted:
                eyes.let_twin_go(name)

    def _rates(self) -> tuple[dict[str, float], dict[str, str]]:
        """The largest rate in each stage, 0 where no optimizer holds it; and whose it is."""
        known: dict[int, tuple[float, str]] = {}
        for optimizer in self.optimizers:  # a newer one takes over what an older one had
            for group in optimizer.param_groups:
                rate = (float(group["lr"]), type(optimizer).__name__)
                known.update((id(p), rate) for p in group["params"] if p.requires_grad)
        best = {
            name: max(
                (known.get(id(p), (0.0, "")) for p in stage.parameters.values()), default=(0.0, "")
            )
            for name, stage in self.stages.items()
        }
        return {n: rate for n, (rate, _) in best.items()}, {
            n: kind for n, (_, kind) in best.items()
        }


class Controlled(Watch):
    """A model that a `DensityLR` runs: the doctor's, or one that the script made itself.

    Args:
        controller: it, made before the first training forward.
        name, called: as in `Watch`.
        model: the model.
        own: the script made the controller itself.
    """

    def __init__(
        self, controller: DensityLR, model: nn.Module, name: str, called: Call | None, own: bool
    ) -> None:
        self.name, self.kind, self.called = name, type(model).__name__, called
        self.controller, self.mode = controller, controller.mode
        self.stages, self.history = controller.stages, controller.history
        self.layers = {name: list(stage.taps) for name, stage in self.stages.items()}
        self.acting = not controller.observe_only
        self.kept = controller._kept
        self.steps = 0
        self.notes = [f"{name}: your script has a DensityLR already; this is its history"] * own
        self._optimizers = []
        self.trainers = []

    def before_step(self, optimizer: Optimizer, closure: bool = False) -> None:
        """Nothing: the controller has hooks of its own."""

    def after_step(self, optimizer: Optimizer) -> None:
        self.steps += optimizer is self.controller.inner

    def diagnose(self) -> list[Diagnosis]:
        return self.controller.diagnose()

    def close(self) -> None:
        """Nothing: it belongs to the script, or the script has ended."""


def _forget(watch: weakref.ref[Watch]) -> None:
    found = watch()
    if found is not None:
        found.forget()
