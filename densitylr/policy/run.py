"""A policy at work: its state, the scales it has chosen, and the decisions made of what changes.

`PolicyRun` is what the control loop has of a policy, in training; `simulate` runs one over a
recorded history. Neither looks inside the policy's state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from densitylr.history import Cause, Count, Decision, History, restored
from densitylr.policy.base import (
    ROUNDING,
    BuildUp,
    Change,
    Observation,
    Policy,
    Scales,
    StageNeeds,
    StageView,
    plain,
)

__all__ = ["PolicyRun", "RunState", "simulate"]

ALL = StageNeeds(undecided=False)
"""What a policy needs of a stage for which `Policy.requires` says nothing."""


@dataclass(frozen=True)
class RunState:
    """Where a `PolicyRun` stood; it may be gone back to.

    Attributes:
        state: of the policy.
        scales: the factor on the user's rate of each stage.
        reported: the scale of the last decision of each stage, or the first one.
        behind: optimizer steps that were taken back, which the policy does not count.
    """

    state: Any
    scales: Mapping[str, float]
    reported: Mapping[str, float]
    behind: int = 0


class PolicyRun:
    """A policy with its state.

    Args:
        policy: what decides.
        views: the stages it may act on, without readings.

    Attributes:
        now: the present `RunState`.
        stages: the stages it may act on.
        undecided: those whose scale is still to be found.
        compared: those whose twin the policy still needs.
        aligned: those whose alignment it needs now.
        first_weights: those whose alignment it may still need.

    Raises:
        ValueError: a scale of the policy is negative or not finite, or of an unknown stage.
        TypeError: its state cannot be saved in a checkpoint.
    """

    def __init__(self, policy: Policy, views: Mapping[str, StageView]) -> None:
        self.policy = policy
        self.stages = tuple(views)
        scales, state = policy.init(views)
        plain(state)  # raises, while nothing has begun
        # Decisions that the first update records.
        self._first = {n: c for n, c in scales.items() if isinstance(c, Change)}
        chosen = {**dict.fromkeys(views, 1.0), **self._checked(scales)}
        self.now = RunState(state, chosen, chosen)
        self._require()

    @property
    def scales(self) -> dict[str, float]:
        """The factor that the policy has chosen for each stage it may act on."""
        return dict(self.now.scales)

    @property
    def waiting(self) -> frozenset[str]:
        """The stages that may still be raised."""
        return self.undecided | self.aligned

    def update(self, seen: Observation) -> list[Decision]:
        """Let the policy decide, and say what has changed.

        Args:
            seen: its ``step`` counts all optimizer steps; the scales are those of this run.
        """
        observation = Observation(seen.step - self.now.behind, seen.stages, seen.loss)
        wanted, state = self.policy.update(self.now.state, observation)
        chosen = self._checked(wanted)
        scales, reported = dict(self.now.scales), dict(self.now.reported)
        decisions = [
            _decision(seen.step, name, seen.stages[name].lr, 1.0, change.scale, change)
            for name, change in self._first.items()
            if change.scale != 1.0
        ]
        self._first = {}
        for name in self.stages:
            before, change = scales[name], wanted.get(name)
            scale = scales[name] = chosen.get(name, before)
            if _is_reported(change, before, scale, reported.get(name, before)):
                reported[name] = scale
                change = change if isinstance(change, Change) else Change(scale)
                lr = seen.stages[name].lr
                decisions.append(_decision(seen.step, name, lr, before, scale, change))
        self.now = RunState(state, scales, reported, self.now.behind)
        self._require()
        return decisions

    def go_back(self, then: RunState, steps: int) -> None:
        """Return to an earlier state; ``steps`` were taken since, and are not counted."""
        self.now = RunState(then.state, then.scales, then.reported, then.behind + steps)
        self._require()

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dictionaries."""
        return {
            "policy": type(self.policy).__name__,
            "state": plain(self.now.state),
            "scales": dict(self.now.scales),
            "reported": dict(self.now.reported),
            "behind": self.now.behind,
        }

    def restored(self, saved: Mapping[str, Any]) -> RunState:
        """The state in a checkpoint; nothing is changed yet.

        Raises:
            ValueError: it is of another policy, or damaged.
        """
        if saved["policy"] != type(self.policy).__name__:
            raise ValueError(
                f"the state dict is of policy {saved['policy']}, this DensityLR has "
                f"{type(self.policy).__name__}"
            )
        scales = {name: _scale(name, value) for name, value in saved["scales"].items()}
        reported = {name: _scale(name, value) for name, value in saved["reported"].items()}
        state = self.policy.restore(saved["state"])
        unknown = {*reported, *self.policy.requires(state)} - scales.keys()
        if unknown:
            raise ValueError(f"the state dict has no scale of stages {sorted(unknown)}")
        return RunState(state, scales, reported, restored(Count, saved["behind"]))

    def load(self, state: RunState) -> None:
        """Go on from a state of `restored`; the stages are those that it has scales of."""
        self.now, self._first = state, {}
        self.stages = tuple(state.scales)
        self._require()

    def _require(self) -> None:
        """Ask the policy what it still needs."""
        asked = self.policy.requires(self.now.state)
        needs = {name: asked.get(name, ALL) for name in self.stages}
        twins, alignment = self.policy.needs.twins, self.policy.needs.alignment
        self.undecided = frozenset(n for n, own in needs.items() if own.undecided)
        self.compared = frozenset(n for n, own in needs.items() if twins and own.twin)
        self.aligned = frozenset(n for n, own in needs.items() if alignment and own.alignment)
        self.first_weights = frozenset(
            n for n, own in needs.items() if alignment and own.first_weights
        )

    def _checked(self, scales: Scales) -> dict[str, float]:
        unknown = scales.keys() - set(self.stages)
        if unknown:
            raise ValueError(
                f"{type(self.policy).__name__} gave scales for {sorted(unknown)}; the stages it "
                f"may act on are {list(self.stages)}"
            )
        return {
            name: _scale(name, change.scale if isinstance(change, Change) else change)
            for name, change in scales.items()
        }


def simulate(
    policy: Policy, history: History, build_up: BuildUp | None = None
) -> tuple[dict[str, float], list[Decision]]:
    """Run a policy over a recorded history, without training.

    The history is what happened under the scales of that run: what the stages would have done
    under other scales is not known, so later decisions are what the policy would decide next, not
    a forecast. A policy that needs norms of weights, gradients or updates is shown NaN.

    Args:
        policy: any policy; the run's own is ``DensityLR.policy``.
        history: a history that holds rates, as `densitylr.DensityLR` records it.
        build_up: of the optimizer of that run, ``DensityLR.build_up``; default: of one that has
            none.

    Returns:
        The last scale of each stage, and all decisions.

    Raises:
        ValueError: the history holds no learning rates (it is a bare monitor's).
    """
    build_up = build_up or BuildUp()
    known = [s for s in history.stages if not math.isnan(history.series(s, "rate")[0])]
    if not known:
        raise ValueError(f"{history!r} holds no learning rates: record it with DensityLR")
    observations = history.observations()
    _, rates, _ = observations[0]
    largest = max(rates.values())
    run = PolicyRun(
        policy, {n: StageView(rates[n], largest, 1.0, build_up=build_up) for n in known}
    )
    decisions = []
    for reading, rates, _ in observations:
        largest, scales = max(rates.values()), run.scales
        views = {
            name: StageView(
                rates[name],
                largest,
                scales[name],
                build_up=build_up,
                alignment=reading.stages[name].alignment,
                reading=reading.stages[name],
            )
            for name in known
        }
        decisions += run.update(Observation(reading.step, views))
    return run.scales, decisions


def _is_reported(change: float | Change | None, before: float, scale: float, last: float) -> bool:
    """Whether a change is recorded: a plain number, or what a schedule does, once it has doubled or
    halved since the last decision, as it may happen at every update.
    """
    if isinstance(change, Change) and change.lifted:
        return True
    if math.isclose(scale, before, rel_tol=ROUNDING):
        return False
    if isinstance(change, Change) and change.cause is not Cause.SCHEDULE:
        return True
    return not last or not 0.5 < scale / last < 2


def _decision(
    step: int, name: str, lr: float, before: float, scale: float, change: Change
) -> Decision:
    kind = "lift-off" if change.lifted else "raise" if scale > before else "lower"
    rates = lr * before, lr * scale
    return Decision(step, name, kind, before, scale, *rates, change.cause, change.numbers)


def _scale(name: str, scale: Any) -> float:
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 <= scale < math.inf:
        raise ValueError(
            f"the scale of a stage must be finite and not negative, got {scale!r} of {name!r}"
        )
    return float(scale)
