"""Is density what works? The same control with other measurements, or with none.

Every policy here raises a rate from the user's own up to the largest of any group, and does nothing
where all rates are equal, as `densitylr.Repair` does. They differ in what they look at when they
decide.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from densitylr import Needs, Observation, Policy, Repair, StageView
from densitylr.policy import Change, PolicyRun, Scales, StageNeeds, UpdateRatio
from experiments.gauntlet.cells.eyes import (
    Density,
    Eyes,
    FastaiThreshold,
    OutputChange,
    behind,
)

__all__ = ["ABLATIONS", "Trace", "ablation", "close"]

Trace = Sequence[tuple[int, Mapping[str, float]]]
"""Scales by stage, each with the step from which they were in force."""

ABLATIONS = (
    "density",
    "first-probe",
    "post-norm",
    "fastai",
    "output-change",
    "update-ratio",
    "gradient-norm",
    "constant-boost",
    "random-boost",
    "replay",
)


def ablation(
    name: str,
    model: nn.Module,
    seed: int,
    trace: Trace | None = None,
    repair: Repair | None = None,
) -> Policy:
    """A policy by name, for ``DensityLR(optimizer, model, policy=…)``.

    ``density`` is `Repair` itself. With another measurement: ``first-probe`` (density against the
    first reading, no twin), ``post-norm`` (the same behind the normalisation or activation),
    ``fastai`` (share of ``a <= 0.05``), ``output-change`` (of the output against the untrained
    twin's). With another rule: ``update-ratio``, ``gradient-norm``. With none: ``constant-boost``,
    ``random-boost``, ``replay``.

    Args:
        name: one of `ABLATIONS`.
        model: the model, untrained, before `DensityLR` is made.
        seed: of the random stages of ``random-boost``.
        trace: the scales that ``replay`` replays.
        repair: what the measurements are for; ``Repair()`` by default.

    Raises:
        ValueError: no such name, or ``trace`` without ``replay`` or the other way round.
    """
    if name not in ABLATIONS:
        raise ValueError(f"an ablation is one of {', '.join(ABLATIONS)}, got {name!r}")
    if (name == "replay") != (trace is not None):
        raise ValueError(f"trace is for 'replay' and only for it, got {name!r} and {trace!r}")
    repair = Repair() if repair is None else repair
    if name == "first-probe":
        return OtherEyes(name, Eyes(model, Density), repair)
    if name == "post-norm":
        return OtherEyes(name, Eyes(model, Density, behind), repair)
    if name == "fastai":
        return OtherEyes(name, Eyes(model, FastaiThreshold), repair)
    if name == "output-change":
        return OtherEyes(name, Eyes(model, OutputChange), repair)
    if name == "update-ratio":
        return UpdateRatio()
    if name == "gradient-norm":
        return GradientNorm()
    if name == "constant-boost":
        return ConstantBoost()
    if name == "random-boost":
        return RandomBoost(seed, repair)
    return repair if trace is None else Replay(trace)


def close(policy: Policy) -> None:
    """Take a policy's own hooks off the model, if it has any."""
    if isinstance(policy, OtherEyes):
        policy.eyes.close()


class OtherEyes(Policy):
    """`Repair`, given another displacement; after lift-off it goes by the alignment, too."""

    needs = Repair.needs
    within_user_rates = True
    corrects_momentum = True

    def __init__(self, name: str, eyes: Eyes, repair: Repair) -> None:
        self.name, self.eyes, self.repair = name, eyes, repair

    def init(self, stages: Mapping[str, StageView]) -> tuple[Scales, Any]:
        return self.repair.init(stages)

    def update(self, state: Any, seen: Observation) -> tuple[Scales, Any]:
        moved = self.eyes.collect()
        views = {}
        for name, view in seen.stages.items():
            assert view.reading is not None
            reading = dataclasses.replace(view.reading, displacement=moved[name])
            views[name] = dataclasses.replace(view, reading=reading)
        scales, state = self.repair.update(state, dataclasses.replace(seen, stages=views))
        for name, needs in self.repair.requires(state).items():
            if not needs.undecided:
                self.eyes.let_go(name)
        return scales, state

    def requires(self, state: Any) -> Mapping[str, StageNeeds]:
        return self.repair.requires(state)

    def restore(self, saved: Any) -> Any:
        return self.repair.restore(saved)


class _Boost(Policy):
    """A policy that keeps within the user's rates and is shown no alignment."""

    needs = Needs(twins=True)
    within_user_rates = True
    corrects_momentum = True


def _moved_to(seen: Observation, wanted: Mapping[str, float]) -> dict[str, Change]:
    """Scales as wanted, within 1 and the cap; a stage whose own rate is zero is left alone."""
    return {
        name: Change(min(max(1.0, wanted.get(name, 1.0)), view.cap))
        for name, view in seen.stages.items()
        if view.lr > 0
    }


def _scales(seen: Observation) -> dict[str, float]:
    return {name: view.scale for name, view in seen.stages.items()}


class GradientNorm(_Boost):
    """Auto-RGN (Y. Lee et al., "Surgical Fine-Tuning Improves Adaptation to Distribution
    Shifts", ICLR 2023, section 4), as a controller.

    Taken over: a layer's rate is the base rate times its relative gradient norm ``|g| / |w|``
    over the largest of any layer; the norms are means over five batches, measured again and
    again. Here the layers are stages (their weights of two dimensions or more), the base rate is
    the largest of any group, and the batches are those of the last five readings instead of an
    epoch's first.

    Not taken over: a rate never falls below the user's own, nor grows by more than the largest
    raise of `Repair` at one reading. So with flat rates it does nothing, where Auto-RGN would lower
    every stage but one.
    """

    needs = Needs(twins=True, weights=True, gradients=True)
    batches = 5
    max_raise = Repair().max_raise

    def init(self, stages: Mapping[str, StageView]) -> tuple[Scales, Any]:
        return dict.fromkeys(stages, 1.0), []

    def update(self, state: Any, seen: Observation) -> tuple[Scales, Any]:
        views = seen.stages
        norms = {
            name: view.gradient_norm / view.weight_norm if view.weight_norm else 0.0
            for name, view in views.items()
        }
        largest = max(norms.values())
        if largest == 0 or not all(map(math.isfinite, norms.values())):
            return _moved_to(seen, _scales(seen)), state
        state = [*state, {n: norm / largest for n, norm in norms.items()}][-self.batches :]
        share = {n: math.fsum(row[n] for row in state) / len(state) for n in norms}
        wanted = {
            name: min(share[name] * view.max_lr / view.lr, view.scale * self.max_raise)
            for name, view in views.items()
            if view.lr > 0
        }
        return _moved_to(seen, wanted), state


class ConstantBoost(_Boost):
    """Every rate times one constant from the first step on, the geometric mean of the room
    (largest rate over own rate) of the stages that have any, up to the cap.
    """

    def update(self, state: Any, seen: Observation) -> tuple[Scales, Any]:
        if state is None:
            views = seen.stages.values()
            room = [math.log(v.max_lr / v.lr) for v in views if 0 < v.lr < v.max_lr]
            state = math.exp(math.fsum(room) / len(room)) if room else 1.0
        return _moved_to(seen, dict.fromkeys(seen.stages, state)), state


class RandomBoost(_Boost):
    """The raises of `Repair`, each given to a random stage that has room.

    `Repair` decides as ever and keeps its own account of scales; every raise in it is handed to a
    stage drawn from ``seed``. So there are as many raises as `Repair` would make, of the same size,
    in the wrong places.
    """

    def __init__(self, seed: int, repair: Repair) -> None:
        self.draw = random.Random(seed)
        self.repair = repair
        self.account: PolicyRun | None = None

    def init(self, stages: Mapping[str, StageView]) -> tuple[Scales, Any]:
        self.account = PolicyRun(self.repair, stages)
        return dict.fromkeys(stages, 1.0), None

    def update(self, state: Any, seen: Observation) -> tuple[Scales, Any]:
        assert self.account is not None
        scales = self.account.scales
        own = {n: dataclasses.replace(v, scale=scales[n]) for n, v in seen.stages.items()}
        wanted = _scales(seen)
        for raised in self.account.update(Observation(seen.step, own)):
            open_to = [
                name
                for name, scale in wanted.items()
                if 0 < seen.stages[name].lr * scale < seen.stages[name].max_lr * (1 - 1e-6)
            ]
            if raised.kind == "raise" and open_to:
                wanted[self.draw.choice(open_to)] *= raised.scale / raised.scale_before
        return _moved_to(seen, wanted), state


class Replay(_Boost):
    """The scales of another run, by step, whatever happens in this one."""

    def __init__(self, trace: Trace) -> None:
        self.trace = sorted(trace, key=lambda entry: entry[0])

    def update(self, state: Any, seen: Observation) -> tuple[Scales, Any]:
        past = [scales for step, scales in self.trace if step <= seen.step]
        return _moved_to(seen, past[-1] if past else {}), state
