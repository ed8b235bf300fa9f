"""Is density what works? The same hands with other eyes, or with none.

Every policy here raises a rate from the user's own up to the largest of any group, and does
nothing where all rates are equal, as ``LiftOff("repair")`` does. They differ in what they look
at when they decide.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections import deque
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from densitylr import Decision, LiftOff, Reading, find_stages
from densitylr.policy import LawState, Policy, StageState
from experiments.arms import UpdateRatio
from experiments.gauntlet.eyes import (
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
    law: LiftOff | None = None,
) -> Policy:
    """A policy by name, for ``DensityLR(optimizer, model, policy=…)``.

    ``density`` is the law itself. With other eyes: ``first-probe`` (density against the first
    probe, no twin), ``post-norm`` (the same behind the normalisation or activation), ``fastai``
    (share of ``a <= 0.05``), ``output-change`` (of the output against the untrained twin's).
    With another rule: ``update-ratio``, ``gradient-norm``. With none: ``constant-boost``,
    ``random-boost``, ``replay``.

    Args:
        name: one of `ABLATIONS`.
        model: the model, untrained, before `DensityLR` is made.
        seed: of the random stages of ``random-boost``.
        trace: the scales that ``replay`` replays.
        law: what the eyes see for; ``LiftOff()`` by default, of an optimizer without momentum.

    Raises:
        ValueError: no such name, or ``trace`` without ``replay`` or the other way round.
    """
    if name not in ABLATIONS:
        raise ValueError(f"an ablation is one of {', '.join(ABLATIONS)}, got {name!r}")
    if (name == "replay") != (trace is not None):
        raise ValueError(f"trace is for 'replay' and only for it, got {name!r} and {trace!r}")
    law = LiftOff() if law is None else law
    if name == "first-probe":
        return OtherEyes(name, Eyes(model, Density), law)
    if name == "post-norm":
        return OtherEyes(name, Eyes(model, Density, behind), law)
    if name == "fastai":
        return OtherEyes(name, Eyes(model, FastaiThreshold), law)
    if name == "output-change":
        return OtherEyes(name, Eyes(model, OutputChange), law)
    if name == "update-ratio":
        return UpdateRatio(model)
    if name == "gradient-norm":
        return GradientNorm(model)
    if name == "constant-boost":
        return ConstantBoost()
    if name == "random-boost":
        return RandomBoost(seed, law)
    return law if trace is None else Replay(trace)


def close(policy: Policy) -> None:
    """Take a policy's own hooks off the model, if it has any."""
    if isinstance(policy, OtherEyes):
        policy.eyes.close()


class OtherEyes:
    """The lift-off law, fed with another displacement; after lift-off it goes by the pull, too."""

    follows = True

    def __init__(self, name: str, eyes: Eyes, law: LiftOff) -> None:
        self.name, self.eyes, self.law = name, eyes, law

    def init(self, stages: list[str]) -> LawState:
        return self.law.init(stages)

    def decide(
        self, state: LawState, reading: Reading, rates: Mapping[str, float], ceiling: float
    ) -> tuple[LawState, list[Decision]]:
        moved = self.eyes.collect()
        seen = {n: dataclasses.replace(s, displacement=moved[n]) for n, s in reading.stages.items()}
        new, decisions = self.law.decide(state, Reading(reading.step, seen), rates, ceiling)
        for stage, now in new.stages.items():
            if now.lifted:
                self.eyes.let_go(stage)
        return new, [self._in_own_words(d, moved[d.stage]) for d in decisions]

    def _in_own_words(self, decision: Decision, moved: float) -> Decision:
        evidence, _, rest = decision.reason.partition("; ")
        if "near-zero density" not in evidence:
            return decision
        reason = f"{self.name} {moved:.2%} after {decision.step} steps; {rest}"
        return dataclasses.replace(decision, reason=reason)


def _moved_to(
    state: LawState,
    step: int,
    rates: Mapping[str, float],
    ceiling: float,
    wanted: Mapping[str, float],
    why: str,
) -> tuple[LawState, list[Decision]]:
    """Scales as wanted, within 1 and the cap; a stage whose own rate is zero is left alone."""
    stages = dict(state.stages)
    decisions = []
    for name, old in state.stages.items():
        own = rates.get(name, 0.0)
        if own <= 0:
            continue
        scale = min(max(1.0, wanted.get(name, 1.0)), ceiling / own)
        stages[name] = dataclasses.replace(old, scale=scale, step=step, rate=own * scale)
        if not math.isclose(scale, old.scale, rel_tol=1e-6):
            kind = "raise" if scale > old.scale else "lower"
            before, after = own * old.scale, own * scale
            reason = f"{why}; rate {before:.1e} → {after:.1e}"
            decisions.append(Decision(step, name, kind, old.scale, scale, before, after, reason))
    return LawState(stages), decisions


def _untouched(stages: list[str]) -> LawState:
    return LawState({name: StageState(1.0) for name in stages})


class GradientNorm:
    """Auto-RGN (Y. Lee et al., "Surgical Fine-Tuning Improves Adaptation to Distribution
    Shifts", ICLR 2023, section 4), as a controller.

    Taken over: a layer's rate is the base rate times its relative gradient norm ``|g| / |w|``
    over the largest of any layer; the norms are means over five batches, measured again and
    again. Here the layers are stages (their weights of two dimensions or more), the base rate is
    the largest of any group, and the batches are those of the last five probes instead of an
    epoch's first.

    Not taken over: a rate never falls below the user's own, nor grows by more than the law's
    largest raise at one probe. So with flat rates it does nothing, where Auto-RGN would lower
    every stage but one.

    Args:
        model: the model that is trained; its gradients are read at each probe.
    """

    batches = 5
    leap = LiftOff().leap

    def __init__(self, model: nn.Module) -> None:
        self.weights = {
            name: [p for p in stage.parameters.values() if p.ndim >= 2]
            for name, stage in find_stages(model).items()
        }
        self.norms: deque[dict[str, float]] = deque(maxlen=self.batches)

    def init(self, stages: list[str]) -> LawState:
        return _untouched(stages)

    def decide(
        self, state: LawState, reading: Reading, rates: Mapping[str, float], ceiling: float
    ) -> tuple[LawState, list[Decision]]:
        norms = {name: _relative_gradient(weights) for name, weights in self.weights.items()}
        largest = max(norms.values())
        if largest == 0 or not all(map(math.isfinite, norms.values())):
            return _moved_to(state, reading.step, rates, ceiling, state.scales, "rates changed")
        self.norms.append({name: norm / largest for name, norm in norms.items()})
        share = {n: math.fsum(row[n] for row in self.norms) / len(self.norms) for n in norms}
        wanted = {
            name: min(share[name] * ceiling / rates[name], old.scale * self.leap)
            for name, old in state.stages.items()
            if rates.get(name, 0.0) > 0
        }
        why = "rate in proportion to the relative gradient norm"
        return _moved_to(state, reading.step, rates, ceiling, wanted, why)


def _relative_gradient(weights: list[nn.Parameter]) -> float:
    gradient = _norm([p.grad for p in weights if p.grad is not None])
    size = _norm([p.detach() for p in weights if p.grad is not None])
    return gradient / size if size else 0.0


def _norm(tensors: list[Tensor]) -> float:
    return math.sqrt(math.fsum(float(t.double().square().sum()) for t in tensors))


class ConstantBoost:
    """Every rate times one constant from the first step on, the geometric mean of the room
    (largest rate over own rate) of the stages that have any, up to the cap.
    """

    def __init__(self) -> None:
        self.boost: float | None = None

    def init(self, stages: list[str]) -> LawState:
        return _untouched(stages)

    def decide(
        self, state: LawState, reading: Reading, rates: Mapping[str, float], ceiling: float
    ) -> tuple[LawState, list[Decision]]:
        if self.boost is None:
            own = [rates.get(name, 0.0) for name in state.stages]
            room = [math.log(ceiling / rate) for rate in own if 0 < rate < ceiling]
            self.boost = math.exp(math.fsum(room) / len(room)) if room else 1.0
        wanted = dict.fromkeys(state.stages, self.boost)
        return _moved_to(state, reading.step, rates, ceiling, wanted, "one constant for all")


class RandomBoost:
    """The law's raises, each given to a random stage that has room.

    The law decides as ever and keeps its own account of scales; every raise in it is handed to a
    stage drawn from ``seed``. So there are as many raises as the law would make, of the same
    size, in the wrong places.
    """

    follows = True

    def __init__(self, seed: int, law: LiftOff) -> None:
        self.draw = random.Random(seed)
        self.law = law
        self.account = LawState({})

    def init(self, stages: list[str]) -> LawState:
        self.account = self.law.init(stages)
        return _untouched(stages)

    def decide(
        self, state: LawState, reading: Reading, rates: Mapping[str, float], ceiling: float
    ) -> tuple[LawState, list[Decision]]:
        self.account, raises = self.law.decide(self.account, reading, rates, ceiling)
        wanted = dict(state.scales)
        for raised in raises:
            open_to = [
                name
                for name, scale in wanted.items()
                if 0 < rates.get(name, 0.0) * scale < ceiling * (1 - 1e-6)
            ]
            if raised.kind == "raise" and open_to:
                wanted[self.draw.choice(open_to)] *= raised.scale / raised.scale_before
        return _moved_to(state, reading.step, rates, ceiling, wanted, "drawn at random")


class Replay:
    """The scales of another run, by step, whatever happens in this one."""

    def __init__(self, trace: Trace) -> None:
        self.trace = sorted(trace, key=lambda entry: entry[0])

    def init(self, stages: list[str]) -> LawState:
        return _untouched(stages)

    def decide(
        self, state: LawState, reading: Reading, rates: Mapping[str, float], ceiling: float
    ) -> tuple[LawState, list[Decision]]:
        past = [scales for step, scales in self.trace if step <= reading.step]
        wanted = past[-1] if past else {}
        return _moved_to(state, reading.step, rates, ceiling, wanted, "as in another run")
