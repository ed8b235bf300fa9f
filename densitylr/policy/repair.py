"""`Repair`: raise the rate of a stage that stays untrained, up to the largest rate of the user's.

Rates that differ tell which stages lag behind, not whether the largest of them is a good one. The
stages at the largest rate show that at once: at a good rate the RMS of their outputs mostly stays
within a factor of two of its untrained value in the first steps; at a rate that is a hundred times
too high it is soon dozens of times that. `trusted_share` rests on this.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from densitylr.history import LIFT_OFF, Cause, Count, Number, Size, StageReading, restored
from densitylr.policy.alignment import AlignmentWindow, average, each_above
from densitylr.policy.base import (
    ROUNDING,
    Change,
    Needs,
    Observation,
    Policy,
    Scales,
    StageNeeds,
    StageView,
)
from densitylr.policy.lift_off import check_constants, expected_displacement

__all__ = ["Repair", "density_numbers", "largest_growth", "trusted_share"]


LATE = 3
"""A stage's first reading still counts if it comes within so many times the window."""


@dataclass(frozen=True)
class _Stage:
    """What is remembered of one stage.

    Attributes:
        started: step of the first reading at which the user's rate was positive.
        lifted_at: step at which it lifted off.
        displacement: the largest so far.
        growth: see `largest_growth`.
        in_trust_window: its outputs are still used to decide how far its rate can be trusted.
        window: its alignment.
        raisable: it had room below the largest rate when the first rates were known, or was frozen
            and may thaw; None before.
        compared: its twin is of use; None before the first rates were known.
    """

    started: Count | None = None
    lifted_at: Count | None = None
    displacement: Size = 0.0
    growth: Size | None = None
    in_trust_window: bool = False
    window: AlignmentWindow = field(default_factory=AlignmentWindow)
    raisable: bool | None = None
    compared: bool | None = None

    def steps(self, step: int) -> int:
        """Steps since the stage began."""
        return 0 if self.started is None else step - self.started


@dataclass(frozen=True)
class _State:
    """Attributes:
    step: of the last update.
    stages: what is remembered of each.
    """

    step: Count = 0
    stages: Mapping[str, _Stage] = field(default_factory=dict)


@dataclass(frozen=True)
class Repair(Policy):
    """Raise the rate of each starved stage until it lifts off, at most to the user's largest rate.

    Three rules, at each update, for each stage (``D`` is its largest displacement so far, as a
    displacement may fall back by chance; steps count from the first reading at which the stage's
    own rate is positive):

    1. *Displacement.* Expected is ``lift_off * min(1, effective steps / patience)``
       (`expected_displacement`). If ``D`` is less, the scale is multiplied by ``expected / D``, as
       ``D`` grows in proportion to the rate, clipped to ``[growth_factor, max(max_raise, expected *
       n)]``, where n is the number of near-zero outputs. ``D`` cannot be resolved below ``1 / n``,
       so nothing is decided while ``expected < min(1 / n, lift_off)``. At ``D >= lift_off`` the
       stage has lifted off, and this rule is over.
    2. *Alignment.* A stage that moves may still have too low a rate. Its alignment is averaged
       over ``alignment_steps`` steps, or the few more until a reading. If the mean is above
       ``alignment``, for the stage and over all stages with room, the scale is multiplied by
       ``growth_factor``. This begins ``settle`` steps after the stage did, and ends
       ``alignment_window`` steps after its lift-off.
    3. *Trust.* The largest rate may itself be too high. ``growth`` is the mean, over the stages
       that have it, of the largest ``|ln(rms / untrained rms)|`` in their first ``trust_window``
       steps. Other stages are raised at most to ``exp(-trust_exponent * max(0, growth -
       growth_tolerance))`` of the largest rate (`trusted_share`); what was raised above is taken
       back.

    With one flat rate no stage has room, and nothing is ever changed.

    Args:
        lift_off: displacement at which a stage has lifted off.
        patience: steps within which it is expected to.
        growth_factor: the smallest raise.
        max_raise: the largest raise where few outputs are near zero.
        alignment: cosine above which a rate is too low.
        alignment_steps: steps over which the cosine is averaged.
        alignment_window: steps after lift-off in which a rate may still be raised for it.
        settle: first steps of a stage, in which its cosine does not count.
        growth_tolerance: growth, in e-folds, up to which the largest rate is trusted.
        trust_exponent: e-folds by which the trusted rate falls, per unit of growth above the
            tolerance.
        trust_window: number of initial steps over which output growth is measured.

    Raises:
        ValueError: a constant out of its range.
    """

    lift_off: float = LIFT_OFF
    patience: int = 20
    growth_factor: float = 4.0
    max_raise: float = 16.0
    alignment: float = 0.03
    alignment_steps: int = 3
    alignment_window: int = 100
    settle: int = 2
    growth_tolerance: float = 1.0
    trust_exponent: float = 1.5
    trust_window: int = 4

    needs = Needs(twins=True, alignment=True)
    within_user_rates = True
    corrects_momentum = True

    def __post_init__(self) -> None:
        check_constants(
            self,
            positive=(
                "lift_off",
                "patience",
                "alignment_steps",
                "growth_tolerance",
                "trust_exponent",
            ),
            above_one=("growth_factor", "max_raise"),
            not_negative=("alignment_window", "settle", "trust_window"),
        )

    def init(self, stages: Mapping[str, StageView]) -> tuple[Scales, _State]:
        return dict.fromkeys(stages, 1.0), _State(0, {name: _Stage() for name in stages})

    def update(self, state: _State, seen: Observation) -> tuple[Scales, _State]:
        views = seen.stages
        known = {name: state.stages.get(name, _Stage()) for name in views}
        before = {n: self._begun(known[n], view, seen.step) for n, view in views.items()}
        largest = (n for n, v in views.items() if _near(v.lr, v.max_lr))
        growth = mean_growth([before[n].growth for n in largest])
        share = trusted_share(growth, self.growth_tolerance, self.trust_exponent)
        most = {n: view.max_lr / view.lr if view.lr else math.inf for n, view in views.items()}
        caps = {name: max(1.0, cap * share) for name, cap in most.items()}

        after, wanted = dict(before), {name: view.scale for name, view in views.items()}
        why: dict[str, tuple[Cause, dict[str, Number]]] = {}
        for name, view in views.items():
            reading = _read(view)
            if view.lr > 0 and math.isfinite(reading.displacement) and not _lifted(before[name]):
                after[name], factor, reason = self._judge(before[name], view, reading, seen.step)
                wanted[name] = min(view.scale * factor, caps[name]) if factor > 1 else view.scale
                why |= {name: reason} if reason else {}
            elif view.scale > caps[name] * (1 + ROUNDING):
                wanted[name] = caps[name]

        averages = average(
            {n: after[n].window for n in views if known[n].window.open and after[n].window.open},
            seen,
            state.step,
        )
        for name, window in averages.windows.items():
            after[name] = dataclasses.replace(after[name], window=window)
        raised = [name for name in averages.steps if wanted[name] != views[name].scale]
        due = averages.over(self.alignment_steps)
        above = each_above(averages, [n for n in due if n not in raised], self.alignment)
        for name in dict.fromkeys([*due, *raised]):
            own = after[name]
            left = self.alignment_window
            left -= 0 if own.lifted_at is None else seen.step - own.lifted_at
            window = own.window.judged(seen.step, open=left > 0)
            if name in above and left >= 0:
                wanted[name] *= self.growth_factor
                why[name] = Cause.ALIGNMENT, {"alignment": above[name]}
                # A stage lifts off at a reading at which it is not raised.
                own = dataclasses.replace(own, lifted_at=before[name].lifted_at)
            after[name] = dataclasses.replace(own, window=window)

        scales: dict[str, float | Change] = {}
        for name, view in views.items():
            scale = min(wanted[name], caps[name])
            scale = view.scale if _near(scale, view.scale) else scale
            own = after[name]
            if own.window.open and scale >= caps[name] * (1 - ROUNDING):
                own = dataclasses.replace(own, window=dataclasses.replace(own.window, open=False))
            after[name] = own
            lifted = _lifted(own) and not _lifted(before[name])
            if scale == view.scale and not (lifted and scale != 1.0):
                continue
            cause, numbers = why.get(name, (Cause.SCHEDULE, {}))
            if scale < view.scale:
                cause, numbers = Cause.SCHEDULE, {}
                if share < 1 and view.scale <= most[name] * (1 + ROUNDING):
                    cause = Cause.UNTRUSTED_MAXIMUM
                    numbers = {"growth": math.exp(min(growth or 0.0, 700.0))}
            limit = {}
            if scale == caps[name]:
                limit = {"limit": "largest" if caps[name] == most[name] else "trusted"}
            seen_here = density_numbers(view)
            scales[name] = Change(scale, cause, {**seen_here, **numbers, **limit}, lifted)
        after = _of_use(after, views)
        return scales, _State(seen.step, after)

    def requires(self, state: _State) -> Mapping[str, StageNeeds]:
        found = {}
        for name, own in state.stages.items():
            searching = not _lifted(own)
            found[name] = StageNeeds(
                undecided=searching,
                twin=own.compared is not False and (searching or own.in_trust_window),
                first_weights=own.raisable is not False and (searching or own.window.open),
                alignment=own.window.open,
            )
        return found

    def restore(self, saved: Any) -> _State:
        state: _State = restored(_State, saved)
        return state

    def _begun(self, own: _Stage, view: StageView, step: int) -> _Stage:
        """The stage at this step, with its growth."""
        started = step if own.started is None and view.lr > 0 else own.started
        own = dataclasses.replace(own, started=started)
        steps = own.steps(step)
        return dataclasses.replace(
            own,
            in_trust_window=steps < self.trust_window,
            growth=largest_growth(own.growth, steps, self.trust_window, _read(view)),
        )

    def _judge(
        self, own: _Stage, view: StageView, reading: StageReading, step: int
    ) -> tuple[_Stage, float, tuple[Cause, dict[str, Number]] | None]:
        """The first rule: the stage, the factor on its scale, and why."""
        if reading.zero_gradient:  # no rate moves it
            closed = dataclasses.replace(own.window, open=False)
            return dataclasses.replace(own, window=closed), 1.0, None
        moved = max(own.displacement, reading.displacement)
        own = dataclasses.replace(own, displacement=moved)
        if not own.window.open:
            begin = max(step, (own.started or 0) + self.settle)
            own = dataclasses.replace(own, window=AlignmentWindow(True, begin))
        if moved >= self.lift_off:
            numbers: dict[str, Number] = {"moved": moved}
            return dataclasses.replace(own, lifted_at=step), 1.0, (Cause.LIFT_OFF, numbers)
        expected = expected_displacement(
            own.steps(step), view.build_up, patience=self.patience, lift_off=self.lift_off
        )
        outputs = expected * reading.count * reading.untrained
        if moved >= expected or (outputs < 1 and expected < self.lift_off):
            return own, 1.0, None
        largest = min(max(self.max_raise, outputs), expected / max(moved, 1e-9))
        return own, max(self.growth_factor, largest), (Cause.STARVED, {"expected": expected})


def largest_growth(
    growth: float | None, steps: int, window: int, reading: StageReading
) -> float | None:
    """The largest ``|ln(rms / untrained rms)|`` of a stage in its first steps.

    Args:
        growth: the largest so far; None before the first.
        steps: since the stage began; 0 where it has not.
        window: steps in which growth is evidence on the rate; later outputs grow in a healthy
            training, too. A first reading counts up to `LATE` times as late.
        reading: the stage's statistics. An RMS of zero, or one that is not finite, is not evidence.
    """
    last = window if growth is not None else LATE * window
    known = all(0 < scale < math.inf for scale in (reading.rms, reading.rms0))
    if not 0 < steps <= last or not known:
        return growth
    return max(growth or 0.0, abs(math.log(reading.rms / reading.rms0)))


def mean_growth(growths: Iterable[float | None]) -> float | None:
    """The mean of those that are known; None where none is."""
    known = [growth for growth in growths if growth is not None]
    return sum(known) / len(known) if known else None


def trusted_share(growth: float | None, tolerance: float, exponent: float) -> float:
    """The share of the largest rate that is trusted: ``exp(-exponent * max(0, growth -
    tolerance))``.

    Args:
        growth: mean over the stages at that rate; None, where none is known, is trusted.
        tolerance: growth up to which all of the rate is trusted.
        exponent: e-folds by which the rate is taken to be too high, for each of growth above that.
    """
    return 1.0 if growth is None else math.exp(-exponent * max(0.0, growth - tolerance))


def density_numbers(view: StageView) -> dict[str, Number]:
    """The near-zero densities in a decision; NaN where the stage was not read."""
    reading = _read(view)
    if not math.isfinite(reading.displacement):
        return {"near_zero": math.nan, "untrained": math.nan}
    return {"near_zero": reading.near_zero, "untrained": reading.untrained}


def _of_use(stages: Mapping[str, _Stage], views: Mapping[str, StageView]) -> dict[str, _Stage]:
    """Once the first rates are known: which stages can be raised, and whose twin is of use."""
    rates = {n: v for n, v in views.items() if stages[n].raisable is None and v.max_lr > 0}
    room = {name for name, view in rates.items() if 0 < view.lr < view.max_lr}
    found = dict(stages)
    for name, view in rates.items():
        raisable = name in room or not view.trainable
        compared = raisable or (bool(room) and _near(view.lr, view.max_lr))
        found[name] = dataclasses.replace(found[name], raisable=raisable, compared=compared)
    return found


def _read(view: StageView) -> StageReading:
    assert view.reading is not None  # it is needed
    return view.reading


def _lifted(own: _Stage) -> bool:
    return own.lifted_at is not None


def _near(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=ROUNDING)
