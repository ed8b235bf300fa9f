"""`Warmup` and `Free`: find the rate of each stage from far below, by what a rate moves."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from densitylr.history import LIFT_OFF, Cause, Count, Number, Size, restored
from densitylr.policy.alignment import AlignmentWindow, average, together_above
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
from densitylr.policy.lift_off import check_constants, effective_steps, visible
from densitylr.policy.repair import density_numbers

__all__ = ["Consensus", "Free", "Search", "Warmup", "find_consensus"]

INFORMED = 0.25
"""Share of the most near-zero outputs of any stage, from which on a stage can judge itself."""

Reason = tuple[Cause, dict[str, Number]]


@dataclass(frozen=True)
class _Stage:
    """What is remembered of one stage.

    Attributes:
        started: step of the first reading at which the user's rate was positive.
        lifted: its displacement has reached `LIFT_OFF`, or the search is over.
        lr: the rate in force since the last update.
        spent: sum of the rates of all steps up to the last update, each counted as far as it has
            reached the weights.
        displacement: the largest so far.
        near_zero, count: untrained near-zero outputs, and outputs read, when it was first judged.
        own_scale: what its own displacement asks for; None once the search is over.
        ended_at: step at which the search was over, where rates may still be raised after that.
        window: its alignment.
    """

    started: Count | None = None
    lifted: bool = False
    lr: Size = 0.0
    spent: Size = 0.0
    displacement: Size = 0.0
    near_zero: Size = 0.0
    count: Count = 0
    own_scale: Size | None = None
    ended_at: Count | None = None
    window: AlignmentWindow = field(default_factory=AlignmentWindow)


@dataclass(frozen=True)
class _State:
    """Attributes:
    step: of the last update.
    stages: what is remembered of each.
    """

    step: Count = 0
    stages: Mapping[str, _Stage] = field(default_factory=dict)


@dataclass(frozen=True)
class Search(Policy):
    """What `Warmup` and `Free` share: solve for the rate that moves a stage at a given speed.

    All scales start at ``start``. As displacement ``D`` grows in proportion to the rate spent, ``S
    = sum of rates``, the rate that gives a displacement of ``speed`` a step is ``speed * S / D``.
    Here ``D`` is the largest displacement so far, as it may fall back by chance, and of each rate
    as much is spent as reaches the weights (`effective_steps`). A change that was solved for is
    kept within ``min_factor`` … ``growth_factor``. While ``D`` is not `visible` the rate is raised
    by ``max_raise`` instead. A stage that has lifted off is not raised by its own displacement any
    more.

    The stages then meet half-way (`find_consensus`), and go on doing so until all have lifted off;
    then the search is over.

    Args:
        start: initial scale.
        speed: displacement wanted per step.
        visible: displacement below which ``D`` cannot be resolved.
        growth_factor: the largest raise to a rate that was solved for.
        max_raise: the largest raise while ``D`` is not visible.
        min_factor: the smallest factor of one change.

    Raises:
        ValueError: a constant out of its range.
    """

    start: float = 1e-4
    speed: float = 0.04
    visible: float = 0.001
    growth_factor: float = 4.0
    max_raise: float = 16.0
    min_factor: float = 1 / 20

    needs = Needs(twins=True)

    def __post_init__(self) -> None:
        check_constants(
            self, positive=("start", "speed", "visible"), above_one=("growth_factor", "max_raise")
        )
        if not 0 < self.min_factor <= 1:
            raise ValueError(f"min_factor must be in (0, 1], got {self.min_factor!r}")

    def init(self, stages: Mapping[str, StageView]) -> tuple[Scales, _State]:
        state = _State(0, {name: _Stage(own_scale=self.start) for name in stages})
        return dict.fromkeys(stages, self.start), state

    def update(self, state: _State, seen: Observation) -> tuple[Scales, _State]:
        views = seen.stages
        caps = {name: self._cap(view) for name, view in views.items()}
        before = {
            name: self._spent(state.stages.get(name, _Stage()), view, state.step, seen.step)
            for name, view in views.items()
        }
        after, wanted = dict(before), {name: view.scale for name, view in views.items()}
        why: dict[str, Reason] = {}
        for name, view in views.items():
            own = before[name]
            if view.lr > 0 and math.isfinite(_displacement(view)) and not own.lifted:
                after[name], wanted[name], reason = self._judge(own, view, caps[name], seen.step)
                why |= {name: reason} if reason else {}
            elif view.scale > caps[name] * (1 + ROUNDING):
                wanted[name] = caps[name]
        if any(own.own_scale is not None for own in after.values()):
            self._meet(before, after, wanted, why, seen)
        self._raise_together(state, after, wanted, why, seen)

        scales: dict[str, float | Change] = {}
        for name, view in views.items():
            scale = min(wanted[name], caps[name])
            scale = view.scale if math.isclose(scale, view.scale, rel_tol=ROUNDING) else scale
            window = after[name].window
            if scale >= caps[name] * (1 - ROUNDING):
                window = dataclasses.replace(window, open=False)
            after[name] = dataclasses.replace(after[name], lr=view.lr * scale, window=window)
            lifted = after[name].lifted and not before[name].lifted
            if scale == view.scale and not lifted:
                continue
            cause, numbers = why.get(name, (Cause.SCHEDULE, {}))
            limit = {"limit": self._limit} if scale == caps[name] else {}
            scales[name] = Change(
                scale, cause, {**density_numbers(view), **numbers, **limit}, lifted
            )
        return scales, _State(seen.step, after)

    def requires(self, state: _State) -> Mapping[str, StageNeeds]:
        ended = any(own.ended_at is not None for own in state.stages.values())
        measured = any(own.window.open for own in state.stages.values())
        return {
            name: StageNeeds(
                undecided=not own.lifted,
                twin=not own.lifted,
                first_weights=measured or not ended,
                alignment=own.window.open,
            )
            for name, own in state.stages.items()
        }

    def restore(self, saved: Any) -> _State:
        state: _State = restored(_State, saved)
        return state

    # The subclasses' parts

    _limit = ""

    def _cap(self, view: StageView) -> float:
        """The largest scale of a stage."""
        raise NotImplementedError

    def _ended(self, before: Mapping[str, _Stage], own: _Stage, step: int) -> _Stage:
        """A stage at the end of the search."""
        return own

    def _raise_together(
        self,
        state: _State,
        after: dict[str, _Stage],
        wanted: dict[str, float],
        why: dict[str, Reason],
        seen: Observation,
    ) -> None:
        """What may still be raised once the search is over."""

    # The search

    def _spent(self, own: _Stage, view: StageView, last: int, step: int) -> _Stage:
        """The stage at this step, with what it has spent since the last one."""
        begun = own.started or 0
        steps = effective_steps(last - begun, step - begun, view.build_up)
        started = step if own.started is None and view.lr > 0 else own.started
        return dataclasses.replace(own, started=started, spent=own.spent + own.lr * steps)

    def _judge(
        self, own: _Stage, view: StageView, cap: float, step: int
    ) -> tuple[_Stage, float, Reason | None]:
        """The stage, the scale it asks for by itself, and why."""
        reading = view.reading
        assert reading is not None
        if reading.zero_gradient:  # no rate moves it
            closed = dataclasses.replace(own.window, open=False)
            return dataclasses.replace(own, window=closed), view.scale, None
        if step == (own.started or 0) or 2 * reading.count < own.count:
            return (
                own,
                view.scale,
                None,
            )  # nothing is spent yet, or it is the small rest of the data
        moved = max(own.displacement, reading.displacement)
        lifted = moved >= LIFT_OFF
        cause = Cause.SOLVED
        numbers: dict[str, Number] = {"moved": moved, "spent": own.spent}
        if not visible(moved, reading, self.visible):
            factor = 1.0 if lifted else min(self.max_raise, LIFT_OFF / max(moved, 1e-9))
            cause, numbers = Cause.NOT_VISIBLE, {"moved": moved}
        else:
            factor = self.speed * own.spent / moved / (view.lr * view.scale)
            factor = min(1.0 if lifted else self.growth_factor, max(self.min_factor, factor))
        scale = min(view.scale * factor, cap)
        if not own.count:
            near_zero = reading.count * reading.untrained
            own = dataclasses.replace(own, near_zero=near_zero, count=reading.count)
        own = dataclasses.replace(own, own_scale=scale, lifted=lifted, displacement=moved)
        if lifted:
            cause, numbers = Cause.LIFT_OFF, {"moved": moved}
        return own, scale, (cause, numbers)

    def _meet(
        self,
        before: Mapping[str, _Stage],
        after: dict[str, _Stage],
        wanted: dict[str, float],
        why: dict[str, Reason],
        seen: Observation,
    ) -> None:
        """Let the stages meet half-way; once all have lifted off, the search is over."""
        asked, near_zero, heard = {}, {}, set()
        for name, own in after.items():
            view = seen.stages[name]
            reading = view.reading
            assert reading is not None
            begun = own.started is not None and seen.step > own.started
            read = own.lifted or (begun and math.isfinite(reading.displacement))
            if view.lr > 0 and read and not reading.zero_gradient:
                scale = wanted[name] if own.own_scale is None else own.own_scale
                asked[name] = view.lr * scale
                near_zero[name] = own.near_zero or reading.count * reading.untrained
                if own.lifted or visible(own.displacement, reading, self.visible):
                    heard.add(name)
        if not asked:
            return
        judged = bool(why)
        lifted_before = {name for name in asked if before[name].lifted}
        found = find_consensus(asked, near_zero, heard, lifted_before)
        over = all(after[name].lifted for name in asked.keys() - found.followers)
        for name, rate in found.rates.items():
            own = after[name]
            if own.own_scale is None:
                continue  # its search was over before
            if judged:
                wanted[name] = own.own_scale * (rate / asked[name])
                why[name] = found.reason(name, asked[name], why.get(name))
            lifted = over or (own.lifted and name not in found.followers)
            own = dataclasses.replace(own, lifted=lifted)
            if over:
                own = self._ended(before, dataclasses.replace(own, own_scale=None), seen.step)
            after[name] = own


@dataclass(frozen=True)
class Warmup(Search):
    """Start at 1e-4 of the user's rates and find the rates, at most the user's largest one.

    See `Search` for how. Once all stages have lifted off the scales stay. It takes the place of a
    warm-up, whose length and height the network decides, and survives rates far too high.
    """

    _limit = "largest"

    def _cap(self, view: StageView) -> float:
        return view.cap


@dataclass(frozen=True)
class Free(Search):
    """Start at 1e-4 of the user's rates and find the rates, with no cap.

    See `Search` for how. Once all stages have lifted off, rates may still be too low: the alignment
    is averaged over ``alignment_steps`` steps and all stages, and where the mean is above
    ``alignment`` all scales are multiplied by ``alignment_growth``, for ``alignment_window`` steps.

    Args:
        alignment: cosine above which the rates are too low.
        alignment_growth: one raise of the rates then.
        alignment_steps: steps over which the cosine is averaged.
        alignment_window: steps after the search in which rates may still be raised.
        max_scale: the largest scale; a stage that no rate can move is raised no further.
    """

    alignment: float = 0.03
    alignment_growth: float = 1.5
    alignment_steps: int = 5
    alignment_window: int = 100
    max_scale: float = 1e10

    needs = Needs(twins=True, alignment=True)
    _limit = "reach"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_constants(
            self,
            positive=("alignment_steps", "max_scale"),
            above_one=("alignment_growth",),
            not_negative=("alignment_window",),
        )

    def _cap(self, view: StageView) -> float:
        return self.max_scale if view.lr else math.inf  # no scale changes a rate of zero

    def _ended(self, before: Mapping[str, _Stage], own: _Stage, step: int) -> _Stage:
        first = not any(s.ended_at is not None for s in before.values())
        window = dataclasses.replace(own.window, open=first, start=step)
        return dataclasses.replace(own, ended_at=step, window=window)

    def _raise_together(
        self,
        state: _State,
        after: dict[str, _Stage],
        wanted: dict[str, float],
        why: dict[str, Reason],
        seen: Observation,
    ) -> None:
        open_before = {name for name, own in state.stages.items() if own.window.open}
        windows = {n: s.window for n, s in after.items() if n in open_before and s.window.open}
        averages = average(windows, seen, state.step)
        for name, window in averages.windows.items():
            after[name] = dataclasses.replace(after[name], window=window)
        due = averages.over(self.alignment_steps)
        above = together_above(averages, due, self.alignment)
        for name in due:
            ended_at = after[name].ended_at
            left = self.alignment_window - (0 if ended_at is None else seen.step - ended_at)
            if name in above and left >= 0:
                wanted[name] *= self.alignment_growth
                why[name] = Cause.ALIGNMENT, {"alignment": above[name]}
            window = after[name].window.judged(seen.step, open=left > 0)
            after[name] = dataclasses.replace(after[name], window=window)


class Consensus(NamedTuple):
    """The rates at which stages meet.

    Attributes:
        rates: of each stage.
        median: of the rates asked for.
        followers: stages that do not count in the median and take it.
    """

    rates: dict[str, float]
    median: float
    followers: set[str]

    def reason(self, name: str, asked: float, why: Reason | None) -> Reason:
        """Why a stage that asked for a rate, for that reason, gets its own."""
        if name in self.followers:
            return Cause.CONSENSUS, {"median": self.median}
        cause, numbers = why or (Cause.LIFTED_BEFORE, {})
        met = {} if self.rates[name] == asked else {"consensus": self.median}
        return cause, {**numbers, **met}


def find_consensus(
    asked: Mapping[str, float],
    near_zero: Mapping[str, float],
    heard: Collection[str],
    lifted: Collection[str] = (),
) -> Consensus:
    """Where stages meet that each ask for a rate of their own.

    The rate that a stage solves for is right to a factor of two or three either way, so each is
    given the geometric mean of its own and the median. A head, with a handful of near-zero outputs,
    lifts off by chance at a small part of a good rate: it is given the median. As long as a
    displacement is not visible, the rate has only been raised blindly, and does not count in the
    median.

    Args:
        asked: the rate each stage asks for.
        near_zero: outputs that each stage is judged by.
        heard: stages whose displacement is visible, which count in the median; if there is none,
            all count.
        lifted: stages that lifted off before; they count however few outputs they have beside a
            stage that joins late.
    """
    enough = INFORMED * max(near_zero[name] for name in asked)
    followers = {n for n in asked if near_zero[n] < enough and n not in lifted}
    own = {name: rate for name, rate in asked.items() if name not in followers}
    ranked = sorted([own[name] for name in own if name in heard] or own.values())
    median = math.sqrt(ranked[(len(ranked) - 1) // 2] * ranked[len(ranked) // 2])
    met = {name: math.sqrt(rate * median) for name, rate in own.items()}
    return Consensus({name: met.get(name, median) for name in asked}, median, followers)


def _displacement(view: StageView) -> float:
    return math.nan if view.reading is None else view.reading.displacement
