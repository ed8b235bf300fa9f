"""The hands' orders: the lift-off law, from readings and rates to decisions. Pure, no torch.

A stage that learns changes the distribution of its own outputs within a few dozen steps; a
starved one does not. While a stage has not *lifted off*, its rate is raised; once it has, its
scale stays where it is. A policy is a set of constants; all that changes is in a `LawState`,
so the same law runs in training and over a recorded trace (`simulate`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from densitylr.records import Decision, Reading

if TYPE_CHECKING:
    from densitylr.history import History

__all__ = ["MODES", "LawState", "LiftOff", "Policy", "StageState", "simulate"]

MODES = ("repair", "warmup", "free")

ROUNDING = 1e-6
"""A schedule rounds the ratio of two rates anew at every step; that is no change."""

LARGEST = " (the largest you gave)"


@dataclass(frozen=True)
class StageState:
    """What the law remembers of one stage.

    Attributes:
        scale: our factor on the user's rate.
        lifted: the law is done with the stage.
        first: step of the first reading at which the user's rate was positive; None before it.
        step: step of the last reading.
        rate: effective rate since then.
        spent: sum of the effective rates of all steps up to the last reading.
    """

    scale: float
    lifted: bool = False
    first: int | None = None
    step: int = 0
    rate: float = 0.0
    spent: float = 0.0


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
                    s, first=None if s.first is None else s.first + steps, step=s.step + steps
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


@dataclass(frozen=True)
class LiftOff:
    """The lift-off law.

    ``D`` is a stage's displacement, ``|ln(near-zero density / untrained density)|``.

    ``repair`` raises the scale at every probe where ``D`` is less than
    ``expected = healthy * min(1, steps / patience)``, from 1 up to the largest rate the user gave
    to any group: by ``expected / D``, as ``D`` grows in proportion to the rate, kept within
    ``growth`` … ``leap``. The steps count from the first reading at which the stage's own rate
    is positive. With one flat rate it never acts.

    ``warmup`` and ``free`` start at ``start`` and solve for the rate: as ``D`` grows in
    proportion to the rate spent, ``S = sum of rates``, the rate that gives a displacement of
    ``speed`` a step is ``speed * S / D``. While ``D`` is not visible the rate is raised by
    ``leap`` instead: ``D`` is visible above ``visible`` and above ``2 / sqrt(n)``, n being the
    near-zero outputs counted, the scale of its sampling noise. A change that was solved for is
    kept within ``shrink`` … ``growth``; at lift-off the rate may still be lowered, then it
    stays. ``warmup`` keeps to the largest rate of the user's, ``free`` to a scale of ``reach``.

    Args:
        mode: ``"repair"``, ``"warmup"`` or ``"free"``.
        healthy: displacement that ``repair`` expects within ``patience`` steps, and at which a
            stage has lifted off for it.
        patience: steps.
        delta: displacement at which a stage has lifted off for the search modes.
        growth: smallest raise of ``repair``, largest of a rate that was solved for.
        start: initial scale of the search modes.
        speed: displacement wanted per step by the search modes.
        visible: displacement below which ``D`` says nothing but "too little".
        leap: largest raise of ``repair``, and of a rate while ``D`` is not visible.
        shrink: smallest factor of one change.
        reach: largest scale of ``free``; a stage that no rate can move is raised no further.

    Raises:
        ValueError: no such mode, or a constant out of its range.
    """

    mode: str = "repair"
    healthy: float = 0.4
    patience: int = 20
    delta: float = 0.1
    growth: float = 4.0
    start: float = 1e-4
    speed: float = 0.08
    visible: float = 0.001
    leap: float = 16.0
    shrink: float = 1 / 20
    reach: float = 1e10

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        for name in ("healthy", "patience", "delta", "start", "speed", "visible", "reach"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}")
        for name in ("growth", "leap"):
            if not getattr(self, name) > 1:
                raise ValueError(f"{name} must be greater than 1, got {getattr(self, name)!r}")
        if not 0 < self.shrink <= 1:
            raise ValueError(f"shrink must be in (0, 1], got {self.shrink!r}")

    def init(self, stages: list[str]) -> LawState:
        scale = 1.0 if self.mode == "repair" else self.start
        return LawState({name: StageState(scale) for name in stages})

    def decide(
        self, state: LawState, reading: Reading, rates: Mapping[str, float], ceiling: float
    ) -> tuple[LawState, list[Decision]]:
        stages = dict(state.stages)
        decisions = []
        for name, old in state.stages.items():
            own = rates.get(name, 0.0)
            spent = old.spent + old.rate * (reading.step - old.step)
            first = reading.step if old.first is None and own > 0 else old.first
            new = dataclasses.replace(
                old, first=first, step=reading.step, rate=own * old.scale, spent=spent
            )
            seen = reading.stages[name]
            decision = None
            cap = self._cap(own, ceiling)
            if own > 0 and math.isfinite(seen.displacement) and not old.lifted:
                new, decision = self._judge(name, new, reading, own, cap)
            elif new.scale > cap * (1 + ROUNDING):
                new, decision = _lowered(name, new, reading, own, cap)
            stages[name] = new
            decisions += [decision] if decision else []
        return LawState(stages), decisions

    def _cap(self, own: float, ceiling: float) -> float:
        """The largest scale of a stage whose own rate is ``own``."""
        if own == 0:
            return math.inf  # no scale moves a rate of zero
        return self.reach if self.mode == "free" else ceiling / own

    def _judge(
        self, name: str, stage: StageState, reading: Reading, own: float, cap: float
    ) -> tuple[StageState, Decision | None]:
        seen = reading.stages[name]
        if seen.zero_gradient:
            return stage, None  # no rate moves it
        moved = seen.displacement
        lifted = moved >= (self.healthy if self.mode == "repair" else self.delta)
        steps = stage.step - (stage.first or 0)
        expected = self.healthy * min(1.0, steps / self.patience)
        if self.mode == "repair":
            factor = 1.0
            if moved < expected and not lifted:
                factor = max(self.growth, min(self.leap, expected / max(moved, 1e-9)))
            want = f"expected to have moved {expected:.1%}"
        elif steps == 0:
            return stage, None  # nothing has been spent yet
        elif moved < max(self.visible, 2 / math.sqrt(max(1.0, seen.count * seen.untrained))):
            factor = 1.0 if lifted else min(self.leap, self.delta / max(moved, 1e-9))
            want = f"moved {moved:.2%}, too little to go by"
        else:
            factor = self.speed * stage.spent / moved / stage.rate
            factor = min(1.0 if lifted else self.growth, max(self.shrink, factor))
            want = f"moved {moved:.2%} for {stage.spent:.2g} of rate spent"
        scale = min(stage.scale * factor, cap)
        if math.isclose(scale, stage.scale, rel_tol=ROUNDING):
            scale = stage.scale
        new = dataclasses.replace(stage, scale=scale, rate=own * scale, lifted=lifted)
        evidence = (
            f"near-zero density {seen.near_zero:.3f}, untrained {seen.untrained:.3f}, "
            f"after {reading.step} steps; "
        )
        if lifted:
            if self.mode == "repair" and scale == 1.0:
                return new, None
            kind, reason = "lift-off", f"moved {moved:.1%}, lifted off"
        elif scale == stage.scale:
            return new, None
        else:
            kind, reason = ("raise" if scale > stage.scale else "lower"), want
        change = f"; rate {stage.rate:.1e} → {new.rate:.1e}"
        if scale == stage.scale:
            change = f"; rate stays {new.rate:.1e}, {scale:.4g} times yours"
        elif scale == cap:
            change += " (the largest it may have)" if self.mode == "free" else LARGEST
        reason = evidence + reason + change
        return new, Decision(
            reading.step, name, kind, stage.scale, scale, stage.rate, new.rate, reason
        )


def _lowered(
    name: str, stage: StageState, reading: Reading, own: float, cap: float
) -> tuple[StageState, Decision]:
    """A stage that has lifted off, after the user's rates have drawn closer together."""
    new = dataclasses.replace(stage, scale=cap, rate=own * cap)
    reason = f"your rates have changed; rate {stage.rate:.1e} → {new.rate:.1e}{LARGEST}"
    decision = Decision(reading.step, name, "lower", stage.scale, cap, stage.rate, new.rate, reason)
    return new, decision


def simulate(policy: Policy, history: History) -> tuple[LawState, list[Decision]]:
    """Run a policy over a recorded history, without training.

    The trace is what happened under the scales of that run: what the stages would have done
    under other scales is not known, so later decisions are "what it would say next", not a
    forecast.

    Args:
        policy: any policy.
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
