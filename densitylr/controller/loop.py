"""The control loop: from readings to decisions, and to the scales in force.

Here the monitor, the policy and the recovery meet. Nothing in here touches the user's optimizer,
but for a recovery, which restores a snapshot, and for the momentum of a raised stage. The doctor
runs the same loop with ``observe_only``.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from densitylr.controller.measurements import Measurements, first_view
from densitylr.controller.param_groups import RateSource, StageRate, correct_momentum
from densitylr.history import Count, Decision, History, Reading, ReadingSchedule, restored
from densitylr.model import Ranks, RanksError
from densitylr.monitor import Baseline
from densitylr.policy import Observation, Policy, PolicyRun
from densitylr.recovery import Recovery

__all__ = ["ControlLoop"]

UNREAD = 10
"""Steps without a reading, when one is due, after which the user is warned."""

STRICT = False
"""Raise what goes wrong inside the loop, instead of ending the control and letting training go
on."""

_log = logging.getLogger("densitylr")


class ControlLoop:
    """A policy at work: it is given each reading, and has a scale for each stage at all times.

    Args:
        model: the model; hooks are put on its layers.
        baseline: the model as it was before training.
        rates: the user's rates by stage.
        policy: what decides.
        every: steps from one reading to the next, see `densitylr.history.ReadingSchedule`.
        optimizer: what takes the steps, and has their momentum; None if that is not to be touched.
        recovery: what goes back after a collapse, if anything.
        observe_only: decide, but leave all scales at 1.
        ranks: those that train the same model.
        ascending: ids of parameters that go up their gradient (``maximize``).
        quiet: neither warn nor log.
        on_failure: called once with an error inside the loop; by default it is logged.

    Attributes:
        steps: optimizer steps taken.
        loss: of the step to come, if it was passed to ``observe_loss``.
    """

    def __init__(
        self,
        model: nn.Module,
        baseline: Baseline,
        rates: RateSource,
        policy: Policy,
        *,
        every: int,
        optimizer: Optimizer | None = None,
        recovery: Recovery | None = None,
        observe_only: bool = False,
        ranks: Ranks | None = None,
        ascending: Collection[int] = (),
        quiet: bool = False,
        on_failure: Callable[[str, Exception], None] | None = None,
    ) -> None:
        needs = policy.needs
        self.rates, self.policy, self.recovery = rates, policy, recovery
        self.stages = rates.stages
        self.observe_only = observe_only
        self.steps = 0
        self.loss: Any = None
        self._optimizer = optimizer
        now, excluded = rates.now(), baseline.checks.excluded
        fresh = {name: stage for name, stage in self.stages.items() if name not in excluded}
        self.run = PolicyRun(policy, {n: first_view(s, now[n]) for n, s in fresh.items()})
        reads = needs.every if needs.every and needs.activations else every
        self.schedule = ReadingSchedule(reads, steady=recovery is not None)
        self._pending: list[Decision] = []  # taken since the last reading
        self._unread = self._untold = 0  # steps since a reading, or a loss, was asked for
        self._quiet = quiet
        self._on_failure = on_failure or self._log_failure
        self._measured = Measurements(
            model,
            baseline,
            self.run,
            watching=recovery is not None,
            ranks=ranks,
            ascending=ascending,
            quiet=quiet,
        )
        self.monitor = self._measured.monitor
        self.monitor.on_failure = self.give_up
        self.monitor.arm(example_variance=True)

    @property
    def history(self) -> History:
        return self.monitor.history

    @property
    def acting(self) -> bool:
        """Whether the scales of the policy are in force."""
        return not (self.observe_only or self.monitor.closed)

    @property
    def scales(self) -> dict[str, float]:
        """The factor now in force on the user's learning rate of each stage."""
        if not self.acting:
            return dict.fromkeys(self.stages, 1.0)
        chosen = self.run.now.scales
        scales = {name: chosen.get(name, 1.0) for name in self.stages}
        if self.recovery is None or not self.recovery.cap:
            return scales
        now = self.rates.now()
        return {n: s * self.recovery.factor(n, now[n].lr * s) for n, s in scales.items()}

    @property
    def scaled(self) -> bool:
        """Whether any scale in force may differ from 1."""
        return self.acting and (
            any(scale != 1.0 for scale in self.run.now.scales.values())
            or (self.recovery is not None and bool(self.recovery.cap))
        )

    def observe(self, only: bool) -> None:
        """From here on decide only, or act on what is decided."""
        before = self.scales
        self.observe_only = only
        self._correct_momentum(before)

    # What a training does

    def before_step(self) -> None:
        """The gradients of a step are there: read, and decide, where that is due."""
        with self._guarded("the reading"):
            if self.recovery is not None:
                self.recovery.begin()
            if self.run.aligned:
                self._measured.add_alignment(self.rates.now())
            if not self.policy.needs.activations and self._policy_due():
                self._pending += self._update(self.rates.now(), None)
            by_readings = self.policy.needs.activations
            reading = self._measured.read(self.steps, alignment=by_readings)
            if reading is None:
                self._miss()
            else:
                self._unread = 0
                self._take(reading)

    def after_step(self) -> None:
        """Count a step that is over, go back if that was decided, and read again when it is due."""
        with self._guarded("the end of a step"):
            self.steps += 1
            self.loss = None
            if self.recovery is not None:
                self.recovery.stepped()
            self._go_back()
            if self.steps >= self.schedule.due and not self.monitor.closed:
                self.monitor.arm(example_variance=self.schedule.young(self.steps))

    def without_a_step(self) -> None:
        """Steps are skipped for long: see whether training has collapsed, and go back."""
        if self.recovery is None or self.monitor.closed:
            return
        with self._guarded("the reading"):
            self.recovery.begin()
            reading = self._measured.read(self.steps, alignment=False)
            if reading is not None:
                self._unread = 0
                sign = self.recovery.look(reading)
                if sign is not None:
                    self._record(reading, self.rates.now(), sign, [], False)
            self._go_back()
            self.monitor.arm()

    def close(self) -> None:
        """Take all hooks off the model, and free what was kept."""
        self._measured.close()
        if self.recovery is not None:
            self.recovery.forget()

    def give_up(self, doing: str, error: Exception) -> None:
        """End the control after an error of ours; training goes on at the user's rates."""
        if STRICT:
            raise error
        if not self.monitor.closed:
            self._on_failure(doing, error)
        self.monitor.close()

    def _log_failure(self, doing: str, error: Exception) -> None:
        _log.error(
            "densitylr: %s failed at step %d, so nothing is watched or scaled any more; training "
            "goes on at your own rates. Please report this.",
            doing,
            self.steps,
            exc_info=error,
        )

    def _guarded(self, doing: str) -> _Guard:
        return _Guard(self, doing)

    # A reading

    def _take(self, reading: Reading) -> None:
        """What a reading leads to, just before a step."""
        now = self.rates.now()
        sign = self.recovery.look(reading) if self.recovery is not None else None
        decisions, before = self._pending, self.run.now.scales
        self._pending = []
        if sign is None and self.policy.needs.activations:
            decisions = decisions + self._update(now, reading)
        self._record(reading, now, sign, decisions, self.run.now.scales != before)

    def _record(
        self,
        reading: Reading,
        now: Mapping[str, StageRate],
        sign: Any,
        decisions: list[Decision],
        moved: bool,
    ) -> None:
        rates = {name: rate.lr for name, rate in now.items()}
        if self.recovery is not None:
            event = self.recovery.see(reading.step, sign, rates, self.scales, self.run)
            decisions = [*decisions, event] if event is not None else decisions
        watched = self._measured.watches_alignment(reading, now)
        self.schedule.read(reading.step, bool(decisions) or moved or watched)
        self.history.record(reading, rates, self.scales, decisions)
        for decision in decisions:
            self._say(decision)
        if self.recovery is None or self.recovery.healthy:
            self._measured.release_twins(now)

    # The policy

    def _policy_due(self) -> bool:
        every = self.policy.needs.every or self.schedule.every
        return self.steps % every == 0 and not self.monitor.closed

    def _update(self, now: Mapping[str, StageRate], reading: Reading | None) -> list[Decision]:
        """Let the policy decide."""
        views = self._measured.views(self.steps, now, reading)
        before = self.scales
        decisions = self.run.update(Observation(self.steps, views, self._told_loss()))
        self._correct_momentum(before)
        self._measured.keep_first_weights()
        return decisions

    def _told_loss(self) -> float | None:
        """The loss of this step; warns once if the policy needs one and none is passed."""
        if not self.policy.needs.loss:
            return None
        if self.loss is not None:
            self._untold = 0
            return float(self.loss)
        self._untold += 1
        if self._untold == UNREAD:
            warnings.warn(
                f"{type(self.policy).__name__} needs the loss, and {UNREAD} steps were taken "
                "without one: call observe_loss(loss) before each step()",
                UserWarning,
                stacklevel=2,
            )
        return None

    def _correct_momentum(self, before: Mapping[str, float]) -> None:
        if self.policy.corrects_momentum and self._optimizer is not None:
            correct_momentum(self._optimizer, self.stages, before, self.scales)

    def _go_back(self) -> None:
        """Restore the snapshot that a recovery has decided on, if one has."""
        target = self.recovery.go_back() if self.recovery is not None else None
        if target is not None:
            self.run.go_back(target.run, self.steps - target.step)
            self._measured.forget()

    def _miss(self) -> None:
        """Warn the user, once, when nothing is read although it is due."""
        self._unread += self.monitor.armed
        if self._unread == UNREAD and not self._quiet:
            warnings.warn(
                f"{UNREAD} steps were taken without a training forward of the model that DensityLR "
                "was given, so nothing is read and no rate is changed; is it a copy that is "
                "trained, is it in evaluation mode, or was it compiled and called before "
                "DensityLR was made (then call torch.compiler.reset() first)?",
                UserWarning,
                stacklevel=2,
            )

    def _say(self, decision: Decision) -> None:
        ranks = self.monitor.ranks
        if self._quiet or (ranks is not None and ranks.rank):
            return  # on one rank is enough
        first = sum(d.stage == decision.stage for d in self.history.decisions) == 1
        starved = self.policy.within_user_rates and first and decision.kind == "raise"
        _log.log(
            logging.WARNING if starved or decision.kind == "recover" else logging.INFO,
            "densitylr: %s%s",
            "would have changed " if self.observe_only else "",
            decision,
        )

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, and the tensors of the twins and first weights that are kept."""
        ours = {
            "steps": self.steps,
            "schedule": self.schedule.state_dict(),
            "policy": self.run.state_dict(),
            "history": self.history.state_dict(),
            "measurements": self._measured.state_dict(),
        }
        if self.recovery is not None:
            ours["recovery"] = self.recovery.state_dict()
        return ours

    def load_state_dict(self, ours: Mapping[str, Any]) -> None:
        """Go on from a state dict of this policy and these stages.

        Raises:
            ValueError: it is damaged, or of another policy. Nothing has been changed then.
        """
        self.prepare(ours)()

    def prepare(self, ours: Mapping[str, Any]) -> Callable[[], None]:
        """Check a state dict; the result applies it, and does not fail.

        Raises:
            ValueError: it is damaged, or of another policy or other stages.
        """
        try:
            steps = restored(Count, ours["steps"])
            schedule = self.schedule.restored(ours["schedule"])
            run = self.run.restored(ours["policy"])
            decisions = History.decisions_of(ours["history"])
            load_measurements = self._measured.prepare(ours["measurements"])
            recovery = None
            if self.recovery is not None and ours.get("recovery") is not None:
                recovery = Recovery.restored(ours["recovery"], self.stages)
        except ValueError:
            raise
        except Exception as error:
            raise ValueError(
                f"the state dict is damaged: {type(error).__name__}: {error}"
            ) from error
        unknown = run.scales.keys() - self.stages.keys()
        if unknown:
            raise ValueError(
                f"the state dict has stages {sorted(unknown)}, this model {list(self.stages)}"
            )

        def apply() -> None:
            self.steps, self.schedule = steps, schedule
            self.run.load(run)
            self.history.begin_with(decisions)
            if self.recovery is not None and recovery is not None:
                self.recovery.cap = dict(recovery.cap)  # it is part of the scales
                now, scales = self.rates.now(), self.scales
                force = {name: now[name].lr * scale for name, scale in scales.items()}
                self.recovery.load(recovery, steps, force, self.run)
            load_measurements()
            if steps >= self.schedule.due and not self.monitor.closed:
                self.monitor.arm(example_variance=self.schedule.young(steps))

        return apply


class _Guard:
    """Errors inside the loop do not reach the training, except warnings, ranks that no longer
    agree, and errors in a policy of the user's.
    """

    def __init__(self, loop: ControlLoop, doing: str) -> None:
        self.loop, self.doing = loop, doing

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: Any) -> bool:
        if kind is None or not issubclass(kind, Exception):
            return False
        if issubclass(kind, (RanksError, Warning)):
            return False
        if not type(self.loop.policy).__module__.startswith("densitylr."):
            return False
        self.loop.give_up(self.doing, error)
        return True
