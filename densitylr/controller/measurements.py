"""What is read of a model for a policy: activations, alignment, norms; and what is released."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import nn

from densitylr.controller.param_groups import StageRate
from densitylr.history import Reading, restored
from densitylr.model import Ranks, Stage, untrainable
from densitylr.monitor import Alignment, Baseline, DensityMonitor, Norms, StageNorms, zero_gradients
from densitylr.policy import PolicyRun, StageView

__all__ = ["Measurements", "first_view"]


class Measurements:
    """The monitor of a model, and what else a policy needs of its weights and gradients.

    Args:
        model: the model; hooks are put on its layers.
        baseline: the model as it was before training.
        run: the policy at work.
        watching: read what shows a collapse, too.
        ranks: those that train the same model.
        ascending: ids of parameters that go up their gradient (``maximize``).
        quiet: do not warn.

    Attributes:
        monitor: the `DensityMonitor`.
    """

    def __init__(
        self,
        model: nn.Module,
        baseline: Baseline,
        run: PolicyRun,
        *,
        watching: bool,
        ranks: Ranks | None,
        ascending: Collection[int],
        quiet: bool,
    ) -> None:
        self.stages, self.run = baseline.stages, run
        needs = run.policy.needs
        self._alignment = (
            Alignment(baseline, ranks, ascending)
            if needs.alignment and not baseline.sharded
            else None
        )
        self._norms = None
        if needs.weights or needs.gradients or needs.updates:
            own = {name: self.stages[name] for name in run.stages}
            self._norms = Norms(
                own, gradients=needs.gradients, updates=needs.updates, ascending=ascending
            )
        # Which twins are of use is known once the schedule has set the rates of a first step.
        self._rates_known = False
        self._witness: str | None = None
        self._twinned = set(self.stages)
        self.monitor = DensityMonitor(
            model, every=None, baseline=baseline, watching=watching, guard=True, quiet=quiet
        )
        self.monitor.ranks = ranks

    def close(self) -> None:
        """Take all hooks off the model, and free what was kept."""
        self.monitor.close()
        if self._alignment is not None:
            self._alignment.keep(())
        if self.monitor.ranks is not None:
            self.monitor.ranks.close()

    def add_alignment(self, now: Mapping[str, StageRate]) -> None:
        """Look at the gradients of the step that is about to be taken.

        Args:
            now: the user's rates; a stage that does not move has no alignment.
        """
        if self._alignment is None:
            return
        if moving := [name for name in self.run.aligned if now[name].lr > 0]:
            self._alignment.add(moving)

    def read(self, step: int, *, alignment: bool) -> Reading | None:
        """End a reading, if one is due and the model was called; see `DensityMonitor.collect`.

        Args:
            step: optimizer steps done.
            alignment: put the mean alignment since the last reading into it.
        """

        def add(numbers: dict[str, dict[str, Any]]) -> None:
            for name in zero_gradients(step, numbers, self.stages, self.monitor.ranks):
                numbers[name]["zero_gradient"] = 1.0
            if alignment and self._alignment is not None:
                for name, value in self._alignment.take(step).items():
                    numbers[name]["alignment"] = value

        return self.monitor.collect(step, add)

    def watches_alignment(self, reading: Reading, now: Mapping[str, StageRate]) -> bool:
        """Whether the alignment of a stage is being measured. It is only informative over a few
        steps, so readings stay frequent.
        """
        return any(
            math.isfinite(reading.stages[name].alignment) and now[name].lr > 0
            for name in self.run.aligned
        )

    def views(
        self, step: int, now: Mapping[str, StageRate], reading: Reading | None
    ) -> dict[str, StageView]:
        """What the policy is shown of each stage that it may act on."""
        alignment: Mapping[str, float] = {}
        if self._alignment is not None and reading is None:
            alignment = self._alignment.take(step)
        norms = self._norms.measure(step) if self._norms is not None else {}
        scales, views = self.run.now.scales, {}
        for name in self.run.stages:
            norm = norms.get(name, StageNorms())
            seen = reading.stages[name] if reading is not None else None
            views[name] = dataclasses.replace(
                first_view(self.stages[name], now[name]),
                scale=scales[name],
                weight_norm=norm.weight,
                gradient_norm=norm.gradient,
                update_norm=norm.update,
                update_alignment=norm.alignment,
                alignment=alignment.get(name, math.nan) if seen is None else seen.alignment,
                reading=seen,
            )
        return views

    def forget(self) -> None:
        """The weights were put back: what has happened since the last reading does not count."""
        self.monitor.forget_peaks()
        if self._norms is not None:
            self._norms.forget()

    def keep_first_weights(self) -> None:
        """Free the first weights of stages whose alignment is not asked for any more."""
        if self._alignment is not None:
            self._alignment.keep(self.run.first_weights.union(untrainable(self.stages)))

    def release_twins(self, now: Mapping[str, StageRate]) -> None:
        """Once the rates are known, free the twins that are of no use; later, as they become so."""
        if not self._rates_known:
            if not any(rate.lr > 0 for rate in now.values()):
                return
            self._rates_known = True
            # If no twin is needed that of the last layer, which moves first, tells slow from still.
            if not self.run.compared - set(untrainable(self.stages)) and self.run.stages:
                self._witness = self.run.stages[-1]
        self._release_unused()

    def _release_unused(self) -> None:
        kept = {*self.run.compared, *untrainable(self.stages)}  # what is frozen may thaw
        kept |= self.run.undecided & {self._witness}
        for name in self._twinned - kept:
            self.monitor.release_twin(name)
        self._twinned &= kept

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, and the tensors of the twins and first weights that are kept."""
        state = {
            "rates_known": self._rates_known,
            "witness": self._witness,
            "layers": self.monitor.state_dict(),
        }
        if self._alignment is not None:
            state["alignment"] = self._alignment.state_dict()
        return state

    def prepare(self, state: Mapping[str, Any]) -> Callable[[], None]:
        """Check a state; the result goes on as another run of such a model, with nothing armed.

        Raises:
            KeyError, ValueError: it is damaged.
        """
        rates_known = restored(bool, state["rates_known"])
        witness = restored(str | None, state["witness"])
        loads = [self.monitor.prepare(state["layers"])]
        if self._alignment is not None:
            loads.append(self._alignment.prepare(state.get("alignment", {})))

        def apply() -> None:
            self._rates_known, self._witness = rates_known, witness
            for load in loads:
                load()
            if self._norms is not None:
                self._norms.forget()
            self._twinned = set(self.stages)
            if self._rates_known:
                self._release_unused()
            self.monitor.disarm()

        return apply


def first_view(stage: Stage, rate: StageRate) -> StageView:
    """A stage at its user's rate, of which nothing else is known yet."""
    return StageView(
        lr=rate.lr,
        max_lr=rate.max_lr,
        scale=1.0,
        fan_in=_fan_in(stage),
        build_up=rate.build_up,
        optimizer=rate.optimizer,
        trainable=stage.name not in untrainable({stage.name: stage}),
    )


def _fan_in(stage: Stage) -> int:
    """Inputs of a unit in the first layer that has a weight matrix."""
    for layer in stage.layers.values():
        for weight in layer.parameters():
            if weight.ndim >= 2:
                return max(1, math.prod(weight.shape[1:]))
    return 1
