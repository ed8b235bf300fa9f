"""What happens at a probe: from a reading to decisions, and to the scales in force.

Here the eyes, the law and the recovery meet. Nothing in here touches the user's optimizer, but
for a recovery, which puts back a snapshot.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from densitylr.cadence import Cadence
from densitylr.gradients import without_gradient
from densitylr.history import History
from densitylr.momentum import correct_momentum
from densitylr.monitor import DensityMonitor
from densitylr.policy import ROUNDING, LawState, Policy
from densitylr.pull import Pull
from densitylr.rates import StageRates
from densitylr.records import Decision
from densitylr.recovery import Recovery
from densitylr.stages import untrainable

__all__ = ["Decider"]

UNREAD = 10
"""Steps without a reading, when one is due, after which the user is told."""

_log = logging.getLogger("densitylr")


class Decider:
    """The law at work: it takes each reading, and has a scale for each stage at all times.

    Args:
        monitor: the eyes; armed here, whenever a probe is due.
        rates: the user's rates by stage.
        policy: what decides.
        law: the state to begin with, of the stages that ``policy`` may decide on.
        mode: its name; ``"repair"`` raises rates from the user's own, up to the largest of them.
        cadence: when to look.
        stepped: what takes the steps, and has their momentum: the user's optimizer, or what is
            inside it.
        recovery: what goes back after a collapse, if anything.
        observe_only: decide, but leave all scales at 1.
        pull: what looks at the pull of the gradients of followed stages, if anything.

    Attributes:
        steps: optimizer steps taken.
    """

    def __init__(
        self,
        monitor: DensityMonitor,
        rates: StageRates,
        policy: Policy,
        law: LawState,
        *,
        mode: str,
        cadence: Cadence,
        stepped: Optimizer,
        recovery: Recovery | None,
        observe_only: bool,
        pull: Pull | None = None,
    ) -> None:
        self.monitor, self.rates, self.policy, self.law = monitor, rates, policy, law
        self.mode, self.cadence, self.recovery = mode, cadence, recovery
        self._stepped, self._repairs = stepped, mode == "repair"
        self.observe_only = observe_only
        self.pull = pull
        self.steps = 0
        self._unread = 0  # steps since a reading was asked for
        # Which twins are of use is known once the schedule has set the rates of a first step.
        self._twins_due = True

    @property
    def history(self) -> History:
        return self.monitor.history

    @property
    def scales(self) -> dict[str, float]:
        """The factor now in force on the user's learning rate of each stage."""
        if self.observe_only or self.monitor.closed:
            return dict.fromkeys(self.rates.stages, 1.0)
        chosen = self.law.scales
        scales = {name: chosen.get(name, 1.0) for name in self.rates.stages}
        if self.recovery is None or not self.recovery.cap:
            return scales
        rates, _ = self.rates.now()
        return {n: s * self.recovery.factor(n, rates[n] * s) for n, s in scales.items()}

    def observe(self, only: bool) -> None:
        """From here on decide only, or act on what is decided."""
        before = self.scales
        self.observe_only = only
        self._correct_momentum(before)

    def probe(self, *, stepping: bool) -> None:
        """End a probe, if there is one, and decide.

        Args:
            stepping: a step follows; otherwise only a collapse is of interest.
        """
        if self.recovery is not None:
            self.recovery.begin()
        if self.pull is not None and stepping and (following := self._following):
            rates, _ = self.rates.now()
            if moving := [name for name in following if rates[name] > 0]:
                self.pull.add(moving)
        reading = self.monitor.collect(self.steps)
        if reading is None:
            if stepping:
                self._miss()
            return
        self._unread = 0
        reading = without_gradient(reading, self.rates.stages, self.monitor.ranks)
        if self.pull is not None and stepping:
            reading = self.pull.onto(reading)
        rates, ceiling = self.rates.now()
        found = self.recovery.look(reading) if self.recovery is not None else None
        decisions: list[Decision] = []
        moved = False
        if found is None:
            if not stepping:
                return
            before, was = self.scales, self.law.scales
            self.law, decisions = self.policy.decide(self.law, reading, rates, ceiling)
            moved = self.law.scales != was
            self._correct_momentum(before)
            self._let_pull_go()
        if self.recovery is not None:
            event = self.recovery.see(reading.step, found, rates, self.scales, self.law)
            decisions = [*decisions, event] if event is not None else decisions
        # A few steps of a pull tell, and it is not for long.
        pulls = [reading.stages[name].pull for name in self._following if rates[name] > 0]
        followed = self._repairs and any(math.isfinite(pull) for pull in pulls)
        self.cadence.looked(reading.step, bool(decisions) or moved or followed)
        self.history.record(reading, rates, self.scales, decisions)
        for decision in decisions:
            self._say(decision)
        self._let_twins_go(rates, ceiling)

    def stepped(self) -> None:
        """Count a step that is over, go back if that was decided, and look again when it is due."""
        self.steps += 1
        if self.recovery is not None:
            self.recovery.stepped()
        self.go_back()
        self._arm_if_due()

    def go_back(self) -> None:
        """Put back the snapshot that a recovery has decided on, if one has."""
        target = self.recovery.go_back() if self.recovery is not None else None
        if target is not None:
            self.law = target.law.later(self.steps - target.step)
            self.monitor.forget_peaks()

    def look_without_a_step(self) -> None:
        """Where steps are skipped for long: see whether training has collapsed, and go back."""
        if self.recovery is not None and not self.monitor.closed:
            self.probe(stepping=False)
            self.go_back()
            self.monitor.arm()

    def state_dict(self) -> dict[str, Any]:
        """Numbers, and the tensors of the twins that are alive."""
        ours = {
            "steps": self.steps,
            "due": self.cadence.due,
            "decided": self.cadence.decided,
            "first": self.cadence.first,
            "twins_due": self._twins_due,
            "mode": self.mode,
            "law": self.law.to_dict(),
            "history": self.history.state_dict(),
            "taps": self.monitor.state_dict(),
        }
        if self.pull is not None:
            ours["pull"], ours["pull_seen"] = self.pull.state_dict(), self.pull.seen
        if self.recovery is not None:
            ours["recovery"] = self.recovery.state_dict()
        return ours

    def load_state_dict(self, ours: Mapping[str, Any]) -> None:
        """Go on from a state dict of this mode and these stages."""
        self.steps = ours["steps"]
        self.cadence.due = ours["due"]
        self.cadence.decided = ours["decided"]
        self.cadence.first = ours["first"]
        self.law = LawState.from_dict(ours["law"])
        self._twins_due = ours["twins_due"]
        if self.pull is not None:
            self.pull.load_state_dict(ours.get("pull", {}))
            self.pull.seen = ours.get("pull_seen", {})
        self.history.load_state_dict(ours["history"])
        if self.recovery is not None and "recovery" in ours:
            rates, _ = self.rates.now()
            self.recovery.cap = dict(ours["recovery"]["cap"])  # it is part of the scales
            force = {name: rates[name] * scale for name, scale in self.scales.items()}
            self.recovery.load_state_dict(ours["recovery"], self.steps, force, self.law)
        self.monitor.load_state_dict(ours["taps"])
        self._let_lifted_twins_go()
        self.monitor.armed = False
        self._arm_if_due()

    def _correct_momentum(self, before: Mapping[str, float]) -> None:
        # A search raises rates while momentum builds up, and counts with full buffers.
        if self._repairs:
            correct_momentum(self._stepped, self.rates.stages, before, self.scales)

    @property
    def _following(self) -> list[str]:
        return [name for name, stage in self.law.stages.items() if stage.following]

    def _let_pull_go(self) -> None:
        if self.pull is None:
            return
        stages = self.law.stages.items()
        if self._repairs:
            self.pull.keep([name for name, s in stages if s.following or not s.lifted])
        elif any(s.over is not None for _, s in stages) and not self._following:
            self.pull.let_go()

    def _arm_if_due(self) -> None:
        if self.steps >= self.cadence.due and not self.monitor.closed:
            self.monitor.arm(variety=self.cadence.young(self.steps))

    def _miss(self) -> None:
        """Tell the user, once, when nothing is read although it is due."""
        self._unread += self.monitor.armed
        if self._unread == UNREAD:
            warnings.warn(
                f"{UNREAD} steps were taken without a training forward of the model that DensityLR "
                "was given, so nothing is read and no rate is changed; is it a copy that is "
                "trained, is it in evaluation mode, or was it compiled and called before "
                "DensityLR was made (then call torch.compiler.reset() first)?",
                UserWarning,
                stacklevel=2,
            )

    def _let_twins_go(self, rates: Mapping[str, float], ceiling: float) -> None:
        """Once the rates are known, all that nothing can come of; later, those that lift off."""
        if self._twins_due and ceiling > 0:
            self._twins_due = False
            free = list(self.law.stages)
            room = [n for n in free if not self._repairs or 0 < rates[n] < ceiling]
            # With no room anywhere one twin, of the layer that moves first, tells slow from still.
            kept = {*(room or free[-1:]), *untrainable(self.rates.stages)}  # they may thaw
            if self._repairs and room:  # whether the largest rate can be trusted
                kept |= {n for n in free if math.isclose(rates[n], ceiling, rel_tol=ROUNDING)}
            for name in self.rates.stages.keys() - kept:
                self.monitor.let_twin_go(name)
            if self.pull is not None and self._repairs:
                self.pull.keep({*room, *untrainable(self.rates.stages)})
        if self.recovery is None or self.recovery.healthy:
            self._let_lifted_twins_go()

    def _let_lifted_twins_go(self) -> None:
        for name, stage in self.law.stages.items():
            if stage.lifted and not (self._repairs and stage.heeded):
                self.monitor.let_twin_go(name)

    def _say(self, decision: Decision) -> None:
        ranks = self.monitor.ranks
        if ranks is not None and ranks.rank:
            return  # once is enough
        first = sum(d.stage == decision.stage for d in self.history.decisions) == 1
        starved = self.mode == "repair" and first and decision.kind == "raise"
        _log.log(
            logging.WARNING if starved or decision.kind == "recover" else logging.INFO,
            "densitylr: %s%s",
            "would have changed " if self.observe_only else "",
            decision,
        )
