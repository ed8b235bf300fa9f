"""The law as a pure function of readings and rates."""

from __future__ import annotations

import itertools
import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from readings import history_of, reading, stage_reading

from densitylr import Decision, LiftOff, Reading, simulate
from densitylr.policy import LawState

MOVED = st.one_of(st.floats(0, 0.3), st.floats(0, 1e-3), st.sampled_from([0.0, 0.1, 5.0, math.nan]))
TRACES = st.lists(st.tuples(MOVED, MOVED), min_size=1, max_size=25)
RATES = st.floats(1e-8, 10.0)


def play(
    policy: LiftOff,
    traces: list[tuple[float, ...]],
    rates: dict[str, float],
    every: int = 5,
) -> tuple[list[LawState], list[Decision]]:
    """States after each reading, and all decisions, for stages named by ``rates``."""
    state, states, decisions = policy.init(list(rates)), [], []
    for i, moved in enumerate(traces):
        seen = reading(every * i, dict(zip(rates, moved, strict=True)))
        state, new = policy.decide(state, seen, rates, max(rates.values()))
        states.append(state)
        decisions += new
    return states, decisions


@given(TRACES, RATES, RATES)
def test_repair_only_raises_up_to_the_largest_rate_until_lift_off(
    traces: list[tuple[float, float]], a: float, b: float
) -> None:
    law, seen = LiftOff(), stage_reading()
    near_zero = seen.count * seen.untrained
    rates = {"a": a, "b": b}
    states, decisions = play(law, traces, rates)
    for k, name in enumerate(rates):
        cap = max(a, b) / rates[name]
        scales = [1.0, *(s.stages[name].scale for s in states)]
        assert all(1 <= now <= max(1.0, cap) for now in scales)
        moved = [t[k] for t in traces]
        for i, (before, now) in enumerate(itertools.pairwise(scales)):
            most = max((m for m in moved[: i + 1] if math.isfinite(m)), default=0.0)
            expected = law.healthy * min(1.0, 5 * i / law.patience)
            if not math.isfinite(moved[i]) or most >= expected:
                assert now == before  # it is not behind, or has lifted off
                continue
            factor = expected / most if most else math.inf
            largest = max(law.leap, expected * near_zero)
            factor = max(law.growth, min(factor, largest))
            assert now == pytest.approx(max(1.0, min(cap, before * factor)))
        lift = next((i for i, m in enumerate(moved) if m >= law.healthy), len(moved))
        assert len(set(scales[lift:])) <= 1
        assert states[-1].stages[name].lifted == (lift < len(moved))
    largest = max(rates, key=lambda n: rates[n])
    assert all(d.stage != largest for d in decisions)
    assert {d.kind for d in decisions} <= {"raise", "lift-off"}


@given(TRACES, RATES)
def test_equal_rates_are_never_touched(traces: list[tuple[float, float]], rate: float) -> None:
    states, decisions = play(LiftOff(), traces, {"a": rate, "b": rate})
    assert decisions == []
    assert all(set(s.scales.values()) == {1.0} for s in states)


@given(TRACES, RATES, RATES)
def test_warmup_keeps_to_the_largest_rate_and_free_does_not_care(
    traces: list[tuple[float, float]], a: float, b: float
) -> None:
    rates = {"a": a, "b": b}
    for mode in ("warmup", "free"):
        states, decisions = play(LiftOff(mode), traces, rates)
        assert states[0].scales == {"a": 1e-4, "b": 1e-4}  # nothing has been spent
        for state in states:
            for name, stage in state.stages.items():
                assert stage.scale > 0
                if mode == "warmup":
                    assert stage.scale * rates[name] <= max(a, b) * (1 + 1e-12)
        assert {d.kind for d in decisions} <= {"raise", "lower", "lift-off"}


@given(TRACES, RATES, RATES, st.sampled_from(["repair", "warmup", "free"]))
def test_decisions_are_the_changes(
    traces: list[tuple[float, float]], a: float, b: float, mode: str
) -> None:
    """Each change of a scale has one decision, and its sentence holds the numbers."""
    policy, rates = LiftOff(mode), {"a": a, "b": b}
    state = policy.init(["a", "b"])
    for i, moved in enumerate(traces):
        seen = reading(5 * i, dict(zip(rates, moved, strict=True)))
        new, decisions = policy.decide(state, seen, rates, max(a, b))
        assert len({d.stage for d in decisions}) == len(decisions)
        by_stage = {d.stage: d for d in decisions}
        for name, stage in new.stages.items():
            before = state.stages[name]
            decision = by_stage.get(name)
            if decision is None:
                assert stage.scale == before.scale
                continue
            assert (decision.step, decision.scale_before, decision.scale) == (
                5 * i,
                before.scale,
                stage.scale,
            )
            assert decision.rate == rates[name] * decision.scale
            assert decision.rate_before == rates[name] * decision.scale_before
            if decision.kind == "raise":
                assert decision.scale > decision.scale_before
            elif decision.kind == "lower":
                assert decision.scale < decision.scale_before
            else:
                assert stage.lifted
                assert not before.lifted
            numbers = re.findall(r"[\d.]+(?:e[+-]\d+)?", decision.reason)
            assert f"{seen.stages[name].near_zero:.3f}" in numbers
            assert f"{seen.stages[name].untrained:.3f}" in numbers
            assert f"after {5 * i} steps" in decision.reason
            assert f"{decision.rate:.1e}" in numbers
            assert str(decision) == f"{name}: {decision.reason}"
        state = new


def test_the_search_solves_for_the_rate() -> None:
    """``rate = speed * sum of rates / displacement``, by a loop over every single step."""
    law = LiftOff("free", delta=100.0)
    moved = [0.0, 0.03, 0.05, 0.2, 0.21, 0.7, 9.0]
    states, _ = play(law, [(m,) for m in moved], {"a": 0.3}, every=3)
    rate, spent, done = 0.3 * law.start, 0.0, 0
    for i, displacement in enumerate(moved):
        while done < 3 * i:
            spent += rate
            done += 1
        if i:
            wanted = law.speed * spent / displacement
            rate = min(4 * rate, max(rate / 20, wanted))
        assert states[i].stages["a"].scale * 0.3 == pytest.approx(rate, rel=1e-12)
        assert states[i].stages["a"].spent == pytest.approx(spent, rel=1e-12)


def test_a_displacement_within_its_noise_is_not_solved_for() -> None:
    law = LiftOff("free")
    state = law.init(["a"])
    for step, count in ((0, 2**17), (5, 100), (10, 2**17)):
        # 0.02 is seen in 10,000 near-zero outputs, but not in 8.
        seen = Reading(step, {"a": stage_reading(0.02, count=count)})
        before = state.stages["a"]
        state, decisions = law.decide(state, seen, {"a": 1.0}, 1.0)
        if step == 5:
            assert state.stages["a"].scale == pytest.approx(min(16, 0.1 / 0.02) * before.scale)
            assert "too little to go by" in decisions[0].reason
    assert "of rate spent" in decisions[0].reason


def test_rate_zero_stays() -> None:
    for mode in ("repair", "warmup", "free"):
        states, decisions = play(LiftOff(mode), [(0.0, 0.2)] * 8, {"a": 0.0, "b": 0.1})
        assert {d.stage for d in decisions} <= {"b"}
        assert states[-1].stages["a"].scale == LiftOff(mode).init(["a"]).scales["a"]
        assert states[-1].stages["a"].spent == 0
        assert not states[-1].stages["a"].lifted


def test_unread_stages_wait() -> None:
    states, decisions = play(LiftOff(), [(math.nan, 0.0)] * 8, {"a": 1e-4, "b": 0.1})
    assert decisions == []
    assert states[-1].scales == {"a": 1.0, "b": 1.0}


def test_only_the_stages_it_was_given() -> None:
    law = LiftOff()
    state = law.init(["a"])
    for step in range(0, 50, 5):
        seen = reading(step, {"a": 0.0, "b": 0.0})
        state, decisions = law.decide(state, seen, {"a": 1e-3, "b": 1e-6}, 0.1)
        assert {d.stage for d in decisions} <= {"a"}
    assert state.scales == {"a": pytest.approx(100)}


@given(TRACES, RATES, RATES, st.sampled_from(["repair", "warmup", "free"]), st.integers(0, 24))
def test_state_goes_through_json(
    traces: list[tuple[float, float]], a: float, b: float, mode: str, cut: int
) -> None:
    """A run that is interrupted and resumed decides what the whole run decides."""
    policy, rates = LiftOff(mode), {"a": a, "b": b}
    whole, expected = play(policy, traces, rates)
    state, found = policy.init(["a", "b"]), []
    for i, moved in enumerate(traces):
        if i == cut:
            state = LawState.from_dict(json.loads(json.dumps(state.to_dict())))
        seen = reading(5 * i, dict(zip(rates, moved, strict=True)))
        state, new = policy.decide(state, seen, rates, max(a, b))
        found += new
    assert state == whole[-1]
    assert found == expected


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "fast"},
        *[
            {n: v}
            for n in ("healthy", "delta", "patience", "start", "speed", "visible", "calm", "steep")
            for v in (0, -1)
        ],
        *[{n: v} for n in ("growth", "leap") for v in (1, 0.5)],
        *[{n: -1} for n in ("follow", "settle", "heed")],
        {"shrink": 0},
        {"shrink": 1.5},
        {"delta": math.nan},
    ],
)
def test_constants_are_checked(options: dict[str, float]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=rf"^{name} must (not )?be"):
        LiftOff(**options)  # type: ignore[arg-type]


def test_simulate_needs_rates() -> None:
    with pytest.raises(ValueError, match="holds no learning rates"):
        simulate(LiftOff(), history_of({"a": [stage_reading()] * 3}, {}))


def test_simulate_another_law_over_the_same_trace() -> None:
    trace = {"a": [stage_reading(0.0)] * 8, "b": [stage_reading(0.02 * i) for i in range(8)]}
    history = history_of(trace, {"a": 1e-3, "b": 0.1})
    state, decisions = simulate(LiftOff(), history)
    assert state.scales["a"] == pytest.approx(100)
    assert state.scales["b"] == 1
    assert decisions[0].kind == "raise"
    # One that expects less than an output to change does not say that it has not.
    assert simulate(LiftOff(patience=10**12), history)[1] == []


def test_a_raise_is_by_growth_at_least() -> None:
    law = LiftOff()
    for moved in (0.99, 0.5, 0.26):
        state = law.init(["a"])
        for step in (0, law.patience):
            seen = reading(step, {"a": moved * law.healthy * (step > 0)})
            state, _ = law.decide(state, seen, {"a": 1e-3}, 1.0)
        assert state.scales["a"] == law.growth


@pytest.mark.parametrize("count", [2**17, 32 * 10, 10])
def test_a_stage_is_judged_once_what_is_expected_can_be_seen(count: int) -> None:
    """Where even all of `healthy` cannot, once all of it is expected."""
    law, seen = LiftOff(), stage_reading(count=count)
    state, first = law.init(["a"]), None
    for step in range(40):
        state, decisions = law.decide(state, Reading(step, {"a": seen}), {"a": 1e-9}, 1.0)
        first = step if decisions and first is None else first
    outputs = law.healthy / law.patience * seen.count * seen.untrained  # expected at step 1
    assert first == min(law.patience, math.ceil(1 / outputs))


# A plant whose displacement is proportional to the rate spent


def run_plant(
    law: LiftOff, sensitivity: float, own: float, ceiling: float, every: int = 5, probes: int = 60
) -> tuple[float, bool, int]:
    """The effective rate at the end, whether it lifted off, and after how many steps."""
    state, moved, step = law.init(["a"]), 0.0, 0
    for _ in range(probes):
        state, _ = law.decide(state, reading(step, {"a": moved}), {"a": own}, ceiling)
        stage = state.stages["a"]
        if stage.lifted:
            break
        moved += sensitivity * own * stage.scale * every
        step += every
    return own * state.scales["a"], state.stages["a"].lifted, step


@given(st.floats(-4, 4), st.floats(-3, 3))
def test_free_finds_the_rate_of_a_linear_plant(log_sensitivity: float, log_own: float) -> None:
    """Over 8 decades of sensitivity and 6 of starting rate it lifts off at the wanted speed.

    On its way up a leap may go too far by up to 16 (or by what is missing to ``delta``); where
    this crosses ``delta`` at once the rate is still lowered at lift-off. So the bound holds from
    above everywhere, and from below where the search began below the solution.
    """
    law = LiftOff("free")
    sensitivity, own = 10.0**log_sensitivity, 10.0**log_own
    wanted = law.speed / sensitivity
    rate, lifted, _ = run_plant(law, sensitivity, own, own)
    assert lifted
    begun = own * law.start
    if 20 * wanted >= begun:
        # Solved for, or grown fourfold at each probe until three quarters of ``delta`` came
        # within the last interval of 5 steps.
        slowest = 0.75 * law.delta / 5 / sensitivity
        assert min(wanted / 4, slowest) * (1 - 1e-9) <= rate <= 4 * wanted
    else:  # lifted off within the first interval: one change of at most 1/20 is left
        assert rate == pytest.approx(begun / 20)


@given(st.floats(-4, 4), st.floats(0, 6))
def test_repair_of_a_linear_plant_stays_between_the_rates(log_s: float, log_gap: float) -> None:
    """A starved stage lifts off, if its neighbours' rate would have let it."""
    own, ceiling = 10.0**-log_gap, 1.0
    sensitivity = 10.0**log_s
    rate, lifted, steps = run_plant(LiftOff(), sensitivity, own, ceiling)
    assert own <= rate <= ceiling * (1 + 1e-12)
    if (
        sensitivity * ceiling >= LiftOff().healthy / 10
    ):  # at the largest rate it would need ten steps
        assert lifted
        assert steps <= 60


def test_free_stops_at_its_reach_where_nothing_moves() -> None:
    law = LiftOff("free")
    state = law.init(["dead"])
    for step in range(0, 200, 5):
        state, _ = law.decide(state, reading(step, {"dead": 0.0}), {"dead": 0.1}, 0.1)
    assert state.scales == {"dead": law.reach}


def test_repair_gives_back_what_the_user_has_taken() -> None:
    law = LiftOff("repair")
    state = law.init(["early"])
    for step in range(0, 40, 5):
        moved = {"early": 0.0 if step < 30 else 0.5}
        state, _ = law.decide(state, reading(step, moved), {"early": 1e-3}, 1e-1)
    assert state.scales == {"early": 100.0}
    assert state.stages["early"].lifted
    state, (decision,) = law.decide(state, reading(40, {"early": 0.5}), {"early": 1e-2}, 1e-1)
    assert state.scales["early"] == pytest.approx(10)
    assert decision.kind == "lower"
    assert "your rates have changed; rate 1.0e+00 → 1.0e-01" in decision.reason


def test_what_schedules_take_back_is_told_at_each_halving() -> None:
    law = LiftOff("repair")
    state, told, followed = law.init(["early"]), [], 0
    for step in range(0, 2000, 5):
        moved = {"early": 0.0 if step < 30 else 0.5}
        ceiling = 0.1 * 0.998 ** max(0, step - 40)
        state, decisions = law.decide(state, reading(step, moved), {"early": 1e-3}, ceiling)
        told += [d for d in decisions if d.kind == "lower"]
        if step > 40:
            assert state.scales["early"] == max(1.0, ceiling / 1e-3)
            followed += ceiling > 1e-3
    assert followed > 10 * len(told) > 0
    below = [100.0, *(d.scale for d in told)]
    assert all(now <= before / 2 for before, now in itertools.pairwise(below))
    assert len(told) <= math.log2(100)


@pytest.mark.parametrize("mode", ["repair", "warmup"])
def test_rounding_of_a_schedule_is_no_change(mode: str) -> None:
    law = LiftOff(mode)
    state = law.init(["early"])
    scales = []
    for step in range(0, 100, 5):
        rounded = 1e-3 * (1 + 1e-9 * math.sin(step))
        moved = {"early": 0.0 if step < 50 else 0.5}
        state, decisions = law.decide(state, reading(step, moved), {"early": rounded}, 1e-1)
        scales.append(state.scales["early"])
        if step > 50:
            assert not decisions
    assert scales[-1] == pytest.approx(100)
    assert len(set(scales[-9:])) == 1


@pytest.mark.parametrize("mode", ["repair", "warmup", "free"])
def test_a_stage_that_thaws_is_expected_to_move_from_then_on(mode: str) -> None:
    """As one that trains from the first step on, whatever came before."""

    def asked(start: int, thaw: int) -> list[tuple[int, float, bool]]:
        state, found = LiftOff(mode).init(["a", "b"]), []
        for step in range(start, thaw + 60, 5):
            rates = {"a": 1e-5 if step >= thaw else 0.0, "b": 0.1}
            moved = 1e-4 * max(0, step - thaw)
            state, decisions = LiftOff(mode).decide(
                state, reading(step, {"a": moved, "b": 0.3}), rates, 0.1
            )
            found += [
                (d.step - thaw, d.scale, d.kind == "raise") for d in decisions if d.stage == "a"
            ]
        return found

    assert asked(0, 100) == asked(100, 100)
    assert asked(0, 100)
