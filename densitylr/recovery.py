"""Going back after a collapse: the snapshots, and the cap on the rates.

A net that has collapsed does not come back by itself, whatever its rate is then: it has to go
back to where it was healthy.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn
from torch.optim import Optimizer

from densitylr.collapse import RECENT, Evidence, Watch
from densitylr.density import BINS
from densitylr.policy import LawState
from densitylr.records import Decision, Reading, StageReading
from densitylr.snapshot import Snapshot, finite
from densitylr.stages import unwrap

__all__ = ["Recovery"]

SOON = 50
"""Steps after a recovery within which a collapse is laid to the rate itself."""

QUARTER = 0.25

JUMP = 2.0
"""Growth of a rate from one probe to the next that may be the beginning of a collapse."""

SHARE, RARE = 20, 50
"""From one snapshot to the next there are 1 / SHARE of the steps so far, at most RARE."""

TRIES = 6
"""Recoveries, each soon after the last one, after which we give up."""


class Recovery:
    """Snapshots of healthy states, and what to do at a collapse.

    At first every healthy probe takes a snapshot; later, as snapshots then cost more than the steps
    that would be lost, one is taken each twentieth of the steps so far, at most 50 apart. Two are
    kept. Training goes back to the newer one; to the older one where the newer may have been
    taken when the collapse had begun but did not show: a rate had just grown, or training has
    collapsed soon after it had gone back. They cost twice the memory of parameters, buffers and
    optimizer state, where those are: with Adam six times that of the parameters.

    After a recovery no stage's rate exceeds the largest it had while healthy, or, where the law is
    not done with it, the largest that any stage had. If training collapses again within 50 steps or
    three healthy probes, the rate itself is the cause, and the cap is made in the same way from
    a quarter of the rates then in force. After 6 such recoveries in a row nothing more is done.

    A checkpoint holds no snapshot, as it is one: where its last reading was healthy, its state is
    what a resumed run goes back to, until a probe has taken another. So the model's weights are to
    be loaded before the first step. It holds the last healthy readings, too, and the peaks since
    the last of them.

    Attributes:
        cap: largest effective rate of each stage; empty before the first recovery.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.model, self.optimizer = unwrap(model), optimizer
        self.watch = Watch()
        self.cap: dict[str, float] = {}
        self.count = 0
        self.last = 0
        self.given_up = False
        self._snapshots: list[Snapshot] = []
        self._target: Snapshot | None = None
        self._top = 0.0
        self._since = 0  # healthy probes since the last recovery
        self._acted: Mapping[str, float] = {}  # the largest rates until the last healthy probe …
        self._force: Mapping[str, float] = {}  # … and those from there on
        self._loaded: Snapshot | None = None  # of a checkpoint, until the first step from it

    def factor(self, stage: str, rate: float) -> float:
        """What keeps an effective rate within the cap: 1 or less."""
        cap = self.cap.get(stage, math.inf)
        return cap / rate if rate > cap else 1.0

    def look(self, reading: Reading) -> Evidence | None:
        """The evidence of a collapse, to be passed to `see`; the law has no say in one then."""
        return None if self.given_up else self.watch.see(reading)

    @property
    def healthy(self) -> bool:
        """Whether nothing speaks against the last reading, or nobody looks any more."""
        return self.given_up or self.watch.healthy

    def see(
        self,
        step: int,
        found: Evidence | None,
        rates: Mapping[str, float],
        scales: Mapping[str, float],
        law: LawState,
    ) -> Decision | None:
        """Take a snapshot, or decide to go back: `go_back` does so after the step.

        Args:
            step: of the reading, of the forward before this step.
            found: what `look` has said to it.
            rates: the user's rate of each stage.
            scales: the factors on them that are in force.
            law: the state of the law; a lifted stage keeps a cap of its own.
        """
        if self.given_up:
            return None
        force = {name: rates[name] * scales[name] for name in rates}
        if self.watch.healthy:
            self._since += 1
            past = self._force or force
            self._acted = {n: max(r, past[n]) for n, r in (self._acted or past).items()}
            self._force = force
            if self._due(step, law) and finite(self.model, self.optimizer):
                self._take(step, law)
        if found is None or not self._snapshots:
            return None
        return self._decide(step, found, force, scales)

    def _due(self, step: int, law: LawState) -> bool:
        """Whether the newest snapshot is old, a stage has lifted off since (its twin is gone, so
        that it could not be judged anew), or a rate is about to jump.
        """
        if not self._snapshots:
            return True
        newest = self._snapshots[-1]
        jumps = any(rate > JUMP * self._acted[n] for n, rate in self._force.items())
        lifted = [s.lifted for s in law.stages.values()] != [
            s.lifted for s in newest.law.stages.values()
        ]
        return jumps or lifted or not 0 < step - newest.step < min(RARE, step // SHARE)

    def _take(self, step: int, law: LawState) -> None:
        room = self._snapshots.pop(0) if len(self._snapshots) > 1 else None
        taken = self._taken(step, self._force, law, self._acted, top=self._top, room=room)
        self._top = 0.0
        self._snapshots.append(taken)

    def _decide(
        self, step: int, found: Evidence, force: Mapping[str, float], scales: Mapping[str, float]
    ) -> Decision:
        # Probes may be as far apart as that: then the healthy ones count.
        again = self.count > 0 and (step - self.last <= SOON or self._since < RECENT)
        self._since = 0
        target = self._choose(again)
        self.count = self.count + 1 if again else 1
        self.last = step
        name = found.stage
        before = force[name]
        if self.count > TRIES:
            self.given_up, self._snapshots = True, []
            action = f"gave up after {TRIES} recoveries in a row: start again with a lower rate"
        else:
            self._target = target
            self._snapshots = self._snapshots[: self._snapshots.index(target) + 1]
            self._acted, self._force = target.acted, target.rates
            self.watch.go_back(target.recent)
            held, share = (force, QUARTER) if again else (target.acted, 1.0)
            most = max(held.values())
            waiting = {n for n, s in target.law.stages.items() if not s.lifted or s.following}
            new = {n: share * (most if n in waiting else r) for n, r in held.items()}
            # A schedule that starts at 0 has been healthy at 0, with which nothing is trained.
            new = {n: r if r > 0 else QUARTER * force[n] for n, r in new.items()}
            self.cap |= {n: min(r, self.cap.get(n, r)) for n, r in new.items() if r > 0}
            action = (
                f"went back to step {target.step}, rates capped at {self.cap.get(name, 0.0):.1e}"
                + (", a quarter of what they were" if again else ", the largest that was healthy")
            )
        factor = self.factor(name, before)
        return Decision(
            step,
            name,
            "recover",
            scales[name],
            scales[name] * factor,
            before,
            before * factor,
            f"collapsed: {found.reason}; {action}",
            found.since,
        )

    def _choose(self, again: bool) -> Snapshot:
        """The newer snapshot, unless it may have been taken in the midst of it."""
        old, new = self._snapshots[0], self._snapshots[-1]
        jumped = new.top > JUMP * old.top
        raised = any(rate > JUMP * old.acted[n] for n, rate in new.acted.items())
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
            "acted": dict(self._acted),
            "healthy": self.watch.healthy,
            "first": None if self.watch.first is None else _plain(self.watch.first),
            "recent": [_plain(reading) for reading in self.watch.recent],
        }

    def load_state_dict(
        self, state: Mapping[str, Any], step: int, force: Mapping[str, float], law: LawState
    ) -> None:
        """Go on from a checkpoint that has been loaded: a healthy one is what to go back to.

        Args:
            state: what `state_dict` has said; what earlier versions left out starts anew.
            step: of the checkpoint.
            force: the rate of each stage, the user's times its scale.
            law: the state of the law.
        """
        self.forget()
        self.cap, self.count, self.last = dict(state["cap"]), state["count"], state["last"]
        self._since = state["since"]
        if state.get("first") is not None:
            self.watch.first = _reading(state["first"])
            self.watch.recent = [_reading(plain) for plain in state["recent"]]
        self.watch.healthy = state.get("healthy", False)
        if self.watch.healthy and finite(self.model, self.optimizer):
            self._acted, self._force = state["acted"] or force, force
            self._loaded = self._taken(step, force, law, self._acted)
            self._snapshots = [self._loaded]

    def begin(self) -> None:
        """To be called before each step: the weights may have been loaded after our state."""
        loaded, self._loaded = self._loaded, None
        if loaded is None or loaded.current(self.model, self.optimizer):
            return
        self._snapshots = []
        if finite(self.model, self.optimizer):
            self._snapshots = [self._taken(loaded.step, loaded.rates, loaded.law, loaded.acted)]

    def _taken(
        self,
        step: int,
        force: Mapping[str, float],
        law: LawState,
        acted: Mapping[str, float],
        *,
        top: float = 0.0,
        room: Snapshot | None = None,
    ) -> Snapshot:
        taken = Snapshot(step, self.model, self.optimizer, force, law, room)
        taken.top, taken.acted = top or self._largest(), acted
        taken.recent = tuple(self.watch.recent)
        return taken

    def forget(self) -> None:
        """Let all snapshots go."""
        self.watch, self._snapshots, self._target, self._loaded = Watch(), [], None, None
        self._acted, self._force = {}, {}
        self.given_up = False


def _plain(reading: Reading) -> dict[str, Any]:
    """A reading for a checkpoint, without what shows no collapse."""
    left_out = ("histogram", "pull")
    names = [f.name for f in dataclasses.fields(StageReading) if f.name not in left_out]
    stages = {
        stage: {name: getattr(seen, name) for name in names}
        for stage, seen in reading.stages.items()
    }
    return {"step": reading.step, "stages": stages}


def _reading(plain: Mapping[str, Any]) -> Reading:
    empty = np.zeros(BINS, dtype=np.int64)
    stages = {n: StageReading(**numbers, histogram=empty) for n, numbers in plain["stages"].items()}
    return Reading(plain["step"], stages)
