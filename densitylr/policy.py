"""The hands' orders: the lift-off law, from readings and rates to decisions. Pure, no torch.

A stage that learns changes the distribution of its own outputs within a few dozen steps; a
starved one does not. While a stage has not *lifted off*, its rate is raised; once it has, what
it asks for stays what it is. A policy is a set of constants; all that changes is in a `LawState`,
so the same law runs in training and over a recorded trace (`simulate`).
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from densitylr.records import Decision, Reading, StageReading

if TYPE_CHECKING:
    from densitylr.history import History

__all__ = ["MODES", "LawState", "LiftOff", "Policy", "StageState", "simulate"]

MODES = ("repair", "warmup", "free")

ROUNDING = 1e-6
"""A schedule rounds the ratio of two rates anew at every step; that is no change."""

LARGEST = " (the largest you gave)"
CHANGED = "your rates have changed"
SHARED = "goes with the other stages"


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
        wanted: the scale it asks for by itself; 0 as long as it has not been judged.
    """

    scale: float
    lifted: bool = False
    first: int | None = None
    step: int = 0
    rate: float = 0.0
    spent: float = 0.0
    wanted: float = 0.0


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
    kept within ``shrink`` … ``growth``; at lift-off the rate may still be lowered, then what the
    stage asks for stays. All stages, with or without a say, train at one rate, the median of
    what those with a say ask for:

        rate = median over stages of (speed * S / D)

    (the lower one of two in the middle), until the last one has lifted off. Each of them is a
    noisy answer to much the same question, and a displacement that crosses zero by chance, or a
    head whose few outputs are all it has to show, moves no median. ``warmup`` keeps to the
    largest rate of the user's, ``free`` to a scale of ``reach``.

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
        before: dict[str, StageState] = {}
        after: dict[str, StageState] = {}
        reasons: dict[str, str] = {}
        judged = False
        for name, old in state.stages.items():
            own = rates.get(name, 0.0)
            spent = old.spent + old.rate * (reading.step - old.step)
            first = reading.step if old.first is None and own > 0 else old.first
            stage = dataclasses.replace(
                old, first=first, step=reading.step, rate=own * old.scale, spent=spent
            )
            before[name] = stage
            seen = reading.stages[name]
            cap = self._cap(own, ceiling)
            if own > 0 and math.isfinite(seen.displacement) and not old.lifted:
                stage, reasons[name] = self._judge(stage, seen, own, cap)
                judged = True
            elif stage.scale > cap * (1 + ROUNDING):
                # It has lifted off, and the user's rates have drawn closer together.
                stage = dataclasses.replace(stage, scale=cap, rate=own * cap)
                reasons[name] = CHANGED
            after[name] = stage
        if judged and self.mode != "repair":
            after = self._shared(after, rates, ceiling)
        decisions = []
        for name, new in after.items():
            cap = self._cap(rates.get(name, 0.0), ceiling)
            reason = reasons.get(name, SHARED)
            decision = self._decision(name, before[name], new, reading, reason, cap)
            decisions += [decision] if decision else []
        return LawState(after), decisions

    def _cap(self, own: float, ceiling: float) -> float:
        """The largest scale of a stage whose own rate is ``own``."""
        if own == 0:
            return math.inf  # no scale moves a rate of zero
        return self.reach if self.mode == "free" else ceiling / own

    def _judge(
        self, stage: StageState, seen: StageReading, own: float, cap: float
    ) -> tuple[StageState, str]:
        """The stage as it would have it by itself, and why."""
        if seen.zero_gradient:
            return dataclasses.replace(stage, wanted=0.0), "no rate moves it"
        moved = seen.displacement
        lifted = moved >= (self.healthy if self.mode == "repair" else self.delta)
        steps = stage.step - (stage.first or 0)
        expected = self.healthy * min(1.0, steps / self.patience)
        if self.mode == "repair":
            factor = 1.0
            if moved < expected and not lifted:
                factor = max(self.growth, min(self.leap, expected / max(moved, 1e-9)))
            reason = f"expected to have moved {expected:.1%}"
        elif steps == 0:
            return stage, SHARED  # nothing has been spent yet
        elif moved < max(self.visible, 2 / math.sqrt(max(1.0, seen.count * seen.untrained))):
            factor = 1.0 if lifted else min(self.leap, self.delta / max(moved, 1e-9))
            reason = f"moved {moved:.2%}, too little to go by"
        else:
            factor = self.speed * stage.spent / moved / stage.rate
            factor = min(1.0 if lifted else self.growth, max(self.shrink, factor))
            reason = f"moved {moved:.2%} for {stage.spent:.2g} of rate spent"
        if lifted:
            reason = f"moved {moved:.1%}, lifted off"
        scale = min(stage.scale * factor, cap)
        return dataclasses.replace(_at(stage, scale, own), lifted=lifted, wanted=scale), reason

    def _shared(
        self, stages: Mapping[str, StageState], rates: Mapping[str, float], ceiling: float
    ) -> dict[str, StageState]:
        """All stages at the median of the rates that they ask for."""
        asked = [rates[n] * s.wanted for n, s in stages.items() if rates.get(n) and s.wanted > 0]
        if not asked:
            return dict(stages)
        # The lower of two in the middle: no stage raises another that has lifted off.
        rate = statistics.median_low(asked)
        return {
            n: _at(s, min(rate / rates[n], self._cap(rates[n], ceiling)), rates[n])
            if rates.get(n)
            else s
            for n, s in stages.items()
        }

    def _decision(
        self,
        name: str,
        old: StageState,
        new: StageState,
        reading: Reading,
        reason: str,
        cap: float,
    ) -> Decision | None:
        """The change from ``old`` to ``new``, in words; None if there is none to tell of."""
        lifts = new.lifted and not old.lifted
        if lifts and self.mode == "repair" and new.scale == 1.0:
            return None
        if not lifts and new.scale == old.scale:
            return None
        kind = "lift-off" if lifts else "raise" if new.scale > old.scale else "lower"
        change = f"; rate {old.rate:.1e} → {new.rate:.1e}"
        if new.scale == old.scale:
            change = f"; rate stays {new.rate:.1e}, {new.scale:.4g} times yours"
        elif new.scale == cap:
            change += " (the largest it may have)" if self.mode == "free" else LARGEST
        elif self.mode != "repair" and not math.isclose(new.scale, new.wanted, rel_tol=ROUNDING):
            change += " (the median of all stages)"
        seen = reading.stages[name]
        evidence = (
            f"near-zero density {seen.near_zero:.3f}, untrained {seen.untrained:.3f}, "
            f"after {reading.step} steps; "
        )
        if reason == CHANGED or math.isnan(seen.near_zero):
            evidence = ""
        return Decision(
            reading.step,
            name,
            kind,
            old.scale,
            new.scale,
            old.rate,
            new.rate,
            evidence + reason + change,
        )


def _at(stage: StageState, scale: float, own: float) -> StageState:
    """The stage at another scale; a schedule's rounding is none."""
    if math.isclose(scale, stage.scale, rel_tol=ROUNDING):
        scale = stage.scale
    return dataclasses.replace(stage, scale=scale, rate=own * scale)


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
