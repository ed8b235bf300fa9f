"""Going back after a collapse: the snapshots, and the cap on the rates.

A net that has collapsed does not come back by itself, whatever its rate is then: it has to go
back to where it was healthy.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn
from torch.optim import Optimizer

from densitylr.diagnosis import RECENT, CollapseDetector, CollapseSign
from densitylr.history import (
    BINS,
    Cause,
    Count,
    Decision,
    Reading,
    Size,
    StageReading,
    restored,
)
from densitylr.model import unwrap
from densitylr.policy import PolicyRun
from densitylr.recovery.snapshot import Snapshot, finite

__all__ = ["Recovery"]

SOON = 50
"""Steps after a recovery within which the rate itself is taken to be the cause of a collapse."""

QUARTER = 0.25

JUMP = 2.0
"""Growth of a rate from one reading to the next that may be the beginning of a collapse."""

SHARE, RARE = 20, 50
"""From one snapshot to the next there are 1 / SHARE of the steps so far, at most RARE."""

TRIES = 6
"""Recoveries, each soon after the last one, after which nothing more is done."""


@dataclass(frozen=True)
class RecoveryState:
    """What a checkpoint holds of a `Recovery`; see there."""

    cap: Mapping[str, Size]
    count: Count
    last: Count
    since: Count
    max_effective_lr: Mapping[str, Size]
    healthy: bool
    first: Reading | None
    recent: list[Reading]


class Recovery:
    """Snapshots of healthy states, and what to do at a collapse.

    At first every healthy reading takes a snapshot; later, as snapshots then cost more than the
    steps that would be lost, one is taken each twentieth of the steps so far, at most 50 apart. Two
    are kept. Training goes back to the newer one; to the older one where the newer may have been
    taken when the collapse had begun but did not show: a rate had just grown, or training has
    collapsed soon after it had gone back. They cost twice the memory of parameters, buffers and
    optimizer state, where those are: with Adam six times that of the parameters.

    After a recovery each stage's learning rate is capped at the largest value it had while training
    was healthy. Stages that the policy is still adjusting are capped at the largest healthy rate of
    any stage. If training collapses again within 50 steps or three healthy readings, the rate
    itself is the cause, and the cap is made in the same way from a quarter of the rates then in
    force. After 6 such recoveries in a row nothing more is done.

    A checkpoint holds no snapshot, as it is one: where its last reading was healthy, its state is
    what a resumed run goes back to, until a reading has taken another. So the model's weights are
    to be loaded before the first step. It holds the last healthy readings, too, and the peaks since
    the last of them.

    Attributes:
        cap: largest effective rate of each stage; empty before the first recovery.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.model, self.optimizer = unwrap(model), optimizer
        self.detector = CollapseDetector()
        self.cap: dict[str, float] = {}
        self.count = 0
        self.last = 0
        self.given_up = False
        self._snapshots: list[Snapshot] = []
        self._target: Snapshot | None = None
        self._top = 0.0
        self._since = 0  # healthy readings since the last recovery
        # The largest rates until the last healthy reading, and those from there on.
        self._max_effective_lr: Mapping[str, float] = {}
        self._effective_lr: Mapping[str, float] = {}
        self._loaded: Snapshot | None = None  # of a checkpoint, until the first step from it

    def factor(self, stage: str, rate: float) -> float:
        """What keeps an effective rate within the cap: 1 or less."""
        cap = self.cap.get(stage, math.inf)
        return cap / rate if rate > cap else 1.0

    def look(self, reading: Reading) -> CollapseSign | None:
        """The sign of a collapse, to be passed to `see`; the policy is not asked then."""
        return None if self.given_up else self.detector.look(reading)

    @property
    def healthy(self) -> bool:
        """Whether the last reading showed no sign of a collapse, or recovery has given up."""
        return self.given_up or self.detector.healthy

    def see(
        self,
        step: int,
        sign: CollapseSign | None,
        rates: Mapping[str, float],
        scales: Mapping[str, float],
        run: PolicyRun,
    ) -> Decision | None:
        """Take a snapshot, or decide to go back: `go_back` does so after the step.

        Args:
            step: of the reading, of the forward before this step.
            sign: what `look` has found in it.
            rates: the user's rate of each stage.
            scales: the factors on them that are in force.
            run: the policy at work; a stage that is decided keeps a cap of its own.
        """
        if self.given_up:
            return None
        force = {name: rates[name] * scales[name] for name in rates}
        if self.detector.healthy:
            self._since += 1
            past = self._effective_lr or force
            self._max_effective_lr = {
                n: max(r, past[n]) for n, r in (self._max_effective_lr or past).items()
            }
            self._effective_lr = force
            if self._due(step, run) and finite(self.model, self.optimizer):
                self._take(step, run)
        if sign is None or not self._snapshots:
            return None
        return self._decide(step, sign, force, scales)

    def _due(self, step: int, run: PolicyRun) -> bool:
        """Whether the newest snapshot is old, a stage has been decided on since (its twin is gone,
        so that it could not be judged anew), or a rate is about to jump.
        """
        if not self._snapshots:
            return True
        newest = self._snapshots[-1]
        jumps = any(
            rate > JUMP * self._max_effective_lr[n] for n, rate in self._effective_lr.items()
        )
        decided = run.undecided != newest.undecided
        return jumps or decided or not 0 < step - newest.step < min(RARE, step // SHARE)

    def _take(self, step: int, run: PolicyRun) -> None:
        room = self._snapshots.pop(0) if len(self._snapshots) > 1 else None
        rates, largest = self._effective_lr, self._max_effective_lr
        taken = self._taken(step, rates, run, largest, top=self._top, room=room)
        self._top = 0.0
        self._snapshots.append(taken)

    def _decide(
        self, step: int, sign: CollapseSign, force: Mapping[str, float], scales: Mapping[str, float]
    ) -> Decision:
        # Readings may be as far apart as that: then the healthy ones count.
        again = self.count > 0 and (step - self.last <= SOON or self._since < RECENT)
        self._since = 0
        target = self._choose(again)
        self.count = self.count + 1 if again else 1
        self.last = step
        name = sign.stage
        numbers: dict[str, Any] = {**sign.numbers, "gave_up": False, "tries": TRIES, "again": again}
        before = force[name]
        if self.count > TRIES:
            self.given_up, self._snapshots = True, []
            numbers["gave_up"] = True
        else:
            self._target = target
            self._snapshots = self._snapshots[: self._snapshots.index(target) + 1]
            self._max_effective_lr, self._effective_lr = target.max_effective_lr, target.rates
            self.detector.go_back(target.recent)
            held, share = (force, QUARTER) if again else (target.max_effective_lr, 1.0)
            most = max(held.values())
            waiting = target.waiting
            new = {n: share * (most if n in waiting else r) for n, r in held.items()}
            # A schedule that starts at 0 has been healthy at 0, with which nothing is trained.
            new = {n: r if r > 0 else QUARTER * force[n] for n, r in new.items()}
            self.cap |= {n: min(r, self.cap.get(n, r)) for n, r in new.items() if r > 0}
            numbers |= {"target": target.step, "cap": self.cap.get(name, 0.0)}
        factor = self.factor(name, before)
        return Decision(
            step,
            name,
            "recover",
            scales[name],
            scales[name] * factor,
            before,
            before * factor,
            Cause.COLLAPSE,
            numbers,
            sign.since,
        )

    def _choose(self, again: bool) -> Snapshot:
        """The newer snapshot, unless it may have been taken in the midst of it."""
        old, new = self._snapshots[0], self._snapshots[-1]
        jumped = new.top > JUMP * old.top
        raised = any(
            rate > JUMP * old.max_effective_lr[n] for n, rate in new.max_effective_lr.items()
        )
        return old if again or jumped or raised else new

    def stepped(self) -> None:
        """To be called after each step, while the user's rates are those of that step."""
        if not self.given_up:
            self._top = max(self._top, self._largest())

    def _largest(self) -> float:
        return max(float(group["lr"]) for group in self.optimizer.param_groups)

    def go_back(self) -> Snapshot | None:
        """Restore what `see` has decided on; to be called when no step is running."""
        target, self._target = self._target, None
        if target is not None:
            target.restore(self.model, self.optimizer)
        return target

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers; snapshots are not part of it."""
        return {
            "cap": dict(self.cap),
            "count": self.count,
            "last": self.last,
            "since": self._since,
            "max_effective_lr": dict(self._max_effective_lr),
            "healthy": self.detector.healthy,
            "first": None if self.detector.first is None else _plain(self.detector.first),
            "recent": [_plain(reading) for reading in self.detector.recent],
        }

    @staticmethod
    def restored(state: Mapping[str, Any], stages: Collection[str]) -> RecoveryState:
        """What `state_dict` has said, to be passed to `load`; nothing is changed yet.

        Args:
            state: it.
            stages: the names of all stages.

        Raises:
            KeyError, TypeError, ValueError: it is damaged.
        """
        first, recent = state["first"], [_with_histograms(reading) for reading in state["recent"]]
        first = first if first is None else _with_histograms(first)
        found: RecoveryState = restored(RecoveryState, {**state, "first": first, "recent": recent})
        known: list[Mapping[str, Any]] = [
            reading.stages for reading in (found.first, *found.recent) if reading is not None
        ]
        if found.max_effective_lr:
            known.append(found.max_effective_lr)
        if any(held.keys() != set(stages) for held in known) or not found.cap.keys() <= set(stages):
            raise ValueError("what is known of the last healthy readings is of other stages")
        return found

    def load(
        self, state: RecoveryState, step: int, force: Mapping[str, float], run: PolicyRun
    ) -> None:
        """Go on from a checkpoint that has been loaded: a healthy one is what to go back to.

        Args:
            state: of `restored`.
            step: of the checkpoint.
            force: the rate of each stage, the user's times its scale.
            run: the policy at work.
        """
        self.forget()
        self.cap, self.count, self.last = dict(state.cap), state.count, state.last
        self._since = state.since
        if state.first is not None:
            self.detector.first, self.detector.recent = state.first, list(state.recent)
        self.detector.healthy = state.healthy
        if self.detector.healthy and finite(self.model, self.optimizer):
            self._max_effective_lr, self._effective_lr = state.max_effective_lr or force, force
            self._loaded = self._taken(step, force, run, self._max_effective_lr)
            self._snapshots = [self._loaded]

    def begin(self) -> None:
        """To be called before each step: the weights may have been loaded after our state."""
        loaded, self._loaded = self._loaded, None
        if loaded is None or loaded.current(self.model, self.optimizer):
            return
        self._snapshots = []
        if finite(self.model, self.optimizer):
            again = Snapshot(loaded.step, self.model, self.optimizer, loaded.rates, loaded.run)
            again.undecided, again.waiting = loaded.undecided, loaded.waiting
            again.max_effective_lr, again.top = loaded.max_effective_lr, self._largest()
            again.recent = tuple(self.detector.recent)
            self._snapshots = [again]

    def _taken(
        self,
        step: int,
        force: Mapping[str, float],
        run: PolicyRun,
        largest: Mapping[str, float],
        *,
        top: float = 0.0,
        room: Snapshot | None = None,
    ) -> Snapshot:
        taken = Snapshot(step, self.model, self.optimizer, force, run.now, room)
        taken.undecided, taken.waiting = run.undecided, run.waiting
        taken.top, taken.max_effective_lr = top or self._largest(), largest
        taken.recent = tuple(self.detector.recent)
        return taken

    def forget(self) -> None:
        """Let all snapshots go."""
        self.detector = CollapseDetector()
        self._snapshots, self._target, self._loaded = [], None, None
        self._max_effective_lr, self._effective_lr = {}, {}
        self.given_up = False


def _plain(reading: Reading) -> dict[str, Any]:
    """A reading for a checkpoint, without what shows no collapse."""
    left_out = ("histogram", "alignment")
    names = [f.name for f in dataclasses.fields(StageReading) if f.name not in left_out]
    stages = {
        stage: {name: getattr(seen, name) for name in names}
        for stage, seen in reading.stages.items()
    }
    return {"step": reading.step, "stages": stages}


def _with_histograms(plain: Mapping[str, Any]) -> dict[str, Any]:
    """What `_plain` has left out."""
    empty = {"histogram": np.zeros(BINS, dtype=np.int64)}
    return {**plain, "stages": {n: {**numbers, **empty} for n, numbers in plain["stages"].items()}}
