"""The lift-off law: which scale each stage gets at a reading. Pure, no torch.

A stage that learns changes the distribution of its own outputs within a few dozen steps; a
starved one does not. While a stage has not *lifted off*, its rate is raised. What gradients have to
say to that, and alone have once it has, is in `densitylr.creep`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

from densitylr.creep import Limits, creeping
from densitylr.heat import heat_at, heated, trusted
from densitylr.policy import ROUNDING, LawState, StageState
from densitylr.records import Decision, Reading, StageReading
from densitylr.search import reached, together, visible

__all__ = ["MODES", "LiftOff"]

MODES = ("repair", "warmup", "free")

CHANGED = "your rates have changed"


@dataclass(frozen=True)
class LiftOff:
    """The lift-off law.

    ``D`` is a stage's displacement, ``|ln(near-zero density / untrained density)|``.

    ``repair`` raises the scale, from 1 up to the largest rate the user gave to any group, at every
    probe where the largest ``D`` so far, as it may fall back by chance, is less than ``expected =
    healthy * min(1, steps / patience)``: by ``expected / D``, as ``D`` grows in proportion to the
    rate, at least by ``growth`` and at most by ``leap``, or by ``expected * n`` if that is more:
    with n outputs near zero, a displacement below 1/n cannot be seen, and until that much, or all
    of ``healthy``, is expected nothing is said. The steps count from the first reading at which
    the stage's own rate is positive, step ``t`` as ``1 - momentum**t``. A stage that moves may
    still have too low a rate: then gradients go on pulling its weights away from where they began.
    The cosine between the descent direction and the way come from the untrained weights is averaged
    over ``haste`` steps or the few more until a probe. Where it is above ``pull``, in the stage and
    in the mean of all that have room, the stage is raised by ``growth``, until ``follow`` steps
    after lift-off, its first ``settle`` steps apart. With one flat rate ``repair`` never acts.

    Whether the largest rate can be trusted shows in the stages that have it: in how far the RMS of
    their outputs comes from its untrained value in their first ``heed`` steps, their *heat*,
    ``|ln(rms / untrained rms)|``, see `densitylr.heat`. Where that is above ``calm``, other stages
    may have the largest rate divided by ``exp(steep * (heat - calm))`` and no more; what was raised
    above that is taken back.

    ``warmup`` and ``free`` start at ``start`` and solve for the rate: as ``D`` grows in
    proportion to the rate spent, ``S = sum of rates``, the rate that gives a displacement of
    ``speed`` a step is ``speed * S / D``. Here ``D`` is the largest displacement so far, as it
    may fall back by chance, and of each rate as much is spent as reaches the weights:
    ``1 - momentum**t`` of it in step ``t`` while momentum builds up, ``1 / sqrt(1 - memory**t)``
    times as much while an average of squares does (RMSprop's). While ``D`` is not visible the
    rate is raised by ``leap`` instead: ``D`` is visible above ``visible`` and above
    ``2 / sqrt(n)``, n being the near-zero outputs counted, the scale of its sampling noise. A
    change that was solved for is kept within ``shrink`` … ``growth``. The stages then meet
    half-way, see `densitylr.search.agreed`, and may be drawn along until all have lifted off; then
    the rates of ``warmup`` stay.

    Those of ``free`` may still creep up: where the mean of that cosine over ``pace`` steps and all
    stages is above ``pull``, all are multiplied by ``creep``, for ``follow`` steps. ``warmup``
    keeps to the largest rate of the user's, ``free`` to a scale of ``reach``. What the user's own
    schedules take back of a scale is told at each halving.

    Args:
        mode: ``"repair"``, ``"warmup"`` or ``"free"``.
        healthy: displacement that ``repair`` expects within ``patience`` steps, and at which a
            stage has lifted off for it; that at which it has for the search is ``delta``.
        patience: steps.
        delta: displacement at which a stage has lifted off for the search modes.
        growth: smallest raise of ``repair``, largest of a rate that was solved for.
        start: initial scale of the search modes.
        speed: displacement wanted per step by the search modes.
        visible: displacement below which ``D`` says nothing but "too little".
        leap: largest raise of ``repair`` where few outputs are near zero, and of a rate that is
            searched while ``D`` is not visible.
        shrink: smallest factor of one change.
        reach: largest scale of ``free``; a stage that no rate can move is raised no further.
        pull: cosine above which a rate is too low, in ``repair`` and ``free``.
        creep: one raise of the rates of ``free`` then.
        pace, haste: steps over which the cosine is averaged, in ``free`` and in ``repair``.
        follow: steps after lift-off in which rates may be raised for it.
        settle: steps of a stage before its cosine counts, in ``repair``.
        calm: heat up to which ``repair`` trusts the largest rate.
        steep: e-folds by which a rate is taken to be too high, for each e-fold of heat above that.
        heed: steps of a stage in which its heat is taken.
        momentum: of the optimizer, where it begins with an empty buffer.
        memory: of the optimizer's average of squared gradients, where that begins at zero and is
            not corrected for it.
        nesterov: the momentum is Nesterov's. `DensityLR` takes all three from the optimizer.

    Raises:
        ValueError: no such mode, or a constant out of its range.
    """

    mode: str = "repair"
    healthy: float = 0.1
    patience: int = 20
    delta: float = 0.1
    growth: float = 4.0
    start: float = 1e-4
    speed: float = 0.04
    visible: float = 0.001
    leap: float = 16.0
    shrink: float = 1 / 20
    reach: float = 1e10
    pull: float = 0.03
    creep: float = 1.5
    pace: int = 5
    haste: int = 3
    follow: int = 100
    settle: int = 2
    calm: float = 1.0
    steep: float = 1.5
    heed: int = 4
    momentum: float = 0.0
    memory: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        positive = ("healthy", "patience", "delta", "start", "speed", "visible")
        for name in (*positive, "reach", "calm", "steep", "pace", "haste"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}")
        for name in ("growth", "leap", "creep"):
            if not getattr(self, name) > 1:
                raise ValueError(f"{name} must be greater than 1, got {getattr(self, name)!r}")
        for name in ("follow", "settle", "heed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)!r}")
        if not 0 < self.shrink <= 1:
            raise ValueError(f"shrink must be in (0, 1], got {self.shrink!r}")
        for name in ("momentum", "memory"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)!r}")

    @property
    def follows(self) -> bool:
        """Whether it goes by the pull of gradients."""
        return self.mode != "warmup"

    def init(self, stages: list[str]) -> LawState:
        if self.mode == "repair":
            return LawState({name: StageState(1.0) for name in stages})
        return LawState({name: StageState(self.start, alone=self.start) for name in stages})

    def decide(
        self, state: LawState, reading: Reading, rates: Mapping[str, float], ceiling: float
    ) -> tuple[LawState, list[Decision]]:
        caps = {name: self._cap(rates.get(name, 0.0), ceiling) for name in state.stages}
        before = {
            n: self._later(s, reading.step, rates.get(n, 0.0)) for n, s in state.stages.items()
        }
        repairs, free = self.mode == "repair", self.mode == "free"
        given, trust = caps, None
        if repairs:
            before = {n: heated(s, reading.stages[n], self.heed) for n, s in before.items()}
            trust = trusted(heat_at(ceiling, before, rates), self.calm, self.steep)
            caps = {name: max(1.0, cap * trust.share) for name, cap in given.items()}
        after, why = dict(before), {}
        for name, stage in before.items():
            own, seen = rates.get(name, 0.0), reading.stages[name]
            if own > 0 and math.isfinite(seen.displacement) and not stage.lifted:
                after[name], why[name] = self._judge(stage, seen, caps[name])
            elif stage.scale > caps[name] * (1 + ROUNDING):
                after[name] = dataclasses.replace(stage, scale=caps[name])
        if any(stage.alone is not None for stage in after.values()):
            met = together(before, after, reading, rates, why, least=self.visible, follow=free)
            after, why = after | met.stages, why | met.why
        factor, pace = (self.creep, self.pace) if free else (self.growth, self.haste)
        limits = Limits(self.pull, factor, pace, self.follow)
        crept = creeping(state.stages, after, reading, rates, limits, together=free)
        after, why = after | crept.stages, why | crept.why
        decisions = []
        for name, new in after.items():
            old, own = before[name], rates.get(name, 0.0)
            scale = min(new.scale, caps[name])
            scale = old.scale if math.isclose(scale, old.scale, rel_tol=ROUNDING) else scale
            following = new.following and scale < caps[name] * (1 - ROUNDING)
            after[name] = new = dataclasses.replace(
                new, scale=scale, rate=own * scale, following=following
            )
            if trust is not None and scale < old.scale <= given[name] * (1 + ROUNDING):
                why[name] = trust.why
            elif (repairs and scale < old.scale) or not why.get(name):
                why[name] = CHANGED
            lifted = new.lifted and not old.lifted
            told = scale == old.scale
            if why[name] == CHANGED:  # a schedule may do that at every reading
                told = 0.5 < scale / (old.told or old.scale) < 2
            if not told or (lifted and not (repairs and scale == 1.0)):
                after[name] = new = dataclasses.replace(new, told=scale)
                most = ""
                if scale == caps[name]:
                    most = "the largest it may have" if free else "the largest you gave"
                    most = most if scale == given[name] else "as far as your largest is trusted"
                decisions.append(self._say(name, old, new, reading, most, why[name]))
        return LawState(after), decisions

    def _cap(self, own: float, ceiling: float) -> float:
        """The largest scale of a stage whose own rate is ``own``."""
        if own == 0:
            return math.inf  # no scale moves a rate of zero
        return self.reach if self.mode == "free" else ceiling / own

    def _later(self, stage: StageState, step: int, own: float) -> StageState:
        """The same stage at a later step, with what it has spent until then."""
        begun, steps = stage.first or 0, 0.0
        if self.mode != "repair":  # which does not ask what has been spent
            constants = self.momentum, self.memory, self.nesterov
            steps = reached(stage.step - begun, step - begun, *constants)
        first = step if stage.first is None and own > 0 else stage.first
        spent = stage.spent + stage.rate * steps
        return dataclasses.replace(
            stage, first=first, step=step, rate=own * stage.scale, spent=spent
        )

    def _judge(self, stage: StageState, seen: StageReading, cap: float) -> tuple[StageState, str]:
        """The scale a stage asks for by itself, and why; no reason where it is left as it is."""
        steps = stage.step - (stage.first or 0)
        if seen.zero_gradient:
            return dataclasses.replace(stage, following=False), ""  # no rate moves it
        if self.mode == "repair":
            return self._repaired(stage, seen, steps, cap)
        if steps == 0 or 2 * seen.count < stage.count:
            return stage, ""  # nothing has been spent yet, or it is the small rest of the data
        moved = max(stage.most, seen.displacement)
        lifted = moved >= self.delta
        if not visible(moved, seen, self.visible):
            factor = 1.0 if lifted else min(self.leap, self.delta / max(moved, 1e-9))
            why = f"moved {moved:.2%}, too little to go by"
        else:
            factor = self.speed * stage.spent / moved / stage.rate
            factor = min(1.0 if lifted else self.growth, max(self.shrink, factor))
            why = f"moved {moved:.2%} for {stage.spent:.2g} of rate spent"
        scale = min(stage.scale * factor, cap)
        new = dataclasses.replace(stage, scale=scale, alone=scale, lifted=lifted, most=moved)
        if not stage.count:
            near_zero = seen.count * seen.untrained
            new = dataclasses.replace(new, near_zero=near_zero, count=seen.count)
        return new, f"moved {moved:.1%}, lifted off" if lifted else why

    def _repaired(
        self, stage: StageState, seen: StageReading, steps: int, cap: float
    ) -> tuple[StageState, str]:
        """The same in a repair, ``steps`` after the stage began."""
        moved = max(stage.most, seen.displacement)
        new = dataclasses.replace(stage, most=moved)
        if not stage.following:
            begin = max(stage.step, (stage.first or 0) + self.settle)
            new = dataclasses.replace(new, following=True, pulled=0.0, judged=begin)
        if moved >= self.healthy:
            new = dataclasses.replace(new, lifted=True, over=stage.step)
            return new, f"moved {moved:.1%}, lifted off"
        built_up = reached(0, steps, self.momentum, 0.0, self.nesterov)
        expected = self.healthy * min(1.0, built_up / self.patience)
        outputs = expected * seen.count * seen.untrained
        if moved >= expected or (outputs < 1 and expected < self.healthy):
            return new, ""
        factor = max(self.growth, min(max(self.leap, outputs), expected / max(moved, 1e-9)))
        scale = min(stage.scale * factor, cap)
        return dataclasses.replace(new, scale=scale), f"expected to have moved {expected:.1%}"

    def _say(
        self, name: str, old: StageState, new: StageState, reading: Reading, most: str, why: str
    ) -> Decision:
        seen = reading.stages[name]
        if new.lifted and not old.lifted:
            kind = "lift-off"
        else:
            kind = "raise" if new.scale > old.scale else "lower"
        change = f"rate {old.rate:.1e} → {new.rate:.1e}"
        if new.scale == old.scale:
            change = f"rate stays {new.rate:.1e}, {new.scale:.4g} times yours"
        elif most:
            change += f" ({most})"
        density = f"near-zero density {seen.near_zero:.3f}, untrained {seen.untrained:.3f}, "
        if not math.isfinite(seen.displacement):
            density = "not read "
        reason = f"{density}after {reading.step} steps; {why}; {change}"
        return Decision(reading.step, name, kind, old.scale, new.scale, old.rate, new.rate, reason)
