"""A policy at work: what of its scales is recorded, what is refused, and going back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from densitylr import Needs, Observation, Policy, Reading, StageView, simulate
from densitylr.history import Cause
from densitylr.policy import BuildUp, Change, PolicyRun, Repair, Scales
from tests.support.readings import history_of, stage_reading

STAGES = {"a": StageView(0.1, 0.5, 1.0), "b": StageView(0.5, 0.5, 1.0)}


class Told(Policy):
    """Gives the scales it is told to, and notes what it is shown."""

    def __init__(self, first: Scales, *later: Scales) -> None:
        self.first, self.later = first, later
        self.shown: list[Observation] = []

    def init(self, stages: Mapping[str, StageView]) -> tuple[Scales, int]:
        return self.first, 0

    def update(self, state: int, seen: Observation) -> tuple[Scales, int]:
        self.shown.append(seen)
        return self.later[state] if state < len(self.later) else {}, state + 1


def run_of(*scales: Any) -> list[list[tuple[str, str, float, float]]]:
    """Stage, kind and scales of the decisions at each update; the first of ``scales`` is init's."""
    policy = Told(*scales)
    run, found = PolicyRun(policy, STAGES), []
    for step in range(len(scales) - 1):
        decisions = run.update(Observation(step, STAGES))
        assert all(d.step == step for d in decisions)
        assert all(d.rate == STAGES[d.stage].lr * d.scale for d in decisions)
        assert all(d.rate_before == STAGES[d.stage].lr * d.scale_before for d in decisions)
        found.append([(d.stage, d.kind, d.scale_before, d.scale) for d in decisions])
    return found


@pytest.mark.parametrize(
    ("scale", "recorded"),
    [
        (2.0, True),
        (0.5, True),
        (math.nextafter(2.0, 0.0), False),
        (math.nextafter(0.5, 1.0), False),
        (math.nextafter(2.0, 3.0), True),
        (math.nextafter(0.5, 0.0), True),
        (0.0, True),
        (1.0, False),
    ],
)
def test_a_number_is_recorded_once_it_has_doubled_or_halved(scale: float, recorded: bool) -> None:
    kind = "raise" if scale > 1 else "lower"
    expected = [("a", kind, 1.0, scale)] if recorded else []
    assert run_of({}, {"a": scale}) == [expected]
    # From the last one that was recorded, however small each change is.
    slowly = run_of({"a": 4.0}, {"a": 8.0}, {"a": 8.0 * math.sqrt(scale)}, {"a": 8.0 * scale})
    assert slowly[0] == [("a", "raise", 4.0, 8.0)]
    assert [d[3] for step in slowly[1:] for d in step] == ([8.0 * scale] if scale else [0.0]) * (
        recorded
    )


def test_a_number_that_drifts_from_the_first_one_on_is_recorded() -> None:
    found = run_of({"a": 4.0}, *({"a": 4.0 * 1.1**i} for i in range(1, 20)))
    steps = [i for i, decisions in enumerate(found, 1) if decisions]
    assert steps == [8, 16]  # 1.1 ** 8 is the first above 2
    assert found[7][0][2:] == (pytest.approx(4.0 * 1.1**7), pytest.approx(4.0 * 1.1**8))


def test_a_change_is_always_recorded_but_for_rounding_and_schedules() -> None:
    def change(scale: float, *rest: Any, **more: Any) -> Scales:
        return {"a": Change(scale, *rest, **more)}

    assert run_of({}, change(1.01)) == [[("a", "raise", 1.0, 1.01)]]
    assert run_of({}, change(0.99)) == [[("a", "lower", 1.0, 0.99)]]
    assert run_of({}, change(1.0)) == [[]]
    assert run_of({}, change(1 + 5e-7)) == [[]]
    assert run_of({}, change(1 + 2e-6)) == [[("a", "raise", 1.0, 1 + 2e-6)]]
    assert run_of({}, change(1.99, Cause.SCHEDULE)) == [[]]
    assert run_of({}, change(0.5, Cause.SCHEDULE)) == [[("a", "lower", 1.0, 0.5)]]
    assert run_of({}, change(1.0, lifted=True)) == [[("a", "lift-off", 1.0, 1.0)]]
    assert run_of({}, change(1.2, Cause.SCHEDULE, lifted=True)) == [[("a", "lift-off", 1.0, 1.2)]]
    # A recorded change is what the next number is compared with.
    assert run_of({}, change(1.5), {"a": 2.9}, {"a": 3.0}) == [
        [("a", "raise", 1.0, 1.5)],
        [],
        [("a", "raise", 2.9, 3.0)],
    ]


def test_a_change_brings_its_cause_and_its_numbers() -> None:
    run = PolicyRun(
        Told({}, {"a": Change(4.0, Cause.ALIGNMENT, {"alignment": 0.2}), "b": 9.0}), STAGES
    )
    a, b = run.update(Observation(7, STAGES))
    assert (a.cause, a.numbers, a.step) == (Cause.ALIGNMENT, {"alignment": 0.2}, 7)
    assert (b.cause, b.numbers, b.step) == (Cause.POLICY, {}, 7)


def test_what_is_set_at_first_is_recorded_at_the_first_update() -> None:
    first = {"a": Change(0.25, Cause.POLICY), "b": Change(1.0)}
    found = run_of(first, {"a": 0.125}, {"a": 0.2})
    assert found == [[("a", "lower", 1.0, 0.25), ("a", "lower", 0.25, 0.125)], []]
    # A number is not: a search begins far below, and has decided nothing yet.
    assert run_of({"a": 1e-4}, {}) == [[]]
    run = PolicyRun(Told(first), STAGES)
    assert run.scales == {"a": 0.25, "b": 1.0}
    run.load(run.restored(run.state_dict()))  # goes on from where it has been told already
    assert run.update(Observation(0, STAGES)) == []


def test_stages_that_are_left_out_keep_their_scale() -> None:
    run = PolicyRun(Told({"a": 3.0}, {"b": 0.25}, {}), STAGES)
    assert run.scales == {"a": 3.0, "b": 1.0}
    for _ in range(2):
        run.update(Observation(0, STAGES))
        assert run.scales == {"a": 3.0, "b": 0.25}
    assert run.stages == ("a", "b")


REFUSED = [math.nan, math.inf, -math.inf, -1e-9, True, False, None, "1", np.float32(1.0), 1j]


@pytest.mark.parametrize("scale", REFUSED)
@pytest.mark.parametrize("wrapped", [False, True])
def test_what_is_no_scale_is_refused_and_nothing_has_changed(scale: Any, wrapped: bool) -> None:
    given_ = {"b": 2.0, "a": Change(scale) if wrapped else scale}
    with pytest.raises(ValueError, match=r"must be finite and not negative, got .* of 'a'"):
        PolicyRun(Told(given_), STAGES)
    run = PolicyRun(Told({}, given_), STAGES)
    before = run.now
    with pytest.raises(ValueError, match=r"must be finite and not negative, got .* of 'a'"):
        run.update(Observation(0, STAGES))
    assert run.now is before
    saved = run.state_dict()
    saved["scales"]["a"] = scale
    with pytest.raises(ValueError, match=r"must be finite and not negative, got .* of 'a'"):
        run.restored(saved)


@pytest.mark.parametrize("scale", [0, 1, 0.0, 3, 1e300, np.float64(2.0)])
def test_any_other_number_is_one(scale: Any) -> None:
    run = PolicyRun(Told({}, {"a": scale}), STAGES)
    run.update(Observation(0, STAGES))
    assert run.scales["a"] == scale
    assert type(run.scales["a"]) is float


def test_a_stage_that_is_unknown_is_refused_by_name() -> None:
    message = r"Told gave scales for \['c', 'd'\]; the stages it may act on are \['a', 'b'\]"
    with pytest.raises(ValueError, match=message):
        PolicyRun(Told({"d": 1.0, "a": 1.0, "c": 1.0}), STAGES)
    run = PolicyRun(Told({}, {"c": 1.0, "d": Change(2.0)}), STAGES)
    with pytest.raises(ValueError, match=message):
        run.update(Observation(0, STAGES))


@pytest.mark.parametrize("state", [{1, 2}, {"a": np.zeros(3)}, [object()], (b"bytes",)])
def test_a_state_that_no_checkpoint_holds_is_refused_at_once(state: Any) -> None:
    class Odd(Policy):
        def init(self, stages: Mapping[str, StageView]) -> tuple[Scales, Any]:
            return {}, state

    with pytest.raises(TypeError, match="the state of a policy must be made of numbers"):
        PolicyRun(Odd(), STAGES)


def test_a_checkpoint_of_another_policy_is_refused() -> None:
    saved = PolicyRun(Repair(), STAGES).state_dict()
    message = "the state dict is of policy Repair, this DensityLR has Told"
    with pytest.raises(ValueError, match=message):
        PolicyRun(Told({}), STAGES).restored(saved)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 30)), min_size=1, max_size=12))
def test_a_policy_never_sees_steps_that_were_taken_back(moves: list[tuple[int, int]]) -> None:
    """So many steps forward, and back to where one stood before, again and again."""
    policy = Told({})
    run, step = PolicyRun(policy, STAGES), 0
    stood = [(run.now, step, 0)]  # with the steps that count by then
    counted, expected = 0, []
    for forward, back in moves:
        step, counted = step + forward, counted + forward
        run.update(Observation(step, STAGES))
        expected.append(counted)
        stood.append((run.now, step, counted))
        if back < len(stood):
            then, at, counted = stood[back]
            run.go_back(then, step - at)
            del stood[back + 1 :]
            assert run.now.state == then.state
            stood[back] = (run.now, step, counted)
    assert [seen.step for seen in policy.shown] == expected


def test_going_back_takes_scales_and_what_was_told_along() -> None:
    run = PolicyRun(Told({}, {"a": 4.0}, {"a": 16.0}, {"a": 32.0}), STAGES)
    run.update(Observation(3, STAGES))
    then = run.now
    run.update(Observation(6, STAGES))
    run.go_back(then, 5)
    assert run.scales == {"a": 4.0, "b": 1.0}
    assert run.now.behind == 5
    (decision,) = run.update(Observation(9, STAGES))
    assert (decision.step, decision.scale_before, decision.scale) == (9, 4.0, 16.0)
    assert run.policy.shown[-1].step == 4
    saved = run.state_dict()
    assert saved["behind"] == 5
    assert run.restored(saved) == run.now


def test_what_a_policy_says_nothing_of_it_needs() -> None:
    run = PolicyRun(Told({}), STAGES)
    assert (run.compared, run.aligned, run.first_weights) == (set(), set(), set())
    assert run.undecided == run.waiting == frozenset()
    watching = Told({})
    watching.needs = Needs(alignment=True)
    run = PolicyRun(watching, STAGES)
    assert run.waiting == run.aligned == run.first_weights == {"a", "b"}
    watching.needs = Needs(twins=True)
    assert PolicyRun(watching, STAGES).compared == {"a", "b"}
    assert PolicyRun(Repair(), STAGES).undecided == {"a", "b"}


def test_a_simulation_shows_what_a_run_shows() -> None:
    class Notes(Told):
        needs = Needs(twins=True, alignment=True)

    policy = Notes({"a": 2.0}, {"a": 8.0}, {}, {"a": Change(16.0)})
    trace = {
        "a": [stage_reading(0.1 * i, alignment=0.01 * i) for i in range(4)],
        "b": [stage_reading(0.2 * i) for i in range(4)],
    }
    history = history_of(trace, {"a": 0.01, "b": 0.5}, every=7)
    scales, decisions = simulate(policy, history, BuildUp(0.9))
    assert scales == {"a": 16.0, "b": 1.0}
    assert [(d.step, d.stage, d.scale_before, d.scale) for d in decisions] == [
        (0, "a", 2.0, 8.0),
        (14, "a", 8.0, 16.0),
    ]
    assert [seen.step for seen in policy.shown] == [0, 7, 14, 21]
    last = policy.shown[-1].stages["a"]
    assert (last.lr, last.max_lr, last.scale) == (0.01, 0.5, 16.0)
    assert (last.alignment, last.build_up) == (0.03, BuildUp(0.9))
    assert last.reading == trace["a"][3]
    assert math.isnan(last.weight_norm)


def test_a_simulation_acts_on_the_stages_that_have_rates() -> None:
    policy = Told({})
    history = history_of({"a": [stage_reading()], "b": [stage_reading()]}, {"b": 0.5})
    assert simulate(policy, history)[0] == {"b": 1.0}
    assert policy.shown[0].stages.keys() == {"b"}
    assert isinstance(history.readings[0], Reading)
