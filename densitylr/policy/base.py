"""The contract of a policy: what it is given at an update, and what it returns. Pure, no torch.

A policy is ``init(stages) -> (scales, state)`` and ``update(state, observation) -> (scales,
state)``. It is a set of constants; everything that changes is in its state, so that the same policy
runs in training and over a recorded history (`simulate`). Hooks, scaling, schedulers, checkpoints,
ranks, history and plots are taken care of by `densitylr.DensityLR`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from densitylr.history import Cause, Number, StageReading

__all__ = [
    "ROUNDING",
    "BuildUp",
    "Change",
    "Needs",
    "Observation",
    "Policy",
    "Scales",
    "StageNeeds",
    "StageView",
]

ROUNDING = 1e-6
"""Relative change of a scale below which it has not changed: schedules round rates at every
step."""


@dataclass(frozen=True)
class Needs:
    """What a policy needs to know. Nothing else is measured for it.

    Attributes:
        every: steps from one update to the next. None: an update at each reading, whose steps
            `densitylr.DensityLR` chooses (``every``, more often at first, more rarely once nothing
            is decided any more).
        activations: an update comes with a `densitylr.StageReading` of each stage.
        twins: readings compare a stage with its untrained twin. Otherwise with the first reading.
        alignment: `StageView.alignment`, of the stages for which `Policy.requires` asks for it.
        weights: `StageView.weight_norm`.
        gradients: `StageView.gradient_norm`.
        updates: `StageView.update_norm` and `StageView.update_alignment`. It takes the memory of
            one copy of the weights.
        loss: `Observation.loss`.
    """

    every: int | None = None
    activations: bool = True
    twins: bool = False
    alignment: bool = False
    weights: bool = False
    gradients: bool = False
    updates: bool = False
    loss: bool = False


@dataclass(frozen=True)
class StageNeeds:
    """What a policy still needs of one stage; see `Policy.requires`.

    Attributes:
        undecided: its scale is still to be found; after a collapse its rate may rise again.
        twin: compare its outputs with its untrained twin.
        first_weights: keep its first weights, as its alignment may still be asked for.
        alignment: measure its alignment at each step from here on.
    """

    undecided: bool = False
    twin: bool = True
    first_weights: bool = True
    alignment: bool = True


@dataclass(frozen=True)
class BuildUp:
    """What makes an optimizer's first steps smaller or larger than its later ones.

    Attributes:
        momentum: of SGD or RMSprop, whose buffer begins empty; 0 for none, in 0 … 1.
        memory: of RMSprop's average of squared gradients, which begins at zero and is not
            corrected for that; 0 for none.
        nesterov: the momentum is Nesterov's.
    """

    momentum: float = 0.0
    memory: float = 0.0
    nesterov: bool = False


@dataclass(frozen=True)
class StageView:
    """One stage at one update. What a policy does not need is NaN or None.

    Norms are over the stage's weights: its parameters with two dimensions or more, or all of them
    where it has none.

    Attributes:
        lr: the user's learning rate, the largest of the stage's parameter groups; 0 where nothing
            is trained.
        max_lr: the largest learning rate of any parameter group of its optimizer.
        scale: the factor that the policy chose last.
        fan_in: inputs of a unit in its first weight layer.
        build_up: of the optimizer that trains it.
        optimizer: the class name of that optimizer.
        trainable: any of its parameters has ``requires_grad``; what is frozen may thaw.
        weight_norm: Euclidean norm of the weights.
        gradient_norm: of their gradients.
        update_norm: of the change of the weights since the last update of the policy, by step.
        update_alignment: cosine between the descent direction and that change.
        alignment: cosine between the descent direction and the displacement of the weights from
            their first values, mean over the steps since the last update.
        reading: the statistics of its activations.
    """

    lr: float
    max_lr: float
    scale: float
    fan_in: int = 1
    build_up: BuildUp = BuildUp()
    optimizer: str = ""
    trainable: bool = True
    weight_norm: float = math.nan
    gradient_norm: float = math.nan
    update_norm: float = math.nan
    update_alignment: float = math.nan
    alignment: float = math.nan
    reading: StageReading | None = None

    @property
    def cap(self) -> float:
        """The scale at which the stage has the largest rate; infinite at a rate of zero, which
        no scale changes.
        """
        return self.max_lr / self.lr if self.lr else math.inf


@dataclass(frozen=True)
class Observation:
    """What a policy is shown at an update, just before an optimizer step.

    Attributes:
        step: optimizer steps done. After a recovery it does not go back, and steps that were
            taken back are not counted.
        stages: a `StageView` for each stage that the policy may act on.
        loss: of this step, where it is known; see ``DensityLR.observe_loss``.
    """

    step: int
    stages: Mapping[str, StageView]
    loss: float | None = None


@dataclass(frozen=True)
class Change:
    """A scale with the reason for it, which is recorded as a `densitylr.Decision`.

    Attributes:
        scale: the factor on the user's rate.
        cause: why.
        numbers: what the cause rests on, by name; `densitylr.history.sentences` says which numbers
            a cause is put into words with.
        lifted: the stage has lifted off at this update.
    """

    scale: float
    cause: Cause = Cause.POLICY
    numbers: Mapping[str, Number] = field(default_factory=dict)
    lifted: bool = False


Scales = Mapping[str, float | Change]
"""Scales by stage. Stages that are left out keep theirs. A plain number is recorded as a decision
whenever it has doubled or halved since the last one; a `Change` always, but for one caused by the
user's schedule."""


class Policy:
    """A controller of learning rates; subclasses give `update`, and what else they need.

    Attributes:
        needs: what it has to be shown.
        within_user_rates: its scales are at least 1, and no rate exceeds the user's largest. Then a
            raise shows that the stage's own rate was too low, and the stage is diagnosed as
            starved.
        corrects_momentum: at a raise the momentum buffers of the stage (SGD's and RMSprop's) are
            divided by its factor, so that it applies to the gradients to come.

    Example::

        class Lars(Policy):
            needs = Needs(every=1, activations=False, weights=True, gradients=True)

            def update(self, state, seen):
                return {n: 1e-3 * s.weight_norm / s.gradient_norm
                        for n, s in seen.stages.items()}, state
    """

    needs: Needs = Needs()
    within_user_rates: bool = False
    corrects_momentum: bool = False

    def init(self, stages: Mapping[str, StageView]) -> tuple[Scales, Any]:
        """The scales before the first step, and the first state.

        Args:
            stages: those that the policy may act on, in the model's order, without a reading. A
                stage that is not in it keeps the user's rate.

        Returns:
            The scales, and a state of numbers, strings, None, and dictionaries, lists, tuples and
            dataclasses of them. It is saved in checkpoints, dataclasses as dictionaries.
        """
        return dict.fromkeys(stages, 1.0), None

    def update(self, state: Any, seen: Observation) -> tuple[Scales, Any]:
        """The scales from the next step on, and the next state.

        Args:
            state: as the last call has returned it; it is not to be changed in place.
            seen: what the policy needs, of all stages.
        """
        raise NotImplementedError

    def requires(self, state: Any) -> Mapping[str, StageNeeds]:
        """What is still needed of which stage; stages that are left out need all of `needs`.

        What is no longer needed is released, and not measured any more.
        """
        return {}

    def restore(self, saved: Any) -> Any:
        """A state from what a checkpoint has of it, in which dataclasses have become
        dictionaries."""
        return saved

    def __repr__(self) -> str:
        constants = ", ".join(f"{name}={value!r}" for name, value in sorted(vars(self).items()))
        return f"{type(self).__name__}({constants})"


def plain(state: Any) -> Any:
    """A state as a checkpoint holds it: dataclasses become dictionaries.

    Raises:
        TypeError: there is something in it that a checkpoint cannot hold.
    """
    if dataclasses.is_dataclass(state) and not isinstance(state, type):
        return {f.name: plain(getattr(state, f.name)) for f in dataclasses.fields(state)}
    if isinstance(state, Mapping):
        return {key: plain(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [plain(value) for value in state]
    if state is None or isinstance(state, (bool, int, float, str)):
        return state
    raise TypeError(
        "the state of a policy must be made of numbers, strings, None, dictionaries, lists, tuples "
        f"and dataclasses of them, so that a checkpoint can hold it, got a {type(state).__name__}"
    )
