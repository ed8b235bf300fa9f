"""What decides on scales: readings and rates in, decisions out. Pure, no torch.

A policy is a set of constants; all that changes is in a `LawState`, so the same law runs in
training and over a recorded trace (`simulate`). `densitylr.liftoff` has the law itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from densitylr.records import Decision, Reading

if TYPE_CHECKING:
    from densitylr.history import History

__all__ = ["ROUNDING", "LawState", "Policy", "Ruling", "StageState", "simulate"]

ROUNDING = 1e-6
"""A schedule rounds the ratio of two rates anew at every step; that is no change."""


@dataclass(frozen=True)
class StageState:
    """What the law remembers of one stage.

    Attributes:
        scale: our factor on the user's rate.
        lifted: its displacement has told what it can.
        first: step of the first reading at which the user's rate was positive; None before it.
        step: step of the last reading.
        rate: effective rate since then.
        spent: sum of the effective rates of all steps up to the last reading, each counted as
            far as it has reached the weights.
        most: the largest displacement so far.
        near_zero: untrained near-zero outputs when it was first judged, in a search.
        count: outputs that were read then.
        alone: the scale that its own displacement asks for, in a search; None once all stages
            have lifted off.
        over: step at which its search, or in a repair the stage's own lift-off, was over; None
            before that.
        following: its rate may be raised for its pull, so that is looked at.
        pulled: sum of the pull over the steps since the last time that was judged.
        judged: the step of that, or the first from which it counts.
        heat: how far the scale of its outputs came in its first steps, see `densitylr.heat`; None
            before it was seen.
        heeded: it is in these first steps, and may be compared with its twin.
        told: the scale of its last decision; None before the first.
    """

    scale: float
    lifted: bool = False
    first: int | None = None
    step: int = 0
    rate: float = 0.0
    spent: float = 0.0
    most: float = 0.0
    near_zero: float = 0.0
    count: int = 0
    alone: float | None = None
    over: int | None = None
    following: bool = False
    pulled: float = 0.0
    judged: int = 0
    heat: float | None = None
    heeded: bool = False
    told: float | None = None


@dataclass(frozen=True)
class LawState:
    """One `StageState` for each stage that the law may act on; others keep their rate."""

    stages: Mapping[str, StageState]

    @property
    def scales(self) -> dict[str, float]:
        return {name: stage.scale for name, stage in self.stages.items()}

    def later(self, steps: int) -> LawState:
        """As if it had all been so many steps later: nothing is spent on what is taken back."""
        return LawState(
            {
                name: dataclasses.replace(
                    s,
                    first=None if s.first is None else s.first + steps,
                    step=s.step + steps,
                    over=None if s.over is None else s.over + steps,
                    judged=s.judged + steps,
                )
                for name, s in self.stages.items()
            }
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries and numbers, for a checkpoint."""
        return {name: dataclasses.asdict(stage) for name, stage in self.stages.items()}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> LawState:
        return cls({name: StageState(**fields) for name, fields in state.items()})


class Ruling(NamedTuple):
    """What one rule of a law makes of stages: as they go on, and why they have their rates."""

    stages: dict[str, StageState]
    why: dict[str, str]


class Policy(Protocol):
    """What `DensityLR` needs of a policy: a start, and an answer to each reading."""

    def init(self, stages: list[str]) -> LawState:
        """The state before the first step, for the stages the policy may act on."""

    def decide(
        self, state: LawState, reading: Reading, rates: Mapping[str, float], ceiling: float
    ) -> tuple[LawState, list[Decision]]:
        """The state after a reading, and the changes with their reasons.

        Args:
            state: as returned by `init` or the last `decide`; not changed.
            reading: the statistics of all stages.
            rates: the user's own learning rate of each stage, at this step.
            ceiling: the largest learning rate among the user's parameter groups.
        """


def simulate(policy: Policy, history: History) -> tuple[LawState, list[Decision]]:
    """Run a policy over a recorded history, without training.

    The trace is what happened under the scales of that run: what the stages would have done
    under other scales is not known, so later decisions are "what it would say next", not a
    forecast.

    Args:
        policy: any policy; the run's own is ``DensityLR.policy``.
        history: a history that holds rates, as `DensityLR` records it.

    Returns:
        The last state and all decisions.

    Raises:
        ValueError: the history holds no learning rates (it is a bare monitor's).
    """
    state = policy.init([s for s in history.stages if not math.isnan(history.series(s, "rate")[0])])
    if not state.stages:
        raise ValueError(f"{history!r} holds no learning rates: record it with DensityLR")
    decisions = []
    for reading, rates, _ in history.observations():
        state, new = policy.decide(state, reading, rates, max(rates.values()))
        decisions += new
    return state, decisions
