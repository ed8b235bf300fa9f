"""Readings by hand: a displacement a stage, and what else is asked for, and a policy on them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from densitylr import Decision, History, Observation, Policy, Reading, StageReading, StageView
from densitylr.history import BINS
from densitylr.policy import BuildUp, PolicyRun


def stage_reading(displacement: float = 0.0, **numbers: Any) -> StageReading:
    defaults: dict[str, Any] = {
        "near_zero": 0.08 * math.exp(-max(-5.0, displacement)),
        "untrained": 0.08,
        "displacement": displacement,
        "estimator": "twin",
        "near_zero_present": 0.08,
        "mean": 0.01,
        "rms": 1.0,
        "rms0": 1.0,
        "count": 2**17,
        "nonfinite": 0,
        "histogram": np.arange(BINS, dtype=np.int64),
    }
    return StageReading(**{**defaults, **numbers})


def reading(step: int, displacements: Mapping[str, float]) -> Reading:
    return Reading(step, {name: stage_reading(d) for name, d in displacements.items()})


class Play:
    """A policy at work on readings by hand.

    Args:
        policy: what decides.
        rates: the user's rate of each stage that it may act on.
        largest: of all of the user's rates; by default the largest of ``rates``.
        build_up: of the optimizer.
    """

    def __init__(
        self,
        policy: Policy,
        rates: Mapping[str, float],
        largest: float | None = None,
        build_up: BuildUp | None = None,
    ) -> None:
        self.policy, self.rates, self.largest = policy, dict(rates), largest
        self.build_up = build_up or BuildUp()
        views = {name: self._view(name, self.rates, largest, 1.0, None) for name in rates}
        self.run = PolicyRun(policy, views)

    def see(
        self,
        seen: Reading,
        rates: Mapping[str, float] | None = None,
        largest: float | None = None,
    ) -> list[Decision]:
        """Let it decide at a reading, under other rates than at first where they are given."""
        rates = self.rates if rates is None else rates
        largest = self.largest if largest is None else largest
        scales = self.run.scales
        return self.run.update(
            Observation(
                seen.step,
                {
                    name: self._view(name, rates, largest, scales[name], seen.stages[name])
                    for name in self.run.stages
                },
            )
        )

    def resume(self) -> None:
        """Go on from a checkpoint that was written to a file."""
        saved = json.loads(json.dumps(self.run.state_dict()))
        views = {name: self._view(name, self.rates, self.largest, 1.0, None) for name in self.rates}
        self.run = PolicyRun(self.policy, views)
        self.run.load(self.run.restored(saved))

    @property
    def scales(self) -> dict[str, float]:
        return self.run.scales

    def memory(self, stage: str) -> Any:
        """What the policy remembers of a stage."""
        return self.run.now.state.stages[stage]

    def _view(
        self,
        name: str,
        rates: Mapping[str, float],
        largest: float | None,
        scale: float,
        seen: StageReading | None,
    ) -> StageView:
        most = max(rates.values()) if largest is None else largest
        alignment = math.nan if seen is None else seen.alignment
        return StageView(
            rates[name], most, scale, build_up=self.build_up, alignment=alignment, reading=seen
        )


def play(
    policy: Policy, traces: Iterable[tuple[float, ...]], rates: Mapping[str, float], every: int = 5
) -> tuple[list[dict[str, float]], list[Decision], Play]:
    """Scales after each reading, and all decisions, for stages named by ``rates``."""
    game, scales, decisions = Play(policy, rates), [], []
    for i, moved in enumerate(traces):
        decisions += game.see(reading(every * i, dict(zip(rates, moved, strict=True))))
        scales.append(game.scales)
    return scales, decisions, game


def history_of(
    traces: Mapping[str, list[StageReading]],
    rates: Mapping[str, float],
    *,
    every: int = 5,
    decisions: Mapping[int, list[Decision]] | None = None,
) -> History:
    """One reading every so many steps; ``decisions`` by step."""
    history = History()
    for i in range(max(len(trace) for trace in traces.values())):
        step = every * i
        seen = Reading(step, {name: trace[i] for name, trace in traces.items()})
        history.record(seen, rates, dict.fromkeys(rates, 1.0), (decisions or {}).get(step, []))
    return history
